"""The command ``laser``."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from laserlm import __version__
from laserlm.cli import (
    analyze,
    compress,
    doctor,
    evaluate,
    harness,
    lab,
    leaderboard,
    load_check,
    models,
    report,
    reproduce,
    runs,
    save,
    search,
    serve,
    sweep_layers,
    tasks,
)
from laserlm.cli.progress import print_stderr
from laserlm.errors import LaserError
from laserlm.provenance import versions

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command()(models.setup)
app.command()(doctor.doctor)
app.command()(search.demo)
app.command()(models.matrices)
app.command()(evaluate.evaluate)
app.command()(search.search)
app.command()(models.generate)
app.command()(report.report)
app.command("app")(serve.serve)
app.command()(save.save)
app.command()(compress.compress)
app.command()(sweep_layers.sweep_layers)
app.command()(load_check.load_check)
app.command()(reproduce.reproduce)
app.command()(tasks.verify)
app.command("lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    harness.lm_eval
)
app.add_typer(analyze.app, name="analyze")
app.add_typer(tasks.app, name="tasks")
app.add_typer(runs.app, name="runs")
app.add_typer(leaderboard.app, name="leaderboard")
app.add_typer(lab.app, name="lab")
app.command()(doctor.clear_cache)


def print_version(is_requested: bool) -> None:
    """Print the versions and exit, if requested."""
    if is_requested:
        print(f"laser {__version__}")
        print(", ".join(f"{package} {number}" for package, number in versions().items() if package != "laserlm"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the versions of laserlm and its dependencies, and exit.",
            callback=print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Improve a trained transformer by low-rank approximation of its weight matrices (LASER, arXiv 2312.13558)."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 error of laserlm or of a file, 2 usage, 130 interrupted."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger("laserlm").addHandler(handler)
    try:
        app()
    except (LaserError, OSError) as error:
        print_stderr(f"Error: {error}")
        sys.exit(1)
