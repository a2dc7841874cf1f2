"""Search for the intervention that helps most on validation, and measure it once on test."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from laserlm.algebra.decomposition import ALGORITHM
from laserlm.editing import applied
from laserlm.errors import ScoringError, WeightError
from laserlm.models.language_model import LanguageModel
from laserlm.provenance import provenance
from laserlm.results import Run, Store
from laserlm.scoring.encoding import encode
from laserlm.scoring.evaluate import Comparison, compare, evaluate, evaluate_rows
from laserlm.scoring.forward import too_large
from laserlm.scoring.records import Evaluation
from laserlm.searching.candidates import Candidate, expand
from laserlm.searching.frontier import Frontier
from laserlm.spec import Grid, Intervention
from laserlm.tasks import Scorer, Split, Task

__all__ = ["Found", "Metric", "Step", "search"]

Metric = Literal["accuracy", "loss"]
SCORING = 2
"""Goes up when a change of scoring moves scores, so that no run mixes old with new ones."""


@dataclass(frozen=True)
class Step:
    """Where a search stands after an evaluation, for a progress display.

    Args:
        done: evaluations done or failed so far, those of the unchanged model and of the test split included.
        total: number of them.
        best: the best evaluation so far, the unchanged model's included.
        last: canonical text of what was scored last.
    """

    done: int
    total: int
    best: Evaluation
    last: str


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        run: id of the run in the store.
        strategy: how candidates were tried.
        best: the intervention that was best on validation; empty if that is the unchanged model.
        candidates: number of candidates tried, the unchanged model not counted.
        failed: canonical text and reason of candidates that could not be scored.
        validation: base against best on the examples the choice was made on, so biased upwards.
        test: base against best on examples that had no part in the choice.
        seconds: wall time of this call.
    """

    run: str
    strategy: str
    best: Intervention
    candidates: int
    failed: dict[str, str]
    validation: Comparison
    test: Comparison
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "run": self.run,
            "strategy": self.strategy,
            "best": str(self.best),
            "candidates": self.candidates,
            "failed": self.failed,
            "seconds": self.seconds,
            "validation": _as_best(self.validation),
            "test": _as_best(self.test),
        }


def _as_best(comparison: Comparison) -> dict[str, Any]:
    return {key.replace("edited", "best"): value for key, value in comparison.as_dict().items()}


