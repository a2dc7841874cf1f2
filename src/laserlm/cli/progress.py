"""A progress bar on stderr for what takes more than two seconds; nothing where stderr is no terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["bar", "say"]

PATIENCE_SECONDS = 2.0
errors = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print a line on stderr."""
    errors.print(text, markup=False, soft_wrap=True)


@contextmanager
def bar(what: str, unit: str = "examples") -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function to call with the number of items done, their total and a note to show beside them.

    The bar appears by itself after two seconds, also where nothing has been told yet.
    """
    begun = time.monotonic()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    shown = progress.add_task(what, total=None, rate="", note="")
    appearance = threading.Timer(PATIENCE_SECONDS, progress.start)
    appearance.daemon = True
    appearance.start()

    def advance(done: int, total: int, note: str = "") -> None:
        rate = f"{done / max(time.monotonic() - begun, 1e-9):.1f} {unit}/s"
        progress.update(shown, completed=done, total=total, rate=rate, note=note)

    try:
        yield advance
    finally:
        appearance.cancel()
        appearance.join()  # it may be at it just now
        progress.stop()
