"""Progress bars and messages on stderr.

A bar appears after two seconds. There is none if stderr is not a terminal.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from laserlm.reductions import short_form

if TYPE_CHECKING:
    from laserlm.searching import SearchProgress

__all__ = ["print_stderr", "progress_bar", "search_progress_bar"]

DELAY_SECONDS = 2.0
"""Time before a bar appears."""
stderr = Console(stderr=True, highlight=False)


def print_stderr(text: str) -> None:
    """Print a line on stderr."""
    stderr.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(label: str, unit: str = "examples") -> Iterator[Callable[..., None]]:
    """Yield a function that moves the bar; it takes the work done, the total, a note and the number of items done.

    The rate is that of the items, or of the work done if no number of items is given.
    """
    start = time.monotonic()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )
    row = progress.add_task(label, total=None, count="", rate="", note="")
    timer = threading.Timer(DELAY_SECONDS, progress.start)
    timer.daemon = True
    timer.start()

    def advance(done: float, total: float, note: str = "", items: int | None = None) -> None:
        rate = f"{(done if items is None else items) / max(time.monotonic() - start, 1e-9):.1f} {unit}/s"
        progress.update(row, completed=done, total=total, count=f"{done:.0f}/{total:.0f}", rate=rate, note=note)

    try:
        yield advance
    finally:
        timer.cancel()
        timer.join()  # the timer may be starting the bar at this moment
        progress.stop()


@contextmanager
def search_progress_bar(*, by_loss: bool = False) -> Iterator[Callable[[SearchProgress], None]]:
    """Show the progress of a search and its best candidate so far; print that candidate if the search is interrupted.

    Args:
        by_loss: whether the search ranks by the loss alone, because the model writes nothing before the end.
    """
    best = "no candidate was scored yet"
    with progress_bar("searching") as advance:

        def on_step(step: SearchProgress) -> None:
            nonlocal best
            if step.best is not None:
                low, high = step.best.accuracy_interval
                name = short_form(step.best.intervention) or "the unchanged model"
                accuracy = "" if by_loss else f" {step.best.accuracy:.1%} [{low:.1%}, {high:.1%}],"
                best = f"{name}{accuracy} loss {step.best.loss:.3f}, of {step.best.n}"
            alive = f", {step.alive} alive" if step.stage.startswith("rung") else ""
            advance(step.done, step.total, f"{step.stage}{alive}; best {best}", step.scored)

        try:
            yield on_step
        except KeyboardInterrupt:
            print_stderr(f"Interrupted. Best so far on validation: {best}")
            print_stderr("Run the same command without --restart to resume.")
            raise
