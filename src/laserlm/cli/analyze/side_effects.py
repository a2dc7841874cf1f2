"""``laser analyze side-effects``: effects of a reduction on text, prompts and other tasks."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import ModelPair, Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import progress_bar
from laserlm.reductions import short_form

if TYPE_CHECKING:
    from laserlm.studies.side_effects import OnText, Transfer
    from laserlm.tasks import Split


@with_options(study=StudyOptions, output=Output)
def side_effects(
    study: StudyOptions,
    output: Output,
    also: Annotated[
        list[str] | None,
        typer.Option("--with", help="Another search's run, same model and scorer; may be repeated."),
    ] = None,
    on: Annotated[list[str] | None, typer.Option(help="Another task to score on; may be repeated.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Test examples of each of these other tasks.")] = 200,
    text: Annotated[Path | None, typer.Option(help="General text whose perplexity is measured.")] = None,
    passages: Annotated[int, typer.Option(min=1, help="Passages of it, of two thousand characters.")] = 40,
    prompts: Annotated[
        Path | None, typer.Option(help="Neutral prompts, one on each line; default: forty that come with laserlm.")
    ] = None,
) -> None:
    """Measure side effects of a reduction: on general text, on neutral prompts and on other tasks.

    Example: laser analyze side-effects bundled --task worldfacts --reduce 29.v_proj@0.75 --limit 300 --on web-of-lies
    """
    from laserlm.studies.estimates import Estimate
    from laserlm.studies.figures import transfer_figure
    from laserlm.studies.side_effects import neutral_prompts
    from laserlm.tasks.files import read_text

    output.check()
    lines = neutral_prompts() if prompts is None else [x for x in read_text(prompts).splitlines() if x.strip()]
    reader = study.data_options()
    other = [reader.load_task(name).test.limit(examples) for name in on or ()]
    passage = None if text is None else reader.load_task(f"perplexity:{text}").every.limit(passages)
    with ExitStack() as stack:
        first = stack.enter_context(study.pair())
        pairs = [first]
        for run in also or ():
            bare = StudyOptions(run_or_model=run, store=study.store, limit=study.limit, batch_size=study.batch_size)
            pairs.append(stack.enter_context(bare.pair()).with_model(first.lm))
        divergences = {p.intervention: Estimate.mean(_divergence(p, lines)) for p in pairs}
        texts = {} if passage is None else {p.intervention: _on_text(p, passage) for p in pairs}
        cells = _cells(pairs, other)
    effects = [
        {
            "intervention": p.intervention,
            "chosen_on": p.base.task,
            "divergence": divergences[p.intervention],
            "text": texts.get(p.intervention),
        }
        for p in pairs
    ]
    rows = [_effect_row(effect) for effect in effects]
    transfers = [_transfer_row(c) for c in cells]
    tables = {f"on {len(lines)} neutral prompts": rows, "chosen on one task, scored on another": transfers}
    output.show(
        {"model": first.model, "effects": effects, "transfer": cells},
        {"transfer": transfers} if output.csv else tables,
        lines=[] if text is not None else ["Add a general text with --text FILE to measure its perplexity."],
        figure=lambda: transfer_figure(cells, f"transfer of {first.model}"),
    )


def _divergence(pair: ModelPair, lines: list[str]) -> list[float]:
    from laserlm.scoring.identity import digest
    from laserlm.studies.side_effects import divergence

    with pair.scorer() as scorer, progress_bar("comparing predictions", unit="prompts") as advance:
        divergences: list[float] = scorer.cached(
            f"divergence under {pair.intervention} on {digest(lines)}",
            lambda: divergence(pair.lm, lines, pair.intervention, batch_size=pair.batch_size, seed=pair.seed, on_batch=advance),
        )
    return divergences


def _on_text(pair: ModelPair, passage: Split) -> OnText:
    from laserlm.studies.side_effects import on_text

    with pair.scorer(passage) as scorer:
        return on_text(scorer(""), scorer(pair.intervention))


def _effect_row(effect: dict[str, Any]) -> dict[str, Any]:
    names = {
        "intervention": "intervention",
        "chosen_on": "chosen on",
        "divergence": "divergence on neutral prompts, nats",
    }
    shown = {**effect, "intervention": short_form(effect["intervention"])}
    return {column: shown[name] for name, column in names.items()} | _text_columns(effect["text"])


def _text_columns(effect: OnText | None) -> dict[str, Any]:
    if effect is None:
        return {}
    return {"perplexity before": effect.base, "after": effect.edited, "ratio": effect.ratio, "passages": effect.ratio.n}


def _cells(pairs: list[ModelPair], other: list[Split]) -> list[Transfer]:
    """Score every intervention on every task, its own and the others, each once."""
    from laserlm.studies.side_effects import transfer

    columns: dict[tuple[str, str, str], Split] = {}
    for split in [*(p.split for p in pairs), *other]:
        columns.setdefault((split.task, split.hash, split.scorer), split)
    cells = []
    with progress_bar("scoring", unit="tasks") as advance:
        for done, split in enumerate(columns.values()):
            advance(done, len(columns), split.task)
            for pair in pairs:
                with pair.scorer(None if split.hash == pair.split.hash else split) as scorer:
                    cells.append(transfer(scorer(""), scorer(pair.intervention), pair.base.task))
    return cells


def _transfer_row(c: Transfer) -> dict[str, Any]:
    names = {"intervention": short_form(c.intervention), "chosen on": c.chosen_on, "scored on": c.scored_on, "n": c.gain.n}
    return names | {"before": c.base, "after": c.edited, "gain": c.gain, "change of loss": c.loss_change}
