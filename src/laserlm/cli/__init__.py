"""The command ``laser``."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TextIO

import typer

from laserlm import __version__, interrupt
from laserlm.cli import (
    analyze,
    chat,
    compress,
    demo,
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
from laserlm.cli.numbers import NumberErrorGroup
from laserlm.cli.progress import print_stderr
from laserlm.cli.terminal import escaped_output
from laserlm.errors import LaserError
from laserlm.provenance import versions

__all__ = ["app", "main"]

START, SEARCH, LOOK, SAVE, RESEARCH = "Start", "Search", "Look", "Save", "Research"
"""Groups of the commands in the help."""
app = typer.Typer(cls=NumberErrorGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command(rich_help_panel=START)(models.setup)
app.command(rich_help_panel=START)(doctor.doctor)
app.command(rich_help_panel=START)(demo.demo)
app.command(rich_help_panel=SEARCH)(search.search)
app.command(rich_help_panel=SEARCH)(evaluate.evaluate)
app.command(rich_help_panel=SEARCH)(models.matrices)
app.command(rich_help_panel=LOOK)(report.report)
app.command("app", rich_help_panel=LOOK)(serve.serve)
app.command(rich_help_panel=LOOK)(models.generate)
app.command(rich_help_panel=LOOK)(chat.chat)
app.command(rich_help_panel=SAVE)(save.save)
app.command(rich_help_panel=SAVE)(load_check.load_check)
app.command(rich_help_panel=SAVE)(reproduce.reproduce)
app.command(rich_help_panel=SAVE)(compress.compress)
app.command(rich_help_panel=RESEARCH)(tasks.verify)
app.command(rich_help_panel=RESEARCH)(sweep_layers.sweep_layers)
app.command(
    "lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=RESEARCH,
)(harness.lm_eval)
app.command(rich_help_panel=START)(doctor.clear_cache)
app.add_typer(tasks.app, name="tasks", rich_help_panel=SEARCH)
app.add_typer(runs.app, name="runs", rich_help_panel=LOOK)
app.add_typer(leaderboard.app, name="leaderboard", rich_help_panel=LOOK)
app.add_typer(analyze.app, name="analyze", rich_help_panel=RESEARCH)
app.add_typer(lab.app, name="lab", rich_help_panel=RESEARCH)


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
    with escaped_output():
        _run()


def _run() -> None:
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("laserlm")
    logger.addHandler(handler)
    _expand_home()
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # Ray writes its colours as plain text, which would be escaped
    is_new = interrupt.install()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except SystemExit as error:
        if error.code == interrupt.INTERRUPTED and (interruption := _interruption(error)):
            print_stderr(" ".join(["Interrupted.", *getattr(interruption, "__notes__", ())]))
        raise
    except (LaserError, OSError) as error:
        print_stderr(f"Error: {error}")
        sys.exit(1)
    finally:
        if is_new:
            interrupt.uninstall()
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    """Prints messages on stderr, above a bar that is there."""

    def emit(self, record: logging.LogRecord) -> None:
        print_stderr(self.format(record))


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the Ctrl-C that led to an error, if one did."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _expand_home() -> None:
    """Read ``~`` in paths that the shell left as they are: in variables, in quotes and after ``--option=``."""
    for name in ("LASER_STORE", "LASER_CACHE", "LASER_DATA"):
        if os.environ.get(name, "").startswith("~"):
            os.environ[name] = os.path.expanduser(os.environ[name])
    for i, (before, argument) in enumerate(pairwise(sys.argv), 1):
        option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
        if value.startswith("~/") and (equals or before.startswith("--")):
            sys.argv[i] = option + equals + os.path.expanduser(value)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Say which library warns, and that laserlm goes on."""
    parts = Path(filename).parts
    packages = next((i for i, part in enumerate(parts) if part in ("site-packages", "dist-packages")), None)
    library = "Python" if packages is None else parts[packages + 1].removesuffix(".py")
    library = "laserlm" if "laserlm" in parts else library
    where = f"{category.__name__} at {filename}:{lineno}"
    print_stderr(
        f"Warning of {library}: {message} (the command goes on; check its result, and report this if it is wrong; {where})"
    )
