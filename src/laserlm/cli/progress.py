"""Progress and messages on stderr: two lines with a bar in a terminal, else a line a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

from laserlm.reductions import short_form

if TYPE_CHECKING:
    from laserlm.searching import SearchProgress

DELAY_SECONDS = 0.5
"""Time before a bar appears."""
LOG_SECONDS = 60.0
"""Time between two lines where stderr is no terminal."""
LABEL_WIDTH, BAR_WIDTH = 36, 20
"""Cells of the label and of the bar: with percentage and time they fit into 80."""
stderr = Console(stderr=True, highlight=False)


def print_stderr(text: str) -> None:
    """Print a line on stderr."""
    stderr.print(text, markup=False, soft_wrap=True)


class _Work:
    """How much of a piece of work is done, and how long the rest takes at the same rate."""

    def __init__(self, label: str, unit: str) -> None:
        self.label, self._unit = label, unit
        self.done, self.total, self._items = 0.0, 0.0, 0.0
        self._note = ""
        self._begun = time.monotonic()
        self._first = self._updated = self._begun

    def advance(self, done: float, total: float, note: str = "", items: int | None = None, *, label: str | None = None) -> None:
        """Note how much is done."""
        self._updated = time.monotonic()
        if not self.total:
            self._first = self._updated if items is not None else self._begun
        self.done, self.total, self._note = done, total, note
        self._items = done if items is None else items
        self.label = label or self.label

    @property
    def left(self) -> str:
        """The time that is left, or nothing before it is known."""
        if not 0 < self.done < self.total:
            return ""
        seconds = (self._updated - self._first) * (self.total - self.done) / self.done
        return f"{_clock(max(0.0, seconds - (time.monotonic() - self._updated)))} left"

    @property
    def details(self) -> str:
        """What is done in numbers, after the note."""
        seconds = time.monotonic() - self._begun
        rate = f"{self.done:.0f}/{self.total:.0f}, {self._items / max(seconds, 1e-9):.1f} {self._unit}/s"
        return "; ".join(filter(None, [self._note, rate if self.total else "", f"{_clock(seconds)} so far"]))

    def __str__(self) -> str:
        share = f"{self.done / self.total:.0%}" if self.total else ""
        return f"{self.label}: " + ", ".join(filter(None, [share, self.left, self.details]))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class _TimeLeft(ProgressColumn):
    def __init__(self, work: _Work) -> None:
        super().__init__()
        self._work = work

    def render(self, task: Task) -> Text:
        return Text(self._work.left, style="progress.remaining")


class _Bar(Progress):
    """A bar, and below it the details, which are cut off at the width of the terminal."""

    def __init__(self, work: _Work) -> None:
        label = TextColumn("{task.description}", markup=False, table_column=Column(max_width=LABEL_WIDTH, no_wrap=True))
        columns = (label, BarColumn(BAR_WIDTH), TaskProgressColumn(), _TimeLeft(work))
        self._work = work
        # Else rich puts a stream of its own before stderr, and what escapes control characters escapes the bar's own.
        super().__init__(*columns, console=stderr, transient=True, redirect_stdout=False, redirect_stderr=False)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the two lines."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self._work.details, no_wrap=True, overflow="ellipsis")


@contextmanager
def progress_bar(label: str, unit: str = "examples") -> Iterator[Callable[..., None]]:
    """Yield a function that moves the bar; it takes the work done, the total, a note and the number of items done.

    The rate is that of the items, or of the work done if the number of items is unknown. ``label`` names another phase.
    """
    work = _Work(label, unit)
    if not stderr.is_terminal:
        with _repeated(lambda: print_stderr(str(work))):
            yield work.advance
        return
    bar = _Bar(work)
    row = bar.add_task(label, total=None)
    timer = threading.Timer(DELAY_SECONDS, bar.start)
    timer.daemon = True
    timer.start()

    def advance(done: float, total: float, note: str = "", items: int | None = None, *, label: str | None = None) -> None:
        work.advance(done, total, note, items, label=label)
        bar.update(row, completed=done, total=total or None, description=work.label)

    try:
        yield advance
    finally:
        timer.cancel()
        timer.join()  # the timer may be starting the bar at this moment
        bar.stop()


@contextmanager
def _repeated(call: Callable[[], None]) -> Iterator[None]:
    """Call a function every minute until the end of the block."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(LOG_SECONDS):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def search_progress_bar(*, by_loss: bool = False) -> Iterator[Callable[[SearchProgress], None]]:
    """Show the stages and the progress of a search and its best candidate so far, also where it is interrupted.

    Args:
        by_loss: whether the search ranks by the loss alone, because the model writes nothing before the end.
    """
    best = "no candidate was scored yet"
    with progress_bar("search: preparing") as advance:

        def on_step(step: SearchProgress) -> None:
            nonlocal best
            if step.best is not None:
                low, high = step.best.accuracy_interval
                name = short_form(step.best.intervention) or "the unchanged model"
                accuracy = "" if by_loss else f" {step.best.accuracy:.1%} [{low:.1%}, {high:.1%}],"
                best = f"{name}{accuracy} loss {step.best.loss:.3f}, of {step.best.n}"
            alive = f"{step.alive} alive; " if step.stage.startswith("rung") else ""
            advance(step.done, step.total, f"{alive}best {best}", step.scored, label=f"search: {step.stage}")

        try:
            yield on_step
        except KeyboardInterrupt as interruption:
            interruption.add_note(f"Best so far on validation: {best}.")
            interruption.add_note("Run the same command without --restart to resume.")
            raise
