"""The command that sets the gain of a reduction against how often facts occur."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, Pair, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import bar

if TYPE_CHECKING:
    from laserlm.studies.estimates import Estimate
    from laserlm.studies.frequency import Part
    from laserlm.studies.mentions import Mentions


@with_options(study=StudyOptions, output=Output)
def frequency(
    study: StudyOptions,
    output: Output,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Count documents that mention subject and answer: a folder, a .jsonl or .txt file, or "
            "hub:NAME[:CONFIG[:SPLIT]]; default: the task's popularity."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read the corpus.")] = 1,
    bins: Annotated[int, typer.Option(min=1, help="Bins of examples by how often their facts occur.")] = 5,
) -> None:
    """Set the gain of a reduction against how often the fact occurs: is it what is rare that gains?

    CSV holds the bins.

    Example: laser analyze frequency bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.studies.figures import curves
    from laserlm.studies.frequency import frequency as frequency_
    from laserlm.studies.frequency import popularity

    output.check()
    with study.pair() as pair:
        mentions = None if corpus is None else _mentions(corpus, pair, workers)
    found = frequency_(
        pair.base, pair.edited, pair.examples, popularity(pair.examples) if mentions is None else mentions.both, bins=bins
    )
    occurs = "popularity" if mentions is None else "documents with subject and answer"
    lines = [
        f"{len(found.examples)} examples of {found.facts} facts, by {occurs}; {found.without} more without",
        f"rank correlation with the change of correctness {_text(found.correctness)}, "
        f"with the fall of the loss {_text(found.loss)}",
        f"gain of the rarer half {_text(found.rare.gain)}, of the other {_text(found.frequent.gain)}; "
        f"the first minus the second {_text(found.difference)}",
    ]
    if mentions is not None:
        never = sum(n == 0 for n in mentions.both.values())
        lines.append(f"of {mentions.documents} documents none mentions both subject and answer of {never} examples")
    output.show(
        {
            **pair.about,
            "frequency": occurs,
            **({} if mentions is None else {"corpus": corpus, "mentions": mentions.as_dict()}),
            **found.as_dict(),
        },
        {"bins": _rows(found.bins), "cumulative": _rows(found.cumulative)},
        lines=lines,
        figure=lambda: curves(
            {
                "before": [(f"up to {_number(part.high)}", part.before) for part in found.bins],
                "after": [(f"up to {_number(part.high)}", part.after) for part in found.bins],
            },
            pair.title,
            occurs,
            "accuracy",
        ),
    )


def _mentions(corpus: str, pair: Pair, workers: int) -> Mentions:
    from laserlm.studies.mentions import count_mentions

    with bar("reading the corpus", unit="documents") as advance:

        def show(done: int, total: int | None, read: int) -> None:
            if total is None:
                advance(0, 1, f"{done} documents", read)
            else:
                advance(done, total, items=read)

        return count_mentions(corpus, pair.examples, pair.results, workers=workers, on_progress=show)


def _rows(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [
        {
            "from": _number(part.low),
            "to": _number(part.high),
            "n": part.n,
            "before": part.before,
            "after": part.after,
            "gain": part.gain,
            "change of loss": part.loss,
        }
        for part in parts
    ]


def _number(x: float) -> str:
    return f"{x:.0f}" if x.is_integer() else f"{x:.6g}"


def _text(estimate: Estimate) -> str:
    return str(estimate) if math.isfinite(estimate.value) else "unknown"
