"""The command that scores other ranks, and maps what a search measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import bar

if TYPE_CHECKING:
    from laserlm.studies.rank_curve import LossAtRank, Point


@with_options(study=StudyOptions, output=Output)
def low_rank(
    study: StudyOptions,
    output: Output,
    ranks: Annotated[str, typer.Option(help="Ranks to score, by commas; those that a matrix has not are left out.")] = (
        "40,30,20,10,5,1,0"
    ),
    rhos: Annotated[str | None, typer.Option(help="Kept fractions to score, by commas; default: ten from 1 to 0.")] = None,
    map_: Annotated[
        bool, typer.Option("--map", help="Instead show what a search measured of every matrix, without running anything.")
    ] = False,
) -> None:
    """Score the chosen matrices at other ranks; or map what a search measured, by layer and matrix.

    Example: laser analyze low-rank bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.errors import AnalysisError
    from laserlm.studies.figures import rank_curve_figure
    from laserlm.studies.rank_curve import RHOS, rank_curve, sizes_of

    output.check()
    if map_ and (study.reduce or study.limit or rhos):
        raise AnalysisError("a map is of all that a search measured; leave out --reduce, --limit and --rhos")
    if map_:
        _show_map(study, output)
        return
    try:
        wanted = [int(r) for r in ranks.split(",") if r.strip()]
    except ValueError:
        raise AnalysisError(f"cannot read the ranks {ranks!r}; write whole numbers by commas, such as 40,20,1") from None
    fractions = RHOS if rhos is None else tuple(map(str, sizes_of([r for r in rhos.split(",") if r.strip()])))
    with study.pair() as pair, pair.book() as book, bar("scoring ranks", unit="ranks") as advance:
        points = rank_curve(pair.intervention, book, ranks=wanted, rhos=fractions, on_point=advance)
    output.show(
        {**pair.about, "points": [p.as_dict() for p in points]},
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
    from laserlm.errors import AnalysisError
    from laserlm.store import Store as Results
    from laserlm.studies.figures import map_figure
    from laserlm.studies.rank_curve import loss_map

    with Results.open(study.store) as results:
        info = study.find(results)
        trials = results.evaluations(info.id, "validation")
    if "" not in trials:
        raise AnalysisError(f"run {info.id} has not scored the unchanged model; finish it with the same 'laser search'")
    base = trials.pop("")
    found = loss_map(base, trials)
    title = f"change of loss on {base.task}, validation, by run {info.id}"
    output.show(
        {"run": info.id, "model": info.model, "task": info.task, "measured": [m.as_dict() for m in found]},
        {title: [_flat(m) for m in found] if output.csv else _lowest(found)},
        lines=[
            f"{len(found)} reductions of one matrix: the lowest change of loss of each layer and matrix, its size, the number",
            "of examples. They are validation examples, on which a search chooses: the lowest of many is higher on others.",
        ],
        figure=lambda: map_figure(found, title),
    )


def _flat(m: LossAtRank) -> dict[str, Any]:
    start = {"matrix": m.matrix, "layer": m.layer, "name": m.name, "size": m.size, "n": m.gain.n}
    return start | {"gain": m.gain, "change of loss": m.loss_change}


def _lowest(found: list[LossAtRank]) -> list[dict[str, Any]]:
    """Return a row for each layer: the lowest change of loss of each of its matrices."""
    names = list(dict.fromkeys((m.stack, m.name) for m in found))
    rows = []
    for stack, layer in dict.fromkeys((m.stack, m.layer) for m in found):
        row: dict[str, Any] = {"layer": f"{stack}.{layer}" if stack else str(layer)}
        for of_stack, name in names:
            sizes = [m for m in found if (m.stack, m.layer, m.name) == (stack, layer, name) and of_stack == stack]
            best = min(sizes, key=lambda m: m.loss_change.value, default=None)
            text = None if best is None else f"{best.loss_change.value:+.3f} @{best.size} ({best.gain.n})"
            row[f"{of_stack}.{name}" if of_stack else name] = text
        rows.append(row)
    return rows
