"""``laser analyze points``: test points of a search's list of gain against harm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import progress_bar
from laserlm.reductions import short_form

if TYPE_CHECKING:
    from laserlm.studies.points import MeasuredPoint


@with_options(study=StudyOptions, output=Output)
def points(
    study: StudyOptions,
    output: Output,
    point: Annotated[list[int] | None, typer.Option(min=1, help="Number of a point; may be repeated. Default: all.")] = None,
    guard: Annotated[list[str] | None, typer.Option(help="The search's guards again, if they were files.")] = None,
) -> None:
    """Test points of a search's list of gain against harm on its test split, with intervals that hold for all together.

    Example: laser analyze points last --point 1 --point 2
    """
    from laserlm.errors import AnalysisError
    from laserlm.searching.result import SearchResult
    from laserlm.studies.points import guards_of_run, measure_points, numbered_points

    output.check()
    if study.reduce:
        raise AnalysisError("points are of a search; give its run and leave out --reduce")
    with study.open_store() as results:
        info = study.find_run(results)
        pair = study.pair_of_run(results, info, needs_choice=False)
        result = SearchResult.from_dict((info.outcome or {}) | {"run": info.id})
        numbers = numbered_points(result, point or [])
        guards = guards_of_run(pair.lm, info.settings.get("guards", []), pair.seed, guard)
        with pair.scorer() as scorer, progress_bar("testing points", unit="points") as advance:
            tested = measure_points(
                *(pair.lm, numbers, pair.intervention, scorer, guards), batch_size=pair.batch_size, on_point=advance
            )
    title = f"{info.task}, {pair.base.split}: {len(tested)} points tested, n {pair.base.n}"
    output.show(
        {**pair.description, "run": info.id, "points": tested},
        {title: [_row(t) for t in tested]},
        lines=[f"In each column the intervals and p-values hold for all {len(tested)} points. The chosen point always counts."],
    )


def _row(tested: MeasuredPoint) -> dict[str, Any]:
    from laserlm.studies.estimates import Estimate

    c = tested.comparison
    row = {
        "point": f"{tested.number or ''}{' (chosen)' if tested.is_chosen else ''}".strip(),
        "reduction": short_form(tested.intervention),
        "gain": Estimate(c.gain, c.interval, c.n),
        "p": tested.p,
        "change of loss": Estimate(c.edited_loss - c.base_loss, c.loss_interval, c.n),
    }
    return row | {f"{h.measure}, {h.guard}": Estimate(h.ratio, h.interval, h.comparison.n) for h in tested.harms}
