"""A progress bar on stderr for what takes more than two seconds; nothing where stderr is no terminal."""

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

if TYPE_CHECKING:
    from laserlm.searching import SearchProgress

__all__ = ["bar", "say", "searching_bar"]

PATIENCE_SECONDS = 2.0
errors = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print a line on stderr."""
    errors.print(text, markup=False, soft_wrap=True)


@contextmanager
def bar(what: str, unit: str = "examples") -> Iterator[Callable[..., None]]:
    """Yield a function to call with the work done, its total, a note to show and the number of items, if that is another.

    The bar appears by itself after two seconds, also where nothing has been told yet.
    """
    begun = time.monotonic()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    shown = progress.add_task(what, total=None, count="", rate="", note="")
    appearance = threading.Timer(PATIENCE_SECONDS, progress.start)
    appearance.daemon = True
    appearance.start()

    def advance(done: float, total: float, note: str = "", items: int | None = None) -> None:
        rate = f"{(done if items is None else items) / max(time.monotonic() - begun, 1e-9):.1f} {unit}/s"
        progress.update(shown, completed=done, total=total, count=f"{done:.0f}/{total:.0f}", rate=rate, note=note)

    try:
        yield advance
    finally:
        appearance.cancel()
        appearance.join()  # it may be at it just now
        progress.stop()


@contextmanager
def searching_bar() -> Iterator[Callable[[SearchProgress], None]]:
    """Show where a search stands as a progress bar, and the best so far where it is interrupted."""
    best = "no candidate was scored yet"
    with bar("searching", "examples") as advance:

        def on_step(step: SearchProgress) -> None:
            nonlocal best
            if step.best is not None:
                low, high = step.best.accuracy_interval
                name = step.best.intervention or "the unchanged model"
                best = f"{name} {step.best.accuracy:.1%} [{low:.1%}, {high:.1%}], loss {step.best.loss:.3f}, of {step.best.n}"
            alive = f", {step.alive} alive" if step.stage.startswith("rung") else ""
            advance(step.done, step.total, f"{step.stage}{alive}; best {best}", step.scored)

        try:
            yield on_step
        except KeyboardInterrupt:
            say(f"interrupted; best so far on validation: {best}")
            say("the same command (without --restart) goes on where this one stopped")
            raise
