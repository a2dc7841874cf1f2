"""The command that tells which examples a reduction corrects and breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import say

if TYPE_CHECKING:
    from laserlm.studies.flipping import Flips, Label

NAMES: dict[Any, str] = {"corrected": "corrected", "broken": "broken", "right": "right twice", "wrong": "wrong twice"}


@with_options(study=StudyOptions, output=Output)
def flips(
    study: StudyOptions,
    output: Output,
    top: Annotated[int, typer.Option(min=0, help="Likeliest first tokens shown, before and after.")] = 5,
    shown: Annotated[int, typer.Option(min=0, help="Corrected and broken examples shown, of each.")] = 5,
) -> None:
    """Tell which examples a reduction corrects and breaks, by group, and what the model says instead.

    CSV holds every example.

    Example: laser analyze flips bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from dataclasses import asdict

    from laserlm.errors import ScoringError, TokenizationError
    from laserlm.studies.figures import flips_figure
    from laserlm.studies.flipping import flips as flips_
    from laserlm.studies.flipping import likeliest

    output.check()
    with study.pair() as pair:
        found = flips_(pair.base, pair.edited, pair.examples)
    chosen = [*found.of("corrected")[:shown], *found.of("broken")[:shown]]
    tokens: list[Any] = [None] * len(chosen)
    if top and chosen and not output.csv:
        wanted = {e.id: e for e in pair.examples}
        asked = [wanted[f.id] for f in chosen]
        try:
            sides = likeliest(pair.lm, asked, pair.intervention, k=top, batch_size=study.batch_size, seed=pair.seed)
            tokens = [{"before": before, "after": after} for before, after in sides]
        except (TokenizationError, ScoringError) as error:
            say(f"The likeliest tokens are not shown: {error}")
    examples = [
        {"change": f.change, "prompt": f.prompt, "answer": f.answer, "before": f.before, "after": f.after}
        | {f"likeliest {side}": " ".join(map(repr, of)) for side, of in (t or {}).items()}
        for f, t in zip(chosen, tokens, strict=True)
    ]
    counts = ", ".join(f"{len(found.of(change))} {name}" for change, name in NAMES.items())
    output.show(
        {**pair.about, **found.as_dict(), "shown": [asdict(f) | {"likeliest": t} for f, t in zip(chosen, tokens, strict=True)]},
        {"every example": [asdict(f) for f in found.flips]}
        if output.csv
        else {
            "the most frequent answers": [
                {"answer": x.label, "is right": x.answers, "given before": x.before, "given after": x.after}
                for x in _frequent(found)
            ],
            **({"groups": _groups(found)} if found.groups else {}),
            "corrected and broken examples": examples,
        },
        lines=[
            str(found.comparison),
            f"{counts}; the same answer before and after for {found.same.percent()}",
            f"outside of all answers: {found.outside_before.percent()} before, {found.outside_after.percent()} after; "
            f"always giving the most frequent answer scores {found.majority.percent()}",
        ],
        figure=lambda: flips_figure(found, pair.title),
    )


def _groups(found: Flips) -> list[dict[str, Any]]:
    return [
        {
            "group": g.group + (" (few)" if g.few else ""),
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
        for g in found.groups
    ]


def _frequent(found: Flips) -> list[Label]:
    """Return the most frequent answers, and what is given most often without being one."""
    answers = [x for x in found.labels if x.answers]
    return [*answers[:8], *(x for x in found.labels if not x.answers)]
