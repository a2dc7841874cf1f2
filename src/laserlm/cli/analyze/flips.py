"""``laser analyze flips``: the examples that a reduction corrects and breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import ModelPair, Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import print_stderr

if TYPE_CHECKING:
    from laserlm.studies.flipping import Flip, Flips

NAMES: dict[Any, str] = {"corrected": "corrected", "broken": "broken", "right": "right twice", "wrong": "wrong twice"}


@with_options(study=StudyOptions, output=Output)
def flips(
    study: StudyOptions,
    output: Output,
    top: Annotated[int, typer.Option(min=0, help="Likeliest first tokens shown, before and after.")] = 5,
    shown: Annotated[int, typer.Option(min=0, help="Corrected and broken examples shown, of each.")] = 5,
) -> None:
    """Show the examples that a reduction corrects and breaks, by group, and what the model answers instead.

    CSV holds every example.

    Example: laser analyze flips bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.jsonable import to_json
    from laserlm.studies.figures import flips_figure
    from laserlm.studies.flipping import flips as flips_

    output.check()
    with study.pair() as pair:
        result = flips_(pair.base, pair.edited, pair.examples)
    examples = [*result.of("corrected")[:shown], *result.of("broken")[:shown]]
    tokens = _likeliest(pair, examples, top) if top and not output.csv else [None] * len(examples)
    counts = ", ".join(f"{len(result.of(change))} {name}" for change, name in NAMES.items())
    tables = {"the most frequent answers": _frequent(result)}
    if result.groups:
        tables["groups"] = _groups(result)
    tables["corrected and broken examples"] = [_example(f, t) for f, t in zip(examples, tokens, strict=True)]
    output.show(
        {
            **pair.description,
            **to_json(result),
            "shown": [to_json(f) | {"likeliest": t} for f, t in zip(examples, tokens, strict=True)],
        },
        {"every example": [to_json(f) for f in result.flips]} if output.csv else tables,
        lines=[
            str(result.comparison),
            f"{counts}; the same answer before and after for {result.unchanged.percent()}",
            f"outside of all answers: {result.off_list_base.percent()} before, {result.off_list_edited.percent()} after; "
            f"always giving the most frequent answer scores {result.majority.percent()}",
        ],
        figure=lambda: flips_figure(result, pair.title),
    )


def _likeliest(pair: ModelPair, flips: list[Flip], top: int) -> list[Any]:
    """Return the likeliest first tokens of both models for each example, or None for each if they cannot be read."""
    from laserlm.errors import ScoringError, TokenizationError
    from laserlm.studies.flipping import likeliest

    by_id = {e.id: e for e in pair.examples}
    examples = [by_id[f.id] for f in flips]
    if not examples:
        return []
    try:
        tokens = likeliest(pair.lm, examples, pair.intervention, k=top, batch_size=pair.batch_size, seed=pair.seed)
    except (TokenizationError, ScoringError) as error:
        print_stderr(f"The likeliest tokens are not shown: {error}")
        return [None] * len(flips)
    return [{"before": base, "after": edited} for base, edited in tokens]


def _example(flip: Flip, tokens: dict[str, list[str]] | None) -> dict[str, Any]:
    row = {"change": flip.change, "prompt": flip.prompt, "answer": flip.answer, "before": flip.base, "after": flip.edited}
    return row | {f"likeliest {model}": " ".join(map(repr, of)) for model, of in (tokens or {}).items()}


def _groups(result: Flips) -> list[dict[str, Any]]:
    return [
        {
            "group": g.group + (" (few)" if g.is_small else ""),
            "n": g.comparison.n,
            "before": g.comparison.base,
            "after": g.comparison.edited,
            "gain": g.comparison.gain,
            "low": g.comparison.interval.low,
            "high": g.comparison.interval.high,
            "corrected": g.comparison.corrected,
            "broken": g.comparison.broken,
            "p": g.comparison.mcnemar_p,
        }
        for g in result.groups
    ]


def _frequent(result: Flips) -> list[dict[str, Any]]:
    """Return the most frequent answers, and the most frequent texts that are no answer."""
    answers = [x for x in result.labels if x.answers]
    return [
        {"answer": x.label, "is right": x.answers, "answered before": x.base, "answered after": x.edited}
        for x in [*answers[:8], *(x for x in result.labels if not x.answers)]
    ]
