"""Trackers: a search reports its options, its progress and its result to trackio, wandb, mlflow or tensorboard."""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from laserlm.errors import LaserError, MissingExtraError
from laserlm.reductions import short_form

if TYPE_CHECKING:
    from laserlm.searching import SearchProgress, SearchResult
    from laserlm.searching.guard import Harm

log = logging.getLogger("laserlm.tracking")
PROJECT = "laserlm"
"""Project, or experiment, unless the tracker's own environment variable names another one."""
LOG_SECONDS = 1.0
"""Time between two reports of the same best candidate."""
NOT_ALLOWED = re.compile(r"[^\w\-. /]")
"""Characters that mlflow takes in no name of a metric."""


class Tracker(Protocol):
    """Where a search reports to. Every method may raise any exception of its library."""

    def begin(self, options: Mapping[str, Any]) -> None:
        """Begin a run with the options of the search."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Report figures; the step is the number of examples scored so far."""

    def end(self, texts: Mapping[str, str], *, failed: bool) -> None:
        """End the run; the texts say what was found, and are empty for a search that failed."""


class _Wandb:
    """wandb, and trackio, which has the same functions."""

    def __init__(self, library: Any, project: str | None) -> None:
        self._library, self._project = library, project or PROJECT

    def begin(self, options: Mapping[str, Any]) -> None:
        self._run = self._library.init(project=self._project, config=dict(options))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._library.log(dict(figures), step=step)

    def end(self, texts: Mapping[str, str], *, failed: bool) -> None:
        if hasattr(self._run, "summary"):  # trackio has none
            self._run.summary.update(dict(texts))
            self._library.finish(exit_code=int(failed))
        else:
            try:
                self._library.log({"failed": int(failed), **texts})
            finally:
                self._library.finish()


class _Mlflow:
    def __init__(self, library: Any) -> None:
        self._library = library

    def begin(self, options: Mapping[str, Any]) -> None:
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            self._library.set_experiment(PROJECT)
        self._library.start_run()
        self._library.log_params(dict(options))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._library.log_metrics(dict(figures), step=step)

    def end(self, texts: Mapping[str, str], *, failed: bool) -> None:
        try:
            self._library.set_tags(dict(texts))
        finally:
            self._library.end_run("FAILED" if failed else "FINISHED")


class _TensorBoard:
    def __init__(self, library: Any) -> None:
        self._library = library

    def begin(self, options: Mapping[str, Any]) -> None:
        self._writer = self._library.SummaryWriter()
        self._add_texts({f"options/{name}": str(value) for name, value in options.items()})

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def end(self, texts: Mapping[str, str], *, failed: bool) -> None:
        self._add_texts(texts)
        self._writer.close()

    def _add_texts(self, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._writer.add_text(name, text)


TRACKERS: Mapping[str, tuple[str, Callable[[Any], Tracker]]] = {
    "trackio": ("trackio", lambda library: _Wandb(library, os.environ.get("TRACKIO_PROJECT"))),
    "wandb": ("wandb", lambda library: _Wandb(library, os.environ.get("WANDB_PROJECT"))),
    "mlflow": ("mlflow", _Mlflow),
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
}
"""The module of each tracker, and what reports to it."""


def tracker(name: str) -> Tracker:
    """Return the tracker of a name; its package is imported.

    Raises:
        typer.BadParameter: if there is no such tracker.
        MissingExtraError: if its package is not installed.
    """
    if name not in TRACKERS:
        raise typer.BadParameter(f"no tracker {name!r}; there are {', '.join(TRACKERS)}", param_hint="--track")
    module, reporter = TRACKERS[name]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"--track {name} needs a package ({error}): pip install 'laserlm[{name}]'; or leave out --track"
        ) from error
    return reporter(library)


