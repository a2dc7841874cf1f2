"""``laser analyze calibration``: compare confidence and accuracy before and after a reduction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import ModelPair, Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import progress_bar

if TYPE_CHECKING:
    from laserlm.studies.calibration import Calibration, Confidence
    from laserlm.studies.scores import CachedScorer

MEASURE_TITLES = {
    "ece": "expected calibration error",
    "brier": "Brier score",
    "confidence": "mean confidence",
    "accuracy": "accuracy",
}


@with_options(study=StudyOptions, output=Output)
def calibration(
    study: StudyOptions,
    output: Output,
    bins: Annotated[int, typer.Option(min=1, help="Bins of equal numbers of examples, 5 or more each.")] = 10,
) -> None:
    """Compare the confidence of a model with its accuracy: calibration error, Brier score, reliability curve.

    The confidence is the probability of the likeliest choice, or of the likeliest first token of an answer.

    Example: laser analyze calibration bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.jsonable import to_json
    from laserlm.studies.calibration import calibration as calibration_
    from laserlm.studies.calibration import check_scorer

    output.check()
    with study.pair() as pair:
        check_scorer(pair.base.scorer)
        with pair.scorer() as scorer:
            base, edited = (_confidences(pair, scorer, text) for text in ("", pair.intervention))
    result = calibration_(base, edited, bins=bins)
    confidence_in = "choice" if pair.base.scorer == "choice" else "first token"
    output.show(
        {**pair.description, "confidence_in": confidence_in, **to_json(result)},
        {f"{pair.title}: before and after, n {pair.base.n}": _measures(result), "reliability": _reliability(result)},
        lines=[f"confidence: the probability of the likeliest {confidence_in}"],
        figure=lambda: _figure(result, pair.title),
    )


def _confidences(pair: ModelPair, scorer: CachedScorer, text: str) -> list[Confidence]:
    """Return the confidences under an intervention, stored with its scores."""
    from laserlm.edit import applied
    from laserlm.studies.calibration import confidences

    def make() -> list[Confidence]:
        name = text or "the unchanged model"
        with applied(pair.lm, text, seed=pair.seed), progress_bar(f"scoring {name}", unit="sequences") as advance:
            return confidences(scorer.lm, scorer.split, scorer.batch_size, advance)

    stored = scorer.cached(f"confidence of {text or 'the unchanged model'}", make)
    return [(float(confidence), bool(right)) for confidence, right in stored]


def _measures(result: Calibration) -> list[dict[str, Any]]:
    models = {"before": result.base, "after": result.edited, "change": result.change}
    return [
        {"measure": title} | {model: getattr(measures, name) for model, measures in models.items()}
        for name, title in MEASURE_TITLES.items()
    ]


def _reliability(result: Calibration) -> list[dict[str, Any]]:
    return [
        {"model": model, "bin": number, "n": b.accuracy.n, "confidence": b.confidence, "accuracy": b.accuracy}
        for model, curve in (("before", result.curve_base), ("after", result.curve_edited))
        for number, b in enumerate(curve, start=1)
    ]


def _figure(result: Calibration, title: str) -> Any:
    """Return the reliability curves, and the diagonal of a perfectly calibrated model."""
    from laserlm.studies.figures import curves

    models = {"before": result.curve_base, "after": result.curve_edited}
    series = {model: [(b.confidence, b.accuracy) for b in curve] for model, curve in models.items()}
    figure = curves(series, title, "mean confidence", "accuracy")
    return figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line={"dash": "dot", "color": "grey"})
