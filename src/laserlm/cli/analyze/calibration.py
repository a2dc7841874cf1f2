"""The command that tells whether a model is right as often as it is confident, before and after a reduction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, Pair, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import bar

if TYPE_CHECKING:
    from laserlm.studies.calibration import Calibration, Confidence
    from laserlm.studies.scores import CachedScorer

ROWS = {"ece": "expected calibration error", "brier": "Brier score", "confidence": "mean confidence", "accuracy": "accuracy"}


@with_options(study=StudyOptions, output=Output)
def calibration(
    study: StudyOptions,
    output: Output,
    bins: Annotated[int, typer.Option(min=1, help="Bins, of as many examples each, but 5 at least.")] = 10,
) -> None:
    """Tell whether a model is right as often as it is confident: calibration error, Brier score, reliability curve.

    The confidence is the probability of the likeliest choice, or of the likeliest first token of an answer.

    Example: laser analyze calibration bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.studies.calibration import calibration as calibration_
    from laserlm.studies.calibration import check_scorer

    output.check()
    with study.pair() as pair:
        check_scorer(pair.base.scorer)
        with pair.book() as book:
            before, after = (_confidences(pair, book, text) for text in ("", pair.intervention))
    found = calibration_(before, after, bins=bins)
    what = "choice" if pair.base.scorer == "choice" else "first token"
    output.show(
        {**pair.about, "confidence_in": what, **found.as_dict()},
        {f"{pair.title}: before and after, n {pair.base.n}": _measures(found), "reliability": _reliability(found)},
        lines=[f"confidence: the probability of the likeliest {what}"],
        figure=lambda: _figure(found, pair.title),
    )


def _confidences(pair: Pair, book: CachedScorer, text: str) -> list[Confidence]:
    """Return the confidences under an intervention, which are kept with its scores."""
    from laserlm.edit import applied
    from laserlm.studies.calibration import confidences

    def make() -> list[Confidence]:
        name = text or "the unchanged model"
        with applied(pair.lm, text, seed=pair.seed), bar(f"scoring {name}", unit="sequences") as advance:
            return confidences(book.lm, book.split, book.batch_size, advance)

    kept = book.remember(f"confidence of {text or 'the unchanged model'}", make)
    return [(float(confidence), bool(right)) for confidence, right in kept]


def _measures(found: Calibration) -> list[dict[str, Any]]:
    sides = {"before": found.before, "after": found.after, "change": found.change}
    return [
        {"measure": title} | {side: getattr(measures, name) for side, measures in sides.items()} for name, title in ROWS.items()
    ]


def _reliability(found: Calibration) -> list[dict[str, Any]]:
    return [
        {"model": side, "bin": number, "n": b.accuracy.n, "confidence": b.confidence, "accuracy": b.accuracy}
        for side, curve in (("before", found.curve_before), ("after", found.curve_after))
        for number, b in enumerate(curve, start=1)
    ]


def _figure(found: Calibration, title: str) -> Any:
    """Return the reliability curves, and where those of a model lie that is right as often as it is confident."""
    from laserlm.studies.figures import curves

    sides = {"before": found.curve_before, "after": found.curve_after}
    series = {side: [(b.confidence, b.accuracy) for b in curve] for side, curve in sides.items()}
    figure = curves(series, title, "mean confidence", "accuracy")
    return figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line={"dash": "dot", "color": "grey"})