class TrackedSearch:
    """Reports one search to a tracker.

    A search takes hours, so it does not end because a tracker does: what fails after the beginning is warned of once, and the
    rest is not reported. The tracker's run is ended as failed, if that still works.

    Args:
        to: the tracker; None reports nothing.
        by_loss: whether the search ranks by the loss alone, so that the accuracy of candidates means nothing.
    """

    def __init__(self, to: Tracker | None, *, by_loss: bool = False) -> None:
        self._tracker = to
        self._by_loss = by_loss
        self._reported: tuple[Any, str] = (None, "")
        self._time = -math.inf
        self._unreported: dict[str, float] = {}
        self._step = 0

    def on_step(self, progress: SearchProgress) -> None:
        """Report the best candidate so far and the work: where one of them or the stage is new, and once a second."""
        self._step = max(self._step, progress.scored)
        figures = {"work/done": progress.done, "work/total": progress.total, "candidates": float(progress.alive)}
        if progress.best is not None:
            figures |= {"best/loss": progress.best.loss, "best/questions": float(progress.best.n)}
            figures |= {} if self._by_loss else {"best/accuracy": progress.best.accuracy}
        now = time.monotonic()
        if self._reported == (progress.best, progress.stage) and now < self._time + LOG_SECONDS:
            self._unreported = figures
            return
        self._reported, self._time, self._unreported = (progress.best, progress.stage), now, {}
        self._log(figures)

    def finish(self, result: SearchResult) -> None:
        """Report what was found."""
        figures = dict(self._unreported)
        for name, c in (("validation", result.validation), ("test", result.test)):
            figures |= {f"{name}/base_loss": c.base_loss, f"{name}/edited_loss": c.edited_loss}
            if result.settings.get("scorer") != "perplexity":
                figures |= {f"{name}/base_accuracy": c.base, f"{name}/edited_accuracy": c.edited, f"{name}/gain": c.gain}
                figures |= {f"{name}/gain_low": c.interval.low, f"{name}/gain_high": c.interval.high}
        figures |= _harm_figures(result.harms)
        self._log(figures)
        best = short_form(result.best) or "the unchanged model"  # trackers bound the length of texts
        self._end(
            {
                "laser_run": result.run,
                "laser_best": best,
                "laser_verdict": " ".join((*result.verdict(), *result.harm_sentences())),
            }
        )

    def fail(self) -> None:
        """Report that the search ended before its time."""
        self._end({}, failed=True)

    def _log(self, figures: Mapping[str, float]) -> None:
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._report(lambda to: to.log(finite, self._step))

    def _end(self, texts: Mapping[str, str], *, failed: bool = False) -> None:
        self._report(lambda to: to.end(texts, failed=failed))
        self._tracker = None

    def _report(self, call: Callable[[Tracker], None]) -> None:
        to = self._tracker
        if to is None:
            return
        try:
            with redirect_stdout(sys.stderr):  # stdout is for the result
                call(to)
        except Exception as error:  # noqa: BLE001  a tracker may raise anything
            self._tracker = None
            log.warning("the tracker failed, and nothing more is reported to it: %s: %s", type(error).__name__, error)
            with suppress(Exception), redirect_stdout(sys.stderr):  # the warning covers a second failure
                to.end({}, failed=True)


def _harm_figures(harms: Sequence[Harm]) -> dict[str, float]:
    """Return each harm and its interval by the names of metrics; a text file is named without its folder."""
    figures: dict[str, float] = {}
    for number, harm in enumerate(harms, 1):
        guard = Path(harm.guard.removeprefix("perplexity:")).name if harm.kind == "text" else harm.guard
        name = NOT_ALLOWED.sub("_", guard)
        name = f"{name} {number}" if f"harm/{name}" in figures else name
        low, high = harm.interval
        figures |= {f"harm/{name}": harm.ratio, f"harm_low/{name}": low, f"harm_high/{name}": high}
    return figures


@contextmanager
def tracked_search(to: Tracker | None, options: Mapping[str, Any], *, by_loss: bool = False) -> Iterator[TrackedSearch]:
    """Report a search to a tracker until the end of the block.

    Raises:
        LaserError: if the tracker does not begin.
    """
    if to is not None:
        try:
            with redirect_stdout(sys.stderr):
                to.begin(options)
        except Exception as error:
            raise LaserError(
                f"the tracker did not begin: {type(error).__name__}: {error}; see its own settings, or leave out --track"
            ) from error
    search = TrackedSearch(to, by_loss=by_loss)
    try:
        yield search
    except BaseException:
        search.fail()
        raise
