"""``laser analyze low-rank``: score other ranks, or show the loss map of a search."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import progress_bar

if TYPE_CHECKING:
    from laserlm.studies.loss_map import LossAtRank, LossMap, LossTable
    from laserlm.studies.rank_curve import Point


@with_options(study=StudyOptions, output=Output)
def low_rank(
    study: StudyOptions,
    output: Output,
    ranks: Annotated[str, typer.Option(help="Ranks to score, separated by commas.")] = ("40,30,20,10,5,1,0"),
    rhos: Annotated[str | None, typer.Option(help="Kept fractions to score, by commas; default: ten from 1 to 0.")] = None,
    map_: Annotated[bool, typer.Option("--map", help="Show the loss map of a search instead.")] = False,
    harm: Annotated[bool, typer.Option("--harm", help="With --map: measure harm of each matrix's lowest cell.")] = False,
    guard: Annotated[list[str] | None, typer.Option(help="With --harm: the search's guards again, if files.")] = None,
) -> None:
    """Score the chosen matrices at other ranks, or show the loss map of a search by layer and matrix.

    Ranks above the maximum of a matrix are left out. --map runs no model, unless --harm asks for harm on the search's guards.

    Example: laser analyze low-rank bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.errors import AnalysisError
    from laserlm.studies.figures import rank_curve_figure
    from laserlm.studies.rank_curve import RHOS, rank_curve, sizes_of

    output.check()
    if map_ and (study.reduce or study.limit or rhos):
        raise AnalysisError("--map shows all that a search measured. Leave out --reduce, --limit and --rhos.")
    if (harm and not map_) or (guard and not harm):
        raise AnalysisError("--harm measures what the loss map of a search shows, on its guards. Write --map --harm.")
    if map_:
        if harm:
            _measure_harm(study, guard)
        _show_map(study, output)
        return
    try:
        wanted = [int(r) for r in ranks.split(",") if r.strip()]
    except ValueError:
        raise AnalysisError(f"cannot read the ranks {ranks!r}; write whole numbers by commas, such as 40,20,1") from None
    fractions = RHOS if rhos is None else tuple(map(str, sizes_of([r for r in rhos.split(",") if r.strip()])))
    with study.pair() as pair, pair.scorer() as scorer, progress_bar("scoring ranks", unit="ranks") as advance:
        points = rank_curve(pair.intervention, scorer, ranks=wanted, rhos=fractions, on_point=advance)
    output.show(
        {**pair.description, "points": points},
        {f"{pair.title}: other ranks, n {pair.base.n}": [_row(p) for p in points]},
        figure=lambda: rank_curve_figure(points, pair.title),
    )


def _row(p: Point) -> dict[str, Any]:
    kept = sorted(set(p.ranks.values()))
    return {
        "size": p.size + (" (chosen)" if p.chosen else ""),
        "rank": str(kept[0]) if len(kept) == 1 else f"{kept[0]} to {kept[-1]}",
        "accuracy": p.accuracy,
        "gain": p.gain,
        "loss": p.loss,
        "change of loss": p.loss_change,
    }


def _measure_harm(study: StudyOptions, guard: list[str] | None) -> None:
    """Measure the harm of the lowest cell of each matrix on the guards of the search, where it is not measured."""
    from laserlm.cli.progress import print_stderr
    from laserlm.errors import AnalysisError
    from laserlm.reductions import short_form
    from laserlm.store import Store as Results
    from laserlm.studies.loss_map import LossMap
    from laserlm.studies.map_harms import measure_map_harms
    from laserlm.studies.points import guards_of_run

    with Results.open(study.store, create=False) as results:
        info = study.find_run(results)
        if not info.settings.get("guards"):
            raise AnalysisError(
                f"run {info.id} has no guard to measure harm on; search again with --guard FILE or --guard TASK"
            )
        wanted = [m.intervention for m in LossMap.read(results, info.id).lowest() if m.harm is None]
        if not wanted:
            print_stderr("the harm of the lowest cell of each matrix is measured already")
            return
        lm = study.load_model_of(info)
        guards = guards_of_run(lm, info.settings.get("guards", ()), int(info.settings.get("seed", 0)), guard)
        n = sum(len(guard.choosing.split) for guard in guards)
        print_stderr(
            f"measuring the harm of {len(wanted)} reductions: {n * (1 + len(wanted)):,} passes at most, each of one passage or "
            f"question of {', '.join(guard.name for guard in guards)}"
        )
        with progress_bar("measuring harm", unit="passes") as advance:
            failed = measure_map_harms(lm, results, info, guards, wanted, batch_size=study.batch_size, on_scored=advance)
        for text, reason in failed.items():
            print_stderr(f"the harm of {short_form(text)} could not be measured: {reason}")


def _show_map(study: StudyOptions, output: Output) -> None:
    from laserlm.store import Store as Results
    from laserlm.studies.figures import map_figure
    from laserlm.studies.loss_map import LossMap

    with Results.open(study.store, create=False) as results:
        info = study.find_run(results)
        loss_map = LossMap.read(results, info.id)
    title = f"change of loss on {info.task}, validation, by run {info.id}"
    measured = loss_map.with_harm()
    is_complete = not info.settings.get("guards") or all(m.harm for m in loss_map.lowest())
    more = "" if is_complete else "; --harm measures more"
    tables = {title: [_cell_row(m) for m in loss_map] if output.csv else _lowest(loss_map)}
    if measured and not output.csv:
        names = ", ".join(sorted({m.guard for m in measured}))
        title_of_harm = f"harm on {names}: change of loss in nats per token; of each matrix the lowest cell with a harm"
        tables[title_of_harm] = _lowest_with_harm(loss_map)
    output.show(
        {"run": info.id, "model": info.model, "task": info.task, "measured": loss_map.cells},
        tables,
        lines=[
            f"{len(loss_map)} reductions of one matrix. A cell is the lowest change of loss of a matrix, its size and the",
            "number of examples. These are validation examples; the best of many candidates will look worse on new ones.",
            f"Harm is measured for {len(measured)} of them{more}.",
        ],
        figure=lambda: map_figure(loss_map, title),
    )


def _cell_row(m: LossAtRank) -> dict[str, Any]:
    start = {"matrix": m.matrix, "layer": m.layer, "name": m.name, "size": m.size, "n": m.gain.n}
    low, high = m.harm.interval if m.harm else (None, None)
    harm = {"harm": m.harm.value if m.harm else None, "harm low": low, "harm high": high, "guard": m.guard}
    return start | {"gain": m.gain, "change of loss": m.loss_change} | harm


def _lowest(loss_map: LossMap) -> list[dict[str, Any]]:
    """Return a row for each layer: the lowest change of loss of each of its matrices."""
    table = loss_map.table(loss_map.lowest())
    return _rows(table, lambda m: f"{m.loss_change.value:+.3f} @{m.size} ({m.gain.n})")


def _lowest_with_harm(loss_map: LossMap) -> list[dict[str, Any]]:
    """Return a row for each layer: of each matrix the harm of the lowest cell whose harm is measured."""
    table = loss_map.table(loss_map.with_harm().lowest())
    return _rows(table, lambda m: "" if m.harm is None else f"{m.harm.value:+.3f} @{m.size} ({m.harm.n})")


def _rows(table: LossTable, cell: Callable[[LossAtRank], str]) -> list[dict[str, Any]]:
    return [
        {"layer": layer} | {name: None if m is None else cell(m) for name, m in zip(table.columns, cells, strict=True)}
        for layer, cells in table.rows
    ]
