"""Time on this machine what a plan multiplies: passes, decompositions, texts and the recording of scores."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from laserlm.edit.apply import decomposition_of
from laserlm.errors import ScoringError
from laserlm.linalg.decomposition import as_float_matrix, basis_of
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import read_matrix
from laserlm.reductions import Intervention
from laserlm.scoring.generation import generate_for
from laserlm.scoring.records import Evaluation
from laserlm.searching.config import SearchConfig
from laserlm.searching.driver import VALIDATION, encode_splits
from laserlm.searching.guard import has_guard
from laserlm.searching.plan import Plan, decomposition_flop
from laserlm.searching.scorer import Failure, PrefixScorer
from laserlm.searching.simulation import CostModel
from laserlm.searching.work import ScoreTask
from laserlm.store import Store
from laserlm.tasks import Split, Task

MAX_TIMED_FLOP = 1e12
"""Floating-point operations of a decomposition that is not worth timing four times."""


def measure_cost(lm: LanguageModel, planned: Plan, task: Task, config: SearchConfig) -> CostModel:
    """Time work items at the bottom and at the top of the model, a decomposition, a recording, and a text, on this machine.

    Args:
        lm: the unchanged model.
        planned: what ``plan`` returned.
        task: as for ``plan``.
        config: as for ``plan``.

    Raises:
        ScoringError: if the items cannot be scored.
    """
    config = config.for_task(task, has_guard=has_guard(lm, config.guards), kind=lm.kind)
    encoded = encode_splits(lm, task, config)[VALIDATION]
    scorer = PrefixScorer(lm, {VALIDATION: encoded}, batch_size=config.batch_size, memory=config.memory)
    by_size = sorted(planned.matrices, key=decomposition_flop)
    middle = next((m for m in by_size[len(by_size) // 2 :] if decomposition_flop(m) < MAX_TIMED_FLOP), by_size[0])
    weight = None if middle.update_rank is not None else as_float_matrix(read_matrix(lm.model, middle))
    n = min(len(task.validation), 4 * config.batch_size)
    top = max((i for stage in planned.stages for i in stage.items if isinstance(i, ScoreTask)), key=lambda item: -item.share)
    full, high = (ScoreTask(VALIDATION, 0, n, i) for i in (Intervention(), top.intervention))
    times: dict[str, list[float]] = {}

    def run_all_blocks() -> Evaluation | Failure:
        scorer.free(VALIDATION)  # else the unchanged model runs from the cached activations below the top
        return full.execute(scorer)

    def decompose() -> float:  # a value, so that a GPU has done it
        factor = decomposition_of(lm, middle, scorer.decompositions).left if weight is None else basis_of(weight)
        return float(factor[0, 0])

    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "runs.db") as store:
        settings = {"model": lm.name, "task": task.name}
        with store.run(kind="search", key="measure", settings=settings, provenance={}) as run:
            scores = full.execute(scorer)
            for result in (scores, high.execute(scorer)):
                if isinstance(result, Failure):
                    raise ScoringError(
                        f"no work item could be timed: {result.reason}; leave what cannot be scored out of the grid"
                    )
            assert not isinstance(scores, Failure)
            for turn in range(4):
                answer = replace(scores, intervention=str(turn))
                time_of_all = _timed(run_all_blocks)
                high.execute(scorer)  # which moves the cached activations to the top
                seconds = {
                    "full": time_of_all,
                    "high": _timed(lambda: high.execute(scorer)),
                    "decompose": _timed(decompose),
                    "record": _timed(partial(run.record, answer, encoded.split.examples[:n])),
                }
                for name, value in seconds.items():
                    times.setdefault(name, []).append(value)
    # The first time is different: decompositions, activations and examples are new then.
    usual = {name: statistics.median(values[1:]) for name, values in times.items()}
    per_pass = max(0.0, usual["full"] - usual["high"]) / (1 - top.share) / n if top.share < 1 else usual["full"] / n
    return CostModel(
        work=per_pass,
        example=max(0.0, usual["full"] / n - per_pass),
        decompose=usual["decompose"] / decomposition_flop(middle),
        answer=usual["record"] / n,
        write=_time_of_text(lm, encoded.split, config.batch_size) if planned.generates else 0.0,
    )


def _time_of_text(lm: LanguageModel, split: Split, batch_size: int) -> float:
    """Return the seconds that the model needs for the text of one example, in a batch of the first ones."""
    examples = split.examples[:batch_size]
    return _timed(lambda: generate_for(lm, examples, split.decoding, batch_size)) / len(examples)


def _timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
