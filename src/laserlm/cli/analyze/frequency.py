"""``laser analyze frequency``: compare the gain of a reduction with the frequency of facts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import ModelPair, Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import progress_bar

if TYPE_CHECKING:
    from laserlm.studies.estimates import Estimate
    from laserlm.studies.frequency import FrequencyBin
    from laserlm.studies.mentions import Mentions


@with_options(study=StudyOptions, output=Output)
def frequency(
    study: StudyOptions,
    output: Output,
    corpus: Annotated[
        str | None,
        typer.Option(help="Corpus: folder, .jsonl or .txt file, or hub:NAME[:CONFIG[:SPLIT]]; default: the task's popularity."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read the corpus.")] = 1,
    bins: Annotated[int, typer.Option(min=1, help="Bins of examples by how often their facts occur.")] = 5,
) -> None:
    """Compare the gain of a reduction with the frequency of the fact: do rare facts gain most?

    CSV holds the bins.

    Example: laser analyze frequency bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.jsonable import to_json
    from laserlm.studies.figures import curves
    from laserlm.studies.frequency import frequency as frequency_
    from laserlm.studies.frequency import popularity

    output.check()
    with study.pair() as pair:
        mentions = None if corpus is None else _mentions(corpus, pair, workers)
    result = frequency_(
        pair.base, pair.edited, pair.examples, popularity(pair.examples) if mentions is None else mentions.both, bins=bins
    )
    occurs = "popularity" if mentions is None else "documents with subject and answer"
    lines = [
        f"{len(result.examples)} examples of {result.facts} facts, by {occurs}; {result.without} more without",
        f"rank correlation with the change of correctness {_text(result.correctness)}, "
        f"with the fall of the loss {_text(result.loss)}",
        f"gain of the rarer half {_text(result.rare.gain)}, of the other {_text(result.frequent.gain)}; "
        f"the first minus the second {_text(result.difference)}",
    ]
    if mentions is not None:
        never = sum(n == 0 for n in mentions.both.values())
        lines.append(f"of {mentions.documents} documents none mentions both subject and answer of {never} examples")
    output.show(
        {
            **pair.description,
            "frequency": occurs,
            **({} if mentions is None else {"corpus": corpus, "mentions": mentions}),
            **to_json(result),
        },
        {"bins": _rows(result.bins), "cumulative": _rows(result.cumulative)},
        lines=lines,
        figure=lambda: curves(
            {
                "before": [(f"up to {_number(part.high)}", part.base) for part in result.bins],
                "after": [(f"up to {_number(part.high)}", part.edited) for part in result.bins],
            },
            pair.title,
            occurs,
            "accuracy",
        ),
    )


def _mentions(corpus: str, pair: ModelPair, workers: int) -> Mentions:
    from laserlm.studies.mentions import count_mentions

    with progress_bar("reading the corpus", unit="documents") as advance:

        def show(done: int, total: int | None, read: int) -> None:
            if total is None:
                advance(0, 1, f"{done} documents", read)
            else:
                advance(done, total, items=read)

        return count_mentions(corpus, pair.examples, pair.results, workers=workers, on_progress=show)


def _rows(parts: Sequence[FrequencyBin]) -> list[dict[str, Any]]:
    return [
        {
            "from": _number(part.low),
            "to": _number(part.high),
            "n": part.n,
            "before": part.base,
            "after": part.edited,
            "gain": part.gain,
            "change of loss": part.loss,
        }
        for part in parts
    ]


def _number(x: float) -> str:
    return f"{x:.0f}" if x.is_integer() else f"{x:.6g}"


def _text(estimate: Estimate) -> str:
    return str(estimate) if math.isfinite(estimate.value) else "unknown"
