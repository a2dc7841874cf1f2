"""Search for the intervention that helps most on validation, and measure it once on test."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from laserlm.errors import ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.provenance import provenance
from laserlm.reductions import Grid, Intervention
from laserlm.scoring.identity import digest, identity
from laserlm.scoring.tokenize import encode
from laserlm.searching.candidates import expand
from laserlm.searching.cluster import Ray, on_ray
from laserlm.searching.desk import EncodedSplit, WorkerState
from laserlm.searching.executors import Executor, LocalExecutor, OutOfTimeError
from laserlm.searching.ledger import ScoreLedger
from laserlm.searching.race import RaceOptions, shuffled_order
from laserlm.searching.result import Metric, Mode, SearchProgress, SearchResult, Strategy
from laserlm.searching.session import SearchSession
from laserlm.store import Store
from laserlm.tasks import GENERATING, Scorer, Task

__all__ = ["check", "encode_splits", "search"]

METHOD = 4
"""Goes up when a change moves scores or the way a choice is made, so that no run mixes old with new ones."""
BASE = Intervention()
VALIDATION, TEST, FINALISTS = "validation", "test", "finalists"
"""Names of the materials of a search."""


def search(
    lm: LanguageModel,
    task: Task,
    *,
    strategy: Strategy = "race",
    grid: str | Grid = "fine",
    metric: Metric | None = None,
    store: str | Path | None = None,
    scorer: Scorer | None = None,
    batch_size: int = 32,
    seed: int = 0,
    budget: float | None = None,
    memory: float = 2**30,
    mode: Mode = "joint",
    options: RaceOptions | None = None,
    restart: bool = False,
    executor: Ray | None = None,
    on_step: Callable[[SearchProgress], None] | None = None,
) -> SearchResult:
    """Choose the best intervention on the validation split, and score that one on the test split.

    ``race``: a first-order screen ranks all candidates; those it expects most of meet the examples in rungs, and the
    worse ones leave after each. ``exhaustive``: every candidate meets every example. ``compose``: reductions are added
    one after another, each only if validation improves beyond its paired interval. The unchanged model is always among
    those to choose from. The choice goes by accuracy, ties by lower loss (or by loss, ties by accuracy); of equals the
    earlier stays. Where the scorer judges what the model writes, all this goes by the loss of the right answers; then the
    model writes under the best few and under none, and the choice is made among them. A candidate that cannot be scored
    is recorded with its reason and passed over. With a store, every score is saved as it is made; the same call goes on
    where an interrupted one stopped, and returns what a finished one found.

    Args:
        lm: the unchanged model.
        task: its validation split decides, its test split measures.
        strategy: ``race``, ``exhaustive`` or ``compose``.
        grid: ``paper``, ``mlp``, ``fine`` or text such as ``27-29.mlp@0.05,0.5``.
        metric: ``accuracy`` or ``loss``; None takes ``accuracy``, but for perplexity, which knows the loss alone.
        store: file, or SQLAlchemy URL of an SQLite or PostgreSQL database, for the results; None keeps nothing.
        scorer: None takes the task's own.
        batch_size: sequences in one forward pass.
        seed: of the order of the examples, of the controls and of ``:reference`` decompositions.
        budget: minutes after which nothing more is begun but the measurement of the best so far; a run that ends so is
            finished. None sets no end.
        memory: bytes of decompositions held, and of the frontier's boundary, each.
        mode: of ``compose``: ``joint`` tries what the screen expects most of, ``greedy`` goes from the last block to
            the first.
        options: of the race, and the screen's of a joint composition.
        restart: begin anew even where the store has this search already.
        executor: the Ray cluster to search on, with the same result; None takes this process alone.
        on_step: called after each piece of work.

    Raises:
        LaserError: if the grid, the task or the model cannot be used.
        RunBusyError: if another process is at the same search in the same store.
    """
    scorer = scorer or task.validation.scorer
    metric = metric or ("loss" if scorer == "perplexity" else "accuracy")
    for name, value, known in (("metric", metric, Metric), ("strategy", strategy, Strategy), ("mode", mode, Mode)):
        if value not in get_args(known):
            raise ScoringError(f"no {name} {value!r}; there are {', '.join(get_args(known))}")
    if scorer == "perplexity" and metric == "accuracy":
        raise ScoringError("a perplexity has no accuracy; choose by the loss: --metric loss (metric='loss')")
    check(lm, task)
    options = options or RaceOptions()
    writes = scorer in GENERATING
    candidates = expand(grid, lm.matrices)
    materials = encode_splits(lm, task, scorer, seed)
    # All that the result depends on; a run with the same goes on where an earlier one stopped.
    settings = identity(
        lm, scorer, (task.validation, task.test), (*materials[VALIDATION].rows, *materials[TEST].rows), seed
    ) | {
        "grid": str(Grid.parse(grid)),
        "metric": metric,
        "strategy": strategy,
        "method": METHOD,
        "budget": budget,
    }
    if strategy != "exhaustive":
        settings["options"] = asdict(options)
    if strategy == "compose":
        settings["mode"] = mode
    start = time.monotonic()
    with ExitStack() as stack:
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "runs.db"
        results = stack.enter_context(Store.open(store))
        made_by = provenance(device=str(lm.device), dtype=str(lm.dtype), seed=seed)
        if executor is not None:
            made_by["ray"] = executor.as_dict()
        key = digest(settings)
        run = stack.enter_context(results.run(kind="search", key=key, settings=settings, provenance=made_by, restart=restart))
        if run.outcome is not None:
            return SearchResult.from_dict(run.outcome)
        deadline = math.inf if budget is None else start + 60 * budget
        batch = int(run.notes.get("batch_size", batch_size))
        given: dict[str, Any] = {"batch": batch, "memory": memory, "seed": seed}
        do: Executor = (
            LocalExecutor(WorkerState(lm, materials, **given))
            if executor is None
            else stack.enter_context(on_ray(executor, lm, materials, **given))
        )
        trials = ScoreLedger(lm, run, VALIDATION, materials[VALIDATION], do, memory, deadline)
        work = SearchSession(
            run=run,
            trials=trials,
            tests=ScoreLedger(lm, run, TEST, materials[TEST], do, memory),
            finals=ScoreLedger(lm, run, FINALISTS, materials[FINALISTS], do, memory) if writes else trials,
            candidates=candidates,
            metric=metric,
            options=options,
            seed=seed,
            on_step=on_step or (lambda _: None),
        )
        # The unchanged model meets the test split first, so that rows that cannot be scored are told at once.
        work.measure(BASE)
        try:
            work.by(strategy, mode)
            complete = True
        except OutOfTimeError:
            complete = False
        work.trials.release()
        finalists = work.confirm(complete) if writes else {}
        best = work.best
        validated, tested = work.compare(best)
        found = SearchResult(
            run=run.id,
            strategy=strategy,
            best=best,
            candidates=len(candidates),
            scored=len({*work.trials.scores, *work.trials.failed} - {""}),
            failed=work.trials.failed,
            validation=validated,
            test=tested,
            seconds=time.monotonic() - start,
            complete=complete,
            boundary_bytes=do.boundary,
            decomposition_bytes=do.decompositions,
            rungs=tuple(work.rungs),
            screened=work.screened,
            steps=tuple(work.steps),
            finalists=finalists,
            settings=json.loads(json.dumps(settings)),  # as they come back from a store
        )
        run.finish(found.as_dict())
        return found


def encode_splits(lm: LanguageModel, task: Task, scorer: Scorer, seed: int) -> dict[str, EncodedSplit]:
    """Return what a search scores: the validation split in a random order, as candidates and as finalists are, and the test.

    Args:
        lm: the model.
        task: its splits.
        scorer: how an example is scored; where it judges what the model writes, candidates go by the answers' loss.
        seed: of the order.

    Raises:
        LaserError: if the examples cannot be made into rows.
    """
    order = shuffled_order([e.id for e in task.validation], seed)
    validation = replace(task.validation, examples=tuple(task.validation.examples[i] for i in order))
    rows = encode(lm, validation.examples, scorer)
    return {
        VALIDATION: EncodedSplit(validation, rows, "answer" if scorer in GENERATING else scorer),
        TEST: EncodedSplit(task.test, encode(lm, task.test.examples, scorer), scorer),
        FINALISTS: EncodedSplit(replace(validation, name=FINALISTS), rows, scorer),
    }


def check(lm: LanguageModel, task: Task) -> None:
    """Raise a ScoringError unless the model is unchanged and the splits hold examples, none of them in both."""
    if lm.active:
        raise ScoringError(f"the model is changed by {lm.intervention}; a search begins with the unchanged one")
    for split in (task.validation, task.test):
        if not len(split):
            raise ScoringError(f"the {split.name} split of {task.name} is empty; a search needs both: give more examples")
    both = {e.id for e in task.validation} & {e.id for e in task.test}
    if both or task.validation.name == task.test.name:
        raise ScoringError(
            f"the splits {task.validation.name} and {task.test.name} of {task.name} share {len(both)} examples; what is "
            "chosen on an example cannot be measured on it: give two splits that share none"
        )
