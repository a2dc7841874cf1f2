"""A progress bar on stderr for what takes more than two seconds; nothing where stderr is no terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
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
