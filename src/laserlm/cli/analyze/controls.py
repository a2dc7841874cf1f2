"""The command that changes the same matrices by as much in other ways."""

from __future__ import annotations

from typing import Annotated

import typer

from laserlm.cli.analyze.study import Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import bar


@with_options(study=StudyOptions, output=Output)
def controls(
    study: StudyOptions,
    output: Output,
    draws: Annotated[int, typer.Option(min=1, help="Number of times that what is random is drawn.")] = 3,
) -> None:
    """Change the same matrices by as much in other ways: does low rank help because it is low rank?

    Example: laser analyze controls bundled --task worldfacts --reduce 29.v_proj@0.75 --limit 300
    """
    from laserlm.analysis.controls import controls as controls_
    from laserlm.analysis.figures import controls_figure

    output.check()
    with study.pair() as pair, pair.book() as score, bar("scoring controls", unit="models") as advance:
        found = controls_(pair.lm, pair.intervention, score, draws=draws, seed=pair.seed, on_model=advance)
    rows = [c.as_dict() for c in found]
    flat = []
    for row in rows:
        ends: dict[str, float | None] = {}
        for name in ("interval", "behind_interval", "loss_interval"):
            low, high = row[name] or (None, None)
            short = name.removesuffix("interval")
            ends |= {f"{short}low": low, f"{short}high": high}
        flat.append({key: value for key, value in row.items() if not key.endswith("interval")} | ends)
    output.show(
        {**pair.about, "controls": rows},
        {f"{pair.title}: its controls": flat},
        figure=lambda: controls_figure(found, pair.title),
    )