def search(
    lm: LanguageModel,
    task: Task,
    *,
    grid: str | Grid = "mlp",
    metric: Metric = "accuracy",
    store: str | Path | None = None,
    scorer: Scorer | None = None,
    batch_size: int = 32,
    seed: int = 0,
    restart: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Found:
    """Score every candidate of a grid on the validation split, choose the best, and score that one on the test split.

    The unchanged model is among those to choose from. The choice goes by accuracy, ties by lower loss (or by loss,
    ties by accuracy); of equals the earlier stays. A candidate that cannot be scored is recorded with its reason and
    passed over. With a store, every candidate is saved as it is finished; the same call goes on where an interrupted
    one stopped, and returns what a finished one found.

    Args:
        lm: the unchanged model.
        task: its validation split decides, its test split measures.
        grid: ``paper``, ``mlp``, ``fine`` or text such as ``27-29.mlp@0.05,0.5``.
        metric: ``accuracy`` or ``loss``.
        store: file or SQLAlchemy URL of the results database; None keeps nothing.
        scorer: None takes the task's own.
        batch_size: sequences in one forward pass.
        seed: of ``:reference`` decompositions.
        restart: begin anew even where the store has this search already.
        on_step: called after each evaluation.

    Raises:
        LaserError: if the grid, the task or the model cannot be used.
        RunBusyError: if another process is at the same search in the same store.
    """
    if metric not in get_args(Metric):
        raise ScoringError(f"no metric {metric!r}; there are {', '.join(get_args(Metric))}")
    if lm.active:
        raise ScoringError(f"the model is changed by {lm.intervention}; a search begins with the unchanged one")
    for split in (task.validation, task.test):
        if not len(split):
            raise ScoringError(f"the {split.name} split of {task.name} is empty; a search needs both: give more examples")
    candidates = expand(grid, lm.matrices)
    settings = _settings(lm, task, Grid.parse(grid), metric, scorer, seed)
    start = time.perf_counter()
    with ExitStack() as stack:
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "runs.db"
        results = stack.enter_context(Store.open(store))
        made_by = provenance(device=str(lm.device), dtype=str(lm.dtype), seed=seed)
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        run = stack.enter_context(results.run(kind="search", key=key, settings=settings, provenance=made_by, restart=restart))
        trials = _Trials(lm, run, scorer, batch_size, seed, on_step or (lambda _: None))
        total = len(candidates) + 3
        # The unchanged model meets the test split first, so that rows that cannot be scored are told at once.
        base_test = trials.score(task.test, Intervention())
        base, best, failed = _choose(trials, task.validation, candidates, metric, total)
        best_test = trials.score(task.test, Intervention.parse(best.intervention))
        trials.on_step(Step(total, total, best, best.intervention))
        found = Found(
            run=run.id,
            strategy="exhaustive",
            best=Intervention.parse(best.intervention),
            candidates=len(candidates),
            failed=failed,
            validation=compare(base, best),
            test=compare(base_test, best_test),
            seconds=time.perf_counter() - start,
        )
        if run.outcome is None:
            run.finish(found.as_dict())
        return found


def _settings(lm: LanguageModel, task: Task, grid: Grid, metric: Metric, scorer: Scorer | None, seed: int) -> dict[str, Any]:
    """Return all that the result depends on; a run with the same goes on where an earlier one stopped."""
    return {
        "model": lm.name,
        "model_hash": lm.hash,
        "dtype": str(lm.dtype),
        "task": task.name,
        "validation": task.validation.hash,
        "test": task.test.hash,
        "scorer": scorer or task.validation.scorer,
        "grid": str(grid),
        "metric": metric,
        "strategy": "exhaustive",
        "algorithm": ALGORITHM,
        "scoring": SCORING,
        "seed": seed,
    }


@dataclass
class _Trials:
    """Score interventions, each once: what the run has already is not scored again.

    On validation, candidates come in the order of the blocks and are scored from the frontier.
    """

    lm: LanguageModel
    run: Run
    scorer: Scorer | None
    batch_size: int
    seed: int
    on_step: Callable[[Step], None]

    def score(self, split: Split, intervention: Intervention) -> Evaluation:
        """Score in whole passes."""
        known = self.run.evaluation(split.name, str(intervention))
        if known is not None:
            return known
        with applied(self.lm, intervention, seed=self.seed):
            found = evaluate(self.lm, split, scorer=self.scorer, batch_size=self.batch_size)
        self.run.record(found, split.examples)
        return found

    def candidates(self, split: Split, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Evaluation | str]]:
        """Yield every candidate with its evaluation, or with the reason why it has none."""
        scorer = self.scorer or split.scorer
        rows = encode(self.lm, split.examples, scorer)
        frontier: Frontier | None = None
        for candidate in candidates:
            text = str(candidate.intervention)
            known = self.run.evaluation(split.name, text) or self.run.failure(split.name, text)
            while known is None:
                full: ScoringError | None = None
                try:
                    # Made only where something is left to score.
                    frontier = frontier or Frontier(self.lm, rows, self.batch_size)
                    frontier.advance(candidate.matrix.stack, candidate.matrix.layer)
                    with applied(self.lm, candidate.intervention, seed=self.seed):
                        known = evaluate_rows(self.lm, split, scorer, rows, frontier.run)
                    self.run.record(known, split.examples)
                except (ScoringError, WeightError) as error:
                    known = f"{type(error).__name__}: {error}"
                    self.run.fail(split.name, text, known)
                except torch.OutOfMemoryError as error:
                    full = too_large(self.lm, error)
                if full is not None:  # outside the handler, whose traceback holds the failed pass's tensors
                    if self.batch_size > 1:
                        frontier, self.batch_size = None, self.batch_size // 2
                    elif frontier is not None and frontier.moves:
                        frontier.stay()  # the boundary itself may be what does not fit
                    else:
                        raise full
                    torch.cuda.empty_cache()
            yield candidate, known


def _choose(
    trials: _Trials, split: Split, candidates: Sequence[Candidate], metric: Metric, total: int
) -> tuple[Evaluation, Evaluation, dict[str, str]]:
    """Return the baseline's evaluation, the best one and the reasons of failed candidates."""
    base = best = trials.score(split, Intervention())
    failed: dict[str, str] = {}
    trials.on_step(Step(2, total, best, ""))
    for done, (candidate, found) in enumerate(trials.candidates(split, candidates), start=3):
        if isinstance(found, str):
            failed[str(candidate.intervention)] = found
        else:
            best = max(best, found, key=lambda e: _merit(e, metric))
        trials.on_step(Step(done, total, best, str(candidate.intervention)))
    return base, best, failed


def _merit(e: Evaluation, metric: Metric) -> tuple[float, float]:
    return (e.accuracy, -e.loss) if metric == "accuracy" else (-e.loss, e.accuracy)
