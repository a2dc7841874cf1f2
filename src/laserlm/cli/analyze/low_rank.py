"""``laser analyze low-rank``: score other ranks, or show the loss map of a search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import progress_bar

if TYPE_CHECKING:
    from laserlm.studies.loss_map import LossAtRank, LossMap
    from laserlm.studies.rank_curve import Point


@with_options(study=StudyOptions, output=Output)
def low_rank(
    study: StudyOptions,
    output: Output,
    ranks: Annotated[str, typer.Option(help="Ranks to score, separated by commas.")] = ("40,30,20,10,5,1,0"),
    rhos: Annotated[str | None, typer.Option(help="Kept fractions to score, by commas; default: ten from 1 to 0.")] = None,
    map_: Annotated[bool, typer.Option("--map", help="Show the loss map of a search instead.")] = False,
) -> None:
    """Score the chosen matrices at other ranks, or show the loss map of a search by layer and matrix.

    Ranks above the maximum of a matrix are left out. --map runs no model.

    Example: laser analyze low-rank bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.errors import AnalysisError
    from laserlm.studies.figures import rank_curve_figure
    from laserlm.studies.rank_curve import RHOS, rank_curve, sizes_of

    output.check()
    if map_ and (study.reduce or study.limit or rhos):
        raise AnalysisError("--map shows all that a search measured. Leave out --reduce, --limit and --rhos.")
    if map_:
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


def _show_map(study: StudyOptions, output: Output) -> None:
    from laserlm.store import Store as Results
    from laserlm.studies.figures import map_figure
    from laserlm.studies.loss_map import LossMap

    with Results.open(study.store, create=False) as results:
        info = study.find_run(results)
        loss_map = LossMap.read(results, info.id)
    title = f"change of loss on {info.task}, validation, by run {info.id}"
    output.show(
        {"run": info.id, "model": info.model, "task": info.task, "measured": loss_map.cells},
        {title: [_cell_row(m) for m in loss_map] if output.csv else _lowest(loss_map)},
        lines=[
            f"{len(loss_map)} reductions of one matrix. A cell is the lowest change of loss of a matrix, its size and the",
            "number of examples. These are validation examples; the best of many candidates will look worse on new ones.",
        ],
        figure=lambda: map_figure(loss_map, title),
    )


def _cell_row(m: LossAtRank) -> dict[str, Any]:
    start = {"matrix": m.matrix, "layer": m.layer, "name": m.name, "size": m.size, "n": m.gain.n}
    return start | {"gain": m.gain, "change of loss": m.loss_change}


def _lowest(loss_map: LossMap) -> list[dict[str, Any]]:
    """Return a row for each layer: the lowest change of loss of each of its matrices."""
    table = loss_map.table(loss_map.lowest())
    return [
        {"layer": layer}
        | {
            name: None if m is None else f"{m.loss_change.value:+.3f} @{m.size} ({m.gain.n})"
            for name, m in zip(table.columns, cells, strict=True)
        }
        for layer, cells in table.rows
    ]
