"""``laser analyze controls``: change the same matrices by the same amount in other ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import progress_bar

if TYPE_CHECKING:
    from laserlm.studies.controls import Control


@with_options(study=StudyOptions, output=Output)
def controls(
    study: StudyOptions,
    output: Output,
    draws: Annotated[int, typer.Option(min=1, help="Draws of each random control.")] = 3,
) -> None:
    """Change the same matrices by the same amount in other ways: does low rank help because it is low rank?

    Example: laser analyze controls bundled --task worldfacts --reduce 29.v_proj@0.75 --limit 300
    """
    from laserlm.studies.controls import controls as controls_
    from laserlm.studies.figures import controls_figure

    output.check()
    with study.pair() as pair, pair.scorer() as scorer, progress_bar("scoring controls", unit="models") as advance:
        rows = controls_(pair.lm, pair.intervention, scorer, draws=draws, seed=pair.seed, on_model=advance)
    output.show(
        {**pair.description, "controls": rows},
        {f"{pair.title}: its controls, n {pair.base.n}": [_row(c) for c in rows]},
        figure=lambda: controls_figure(rows, pair.title),
    )


def _row(c: Control) -> dict[str, Any]:
    from laserlm.studies.estimates import Estimate

    return {
        "control": c.control,
        "draws": c.draws,
        "size": c.size,
        "accuracy": c.accuracy,
        "gain": Estimate(c.gain, c.interval, c.n),
        "worst draw": c.min_gain,
        "best draw": c.max_gain,
        "behind": Estimate(c.deficit, c.deficit_interval, c.n),
        "change of loss": Estimate(c.loss_change, c.loss_interval, c.n),
    }
