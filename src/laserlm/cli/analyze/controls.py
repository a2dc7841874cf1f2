"""The command that changes the same matrices by as much in other ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import bar

if TYPE_CHECKING:
    from laserlm.studies.controls import Control


@with_options(study=StudyOptions, output=Output)
def controls(
    study: StudyOptions,
    output: Output,
    draws: Annotated[int, typer.Option(min=1, help="Number of times that what is random is drawn.")] = 3,
) -> None:
    """Change the same matrices by as much in other ways: does low rank help because it is low rank?

    Example: laser analyze controls bundled --task worldfacts --reduce 29.v_proj@0.75 --limit 300
    """
    from laserlm.studies.controls import controls as controls_
    from laserlm.studies.figures import controls_figure

    output.check()
    with study.pair() as pair, pair.book() as score, bar("scoring controls", unit="models") as advance:
        found = controls_(pair.lm, pair.intervention, score, draws=draws, seed=pair.seed, on_model=advance)
    output.show(
        {**pair.about, "controls": [c.as_dict() for c in found]},
        {f"{pair.title}: its controls, n {pair.base.n}": [_row(c) for c in found]},
        figure=lambda: controls_figure(found, pair.title),
    )


def _row(c: Control) -> dict[str, Any]:
    from laserlm.studies.estimates import Estimate

    return {
        "control": c.control,
        "draws": c.draws,
        "size": c.size,
        "accuracy": c.accuracy,
        "gain": Estimate(c.gain, c.interval, c.n),
        "worst draw": c.least,
        "best draw": c.most,
        "behind": Estimate(c.behind, c.behind_interval, c.n),
        "change of loss": Estimate(c.loss_change, c.loss_interval, c.n),
    }
