"""Commands that study a model and what a reduction changes, one module for each."""

from __future__ import annotations

import typer

from laserlm.cli.analyze import (
    calibration,
    components,
    controls,
    flips,
    frequency,
    generations,
    low_rank,
    matrices,
    paraphrases,
    points,
    side_effects,
    terms,
)

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Study a model, a reduction, and what it changed.")
app.command()(flips.flips)
app.command()(paraphrases.paraphrases)
app.command()(frequency.frequency)
app.command()(calibration.calibration)
app.command()(generations.generations)
app.command()(terms.terms)
app.command()(controls.controls)
app.command()(components.components)
app.command()(points.points)
app.command("low-rank")(low_rank.low_rank)
app.command("side-effects")(side_effects.side_effects)
app.command()(matrices.matrices)
