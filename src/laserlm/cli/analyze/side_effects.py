"""The command that tells what a reduction does beside its task."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, Pair, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import bar

if TYPE_CHECKING:
    from laserlm.studies.side_effects import OnText, Transfer
    from laserlm.tasks import Split


@with_options(study=StudyOptions, output=Output)
def side_effects(
    study: StudyOptions,
    output: Output,
    also: Annotated[
        list[str] | None,
        typer.Option("--with", help="Another search's run of the same model, scored likewise; may be repeated."),
    ] = None,
    on: Annotated[list[str] | None, typer.Option(help="Another task to score on; may be repeated.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Test examples of each of these other tasks.")] = 200,
    text: Annotated[Path | None, typer.Option(help="General text whose perplexity is measured.")] = None,
    passages: Annotated[int, typer.Option(min=1, help="Passages of it, of two thousand characters.")] = 40,
    prompts: Annotated[
        Path | None, typer.Option(help="Neutral prompts, one on each line; default: forty that come with laserlm.")
    ] = None,
) -> None:
    """Tell what a reduction does beside its task: to general text, to neutral prompts, to other tasks.

    Example: laser analyze side-effects bundled --task worldfacts --reduce 29.v_proj@0.75 --limit 300 --on web-of-lies
    """
    from laserlm.studies.estimates import Estimate
    from laserlm.studies.figures import transfer_figure
    from laserlm.studies.side_effects import neutral_prompts
    from laserlm.tasks.files import read_text

    output.check()
    lines = neutral_prompts() if prompts is None else [x for x in read_text(prompts).splitlines() if x.strip()]
    reader = study.of_other_tasks()
    other = [reader.read(name).test.limit(examples) for name in on or ()]
    passage = None if text is None else reader.read(f"perplexity:{text}").every.limit(passages)
    with ExitStack() as stack:
        first = stack.enter_context(study.pair())
        pairs = [first]
        for run in also or ():
            bare = StudyOptions(what=run, store=study.store, limit=study.limit, batch_size=study.batch_size)
            pairs.append(stack.enter_context(bare.pair()).on(first.lm))
        divergences = {p.intervention: Estimate.mean(_divergence(p, lines)) for p in pairs}
        texts = {} if passage is None else {p.intervention: _on_text(p, passage) for p in pairs}
        cells = _cells(pairs, other)
    effects = [
        {
            "intervention": p.intervention,
            "chosen on": p.base.task,
            "divergence on neutral prompts, nats": divergences[p.intervention],
        }
        | _of_text(texts.get(p.intervention))
        for p in pairs
    ]
    output.show(
        {
            "model": first.model,
            "effects": [
                {
                    "intervention": p.intervention,
                    "chosen_on": p.base.task,
                    "divergence": divergences[p.intervention].as_dict(),
                    "text": texts[p.intervention].as_dict() if texts else None,
                }
                for p in pairs
            ],
            "transfer": [c.as_dict() for c in cells],
        },
        {"transfer": [_row(c) for c in cells]}
        if output.csv
        else {
            f"beside the task, {len(lines)} neutral prompts": effects,
            "chosen on one task, scored on another": [_row(c) for c in cells],
        },
        lines=[] if text is not None else ["Perplexity is measured where a general text is given with --text FILE."],
        figure=lambda: transfer_figure(cells, f"transfer of {first.model}"),
    )


def _divergence(pair: Pair, lines: list[str]) -> list[float]:
    from laserlm.scoring.identity import digest
    from laserlm.studies.side_effects import divergence

    given: Any = {"batch_size": pair.batch_size, "seed": pair.seed}
    with pair.book() as book, bar("comparing predictions", unit="prompts") as advance:
        kept: list[float] = book.remember(
            f"divergence under {pair.intervention} on {digest(lines)}",
            lambda: divergence(pair.lm, lines, pair.intervention, on_batch=advance, **given),
        )
    return kept


def _on_text(pair: Pair, passage: Split) -> OnText:
    from laserlm.studies.side_effects import on_text

    with pair.book(passage) as book:
        return on_text(book(""), book(pair.intervention))


def _of_text(found: OnText | None) -> dict[str, Any]:
    if found is None:
        return {}
    return {"perplexity before": found.before, "after": found.after, "ratio": found.ratio, "passages": found.ratio.n}


def _cells(pairs: list[Pair], other: list[Split]) -> list[Transfer]:
    """Return every intervention on every task, their own and the others, each once."""
    from laserlm.studies.side_effects import transfer

    columns: dict[tuple[str, str, str], Split] = {}
    for split in [*(p.split for p in pairs), *other]:
        columns.setdefault((split.task, split.hash, split.scorer), split)
    cells = []
    with bar("scoring", unit="tasks") as advance:
        for done, split in enumerate(columns.values()):
            advance(done, len(columns), split.task)
            for pair in pairs:
                with pair.book(None if split.hash == pair.split.hash else split) as book:
                    cells.append(transfer(book(""), book(pair.intervention), pair.base.task))
    return cells


def _row(c: Transfer) -> dict[str, Any]:
    names = {"intervention": c.intervention, "chosen on": c.chosen_on, "scored on": c.scored_on, "n": c.gain.n}
    return names | {"before": c.before, "after": c.after, "gain": c.gain, "change of loss": c.loss_change}
