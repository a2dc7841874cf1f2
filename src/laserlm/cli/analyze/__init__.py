"""Commands that study a model, a reduction and what it changed: a module for each."""

from __future__ import annotations

import typer

from laserlm.cli.analyze import controls, flips, matrices

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Study a model, a reduction, and what it changed.")
app.command()(flips.flips)
app.command()(controls.controls)
app.command()(matrices.matrices)
