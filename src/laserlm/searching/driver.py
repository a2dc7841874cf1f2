"""Search for the intervention that helps most on validation, and measure it once on test."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from laserlm.errors import ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.models.left_out import line_of, weights_left_out
from laserlm.provenance import provenance
from laserlm.reductions import Grid
from laserlm.scoring.identity import digest, identity
from laserlm.scoring.scorers import GENERATING
from laserlm.scoring.tokenize import encode
from laserlm.searching.candidates import expand
from laserlm.searching.cluster import on_ray
from laserlm.searching.components import separate_matrices
from laserlm.searching.config import Effort, SearchConfig
from laserlm.searching.executors import Executor, LocalExecutor, OutOfTimeError
from laserlm.searching.guard import Guard, guards_of, has_guard
from laserlm.searching.ledger import ScoreLedger
from laserlm.searching.memory_plan import MemoryPlanner, warn_of_little_memory
from laserlm.searching.race import shuffled_order
from laserlm.searching.ray_cluster import Ray
from laserlm.searching.result import SearchProgress, SearchResult
from laserlm.searching.scorer import EncodedSplit, PrefixScorer
from laserlm.searching.session import GuardScores, SearchSession
from laserlm.searching.strategies import STRATEGIES, expected_cost
from laserlm.store import Run, Store
from laserlm.tasks import Scorer, Task

log = logging.getLogger(__name__)
METHOD = 10
"""Goes up when a change moves scores or the way of choosing, so that no run mixes old with new ones."""
VALIDATION, TEST, FINALISTS = "validation", "test", "finalists"
"""Names of the splits of a search. The finalists are the validation split again, scored as the test split is."""
CHOOSING, MEASURING = "guard {} choosing", "guard {} measuring"
"""Names of the two parts of a guard."""


def search(
    lm: LanguageModel,
    task: Task,
    config: SearchConfig | None = None,
    *,
    effort: Effort = "normal",
    store: str | Path | None = None,
    restart: bool = False,
    executor: Ray | None = None,
    on_step: Callable[[SearchProgress], None] | None = None,
    on_stage: Callable[[SearchProgress], None] | None = None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> SearchResult:
    """Choose the best intervention on the validation split, and score it on the test split.

    ``race``: a first-order screen ranks all candidates. The best of them are scored on more and more examples, and the worse
    ones leave after each rung. ``exhaustive``: every candidate is scored on every example. ``compose``: reductions are added
    one after another, each only if validation improves significantly (``delta``). ``components``: single components of all
    matrices are removed in steps, as long as the questions gain and the guards keep within ``max_harm``. ``strengths``: all
    components get a strength between 0 and 1, as far as the guards keep within ``max_harm``.

    The unchanged model is always among those to choose from. The choice goes by accuracy, ties by lower loss (or by loss,
    ties by accuracy); of equals the earlier stays. If the scorer grades generated text, candidates are ranked by the loss of
    the right answers. The model then generates under the best few and unchanged, and the choice is among them. A
    candidate that cannot be scored is recorded with its reason and passed over.

    With a store, every score is saved at once. The same call continues an interrupted search, and returns the result of a
    finished one.

    Args:
        lm: the unchanged model.
        task: its validation split decides, its test split measures.
        config: the settings; None takes those of ``effort`` and ``settings``.
        effort: ``quick``, ``normal`` or ``thorough``.
        store: file, or SQLAlchemy URL of an SQLite or PostgreSQL database, for the results. None keeps nothing.
        restart: begin anew even where the store has this search already.
        executor: the Ray cluster to search on, with the same result. None takes this process alone.
        on_step: called after each part of the work.
        on_stage: called when a stage of the work begins.
        options: plain values that are kept with the run, for ``laser runs show RUN --config``. None keeps none.
        **settings: fields of ``SearchConfig``, such as ``metric="loss"``.

    Raises:
        LaserError: if a setting, the grid, the task or the model cannot be used.
        RunBusyError: if another process is at the same search in the same store.
    """
    start = time.monotonic()
    on_stage = on_stage or (lambda _: None)
    config = _complete_config(lm, task, config, effort, settings)
    check(lm, task)
    candidates = expand(config.grid, lm.matrices)
    _warn_of_weights_left_out(lm, config)
    on_stage(SearchProgress(stage="guards", alive=0, done=0.0, total=0.0, scored=0, best=None, last=""))
    guards = _guards(lm, config)
    splits = encode_splits(lm, task, config) | splits_of_guards(guards)
    planner = MemoryPlanner(lm, separate_matrices(candidates), config.memory, config.batch_size)
    warn_of_little_memory(planner, splits[VALIDATION].sequences, has_gradient=config.screens or config.is_of_components)
    run_settings = _run_settings(lm, task, splits, config, guards)
    with _open_run(lm, run_settings, config.seed, store, executor, restart=restart) as run:
        if run.outcome is not None:
            return replace(SearchResult.from_dict(run.outcome), done_earlier=True)
        if options is not None and run.notes.get("options") != dict(options):
            run.note("options", dict(options))
        config = replace(config, batch_size=int(run.notes.get("batch_size", config.batch_size)))
        with _executor(lm, splits, config, executor) as workers:
            ledgers = _ledgers(lm, run, splits, workers, config, start, reuses=not restart)
            session = SearchSession(
                run=run,
                on_validation=ledgers[VALIDATION],
                on_test=ledgers[TEST],
                on_finalists=ledgers[FINALISTS if config.scorer in GENERATING else VALIDATION],
                candidates=candidates,
                config=config,
                guards=[
                    GuardScores(guard, ledgers[CHOOSING.format(i)], ledgers[MEASURING.format(i)])
                    for i, guard in enumerate(guards)
                ],
                on_step=on_step or (lambda _: None),
                on_stage=on_stage,
                start=start,
            )
            result = _result(session, run, workers, run_settings, start)
            run.finish(result.as_dict())
            return result


def _warn_of_weights_left_out(lm: LanguageModel, config: SearchConfig) -> None:
    """Name the weights of blocks that a grid of all matrices does not change, because they are no matrices here."""
    named = {reduction.matrix for part in Grid.parse(config.grid).parts for reduction in part}
    if "all" in named and lm.update is None and (line := line_of(weights_left_out(lm.model, lm.matrices))):
        log.warning("%s: %s", lm.name, line)


def _complete_config(
    lm: LanguageModel, task: Task, config: SearchConfig | None, effort: Effort, settings: Mapping[str, Any]
) -> SearchConfig:
    """Return the settings with all that the model and the task decide."""
    if config is not None and effort != "normal":
        raise ScoringError(f"effort {effort!r} and a config exclude each other; write SearchConfig.of({effort!r}, ...)")
    config = SearchConfig.of(effort, **settings) if config is None else replace(config, **settings)
    return config.for_task(task, has_guard=has_guard(lm, config.guards), kind=lm.kind)


def _guards(lm: LanguageModel, config: SearchConfig) -> list[Guard]:
    """Return what must not get worse."""
    guards = guards_of(lm, config.guards, seed=config.seed)
    if not guards and (config.is_of_components or math.isfinite(config.harm_bound)):
        raise ScoringError(
            f"a choice of components or a bound on harm needs a guard, and {lm.name} ({lm.kind}) writes no text "
            "of its own; name a task whose questions it must keep answering: --guard TASK (guards=['TASK'])"
        )
    return guards


@contextmanager
def _open_run(
    lm: LanguageModel, settings: dict[str, Any], seed: int, store: str | Path | None, cluster: Ray | None, *, restart: bool
) -> Iterator[Run]:
    """Yield the run with these settings, new or continued, of a store; without one, of a folder that is removed."""
    origin = provenance(device=str(lm.device), dtype=str(lm.dtype), seed=seed)
    if cluster is not None:
        origin["ray"] = cluster.as_dict()
    with ExitStack() as stack:
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "runs.db"
        results = stack.enter_context(Store.open(store))
        key = digest(settings)
        yield stack.enter_context(results.run(kind="search", key=key, settings=settings, provenance=origin, restart=restart))


def _ledgers(
    lm: LanguageModel,
    run: Run,
    splits: Mapping[str, EncodedSplit],
    workers: Executor,
    config: SearchConfig,
    start: float,
    *,
    reuses: bool,
) -> dict[str, ScoreLedger]:
    """Return the scores on each split. Only the splits for choosing have a deadline."""
    deadline = math.inf if config.budget is None else start + 60 * config.budget
    timed = {VALIDATION, *(CHOOSING.format(i) for i in range(len(splits)))}
    return {
        name: ScoreLedger(
            *(lm, run, name, split, workers, config.memory / 2, deadline if name in timed else math.inf), reuses=reuses
        )
        for name, split in splits.items()
    }


def encode_splits(lm: LanguageModel, task: Task, config: SearchConfig) -> dict[str, EncodedSplit]:
    """Return what a search scores: the validation split in a random order, for candidates and for finalists, and the test.

    Raises:
        LaserError: if the examples cannot be tokenized.
    """
    scorer: Scorer = config.scorer or task.validation.scorer
    order = shuffled_order([e.id for e in task.validation], config.seed)
    if config.is_of_components:  # fact by fact, so that no fact is in two parts
        facts = [e.fact or e.id for e in task.validation]
        place = {facts[i]: rank for rank, i in enumerate(shuffled_order(facts, config.seed))}
        order.sort(key=lambda i: place[facts[i]])
    validation = replace(task.validation, examples=tuple(task.validation.examples[i] for i in order))
    sequences = encode(lm, validation.examples, scorer)
    return {
        VALIDATION: EncodedSplit(validation, sequences, "answer" if scorer in GENERATING else scorer),
        TEST: EncodedSplit(task.test, encode(lm, task.test.examples, scorer), scorer),
        FINALISTS: EncodedSplit(replace(validation, name=FINALISTS), sequences, scorer),
    }


def splits_of_guards(guards: Sequence[Guard]) -> dict[str, EncodedSplit]:
    """Return the parts of guards by the names under which they are scored."""
    parts: dict[str, EncodedSplit] = {}
    for i, guard in enumerate(guards):
        for name, part in ((CHOOSING.format(i), guard.choosing), (MEASURING.format(i), guard.measuring)):
            parts[name] = replace(part, split=replace(part.split, name=name))
    return parts


def check(lm: LanguageModel, task: Task) -> None:
    """Raise a ScoringError unless the model is unchanged and the splits hold examples, none of them in both.

    A published split may hold equal questions on both sides; then a warning counts them.
    """
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
    equal = {e.question for e in task.validation} & {e.question for e in task.test}
    if equal and task.split_by == "paper":
        log.warning(
            "%d questions of %s are both in the validation and in the test split, as published; --split-by shuffled parts them",
            len(equal),
            task.name,
        )
    elif equal:
        raise ScoringError(
            f"the splits {task.validation.name} and {task.test.name} of {task.name} share {len(equal)} questions with equal "
            f"prompt and answer, such as {min(equal)[0]!r:.60}; give two splits that share none, or make them with Task.of"
        )


def _run_settings(
    lm: LanguageModel, task: Task, splits: dict[str, EncodedSplit], config: SearchConfig, guards: Sequence[Guard]
) -> dict[str, Any]:
    """Return everything that the result depends on; a run with the same settings continues an interrupted one."""
    sequences = (*splits[VALIDATION].sequences, *splits[TEST].sequences)
    scores = identity(lm, splits[TEST].scorer, (task.validation, task.test), sequences, config.seed)
    return scores | config.choice_settings() | {"method": METHOD, "guards": [guard.identity for guard in guards]}


@contextmanager
def _executor(
    lm: LanguageModel, splits: dict[str, EncodedSplit], config: SearchConfig, cluster: Ray | None
) -> Iterator[Executor]:
    """Yield what does the work: this process, or the workers of a cluster."""
    if cluster is None:
        yield LocalExecutor(PrefixScorer(lm, splits, batch_size=config.batch_size, memory=config.memory, seed=config.seed))
        return
    with on_ray(cluster, lm, splits, config) as executor:
        yield executor


def _result(session: SearchSession, run: Run, executor: Executor, settings: dict[str, Any], start: float) -> SearchResult:
    """Search, confirm the choice, and measure it on the test split."""
    config = session.config
    if config.strategy is None:
        raise AssertionError("SearchConfig.for_task sets the strategy")
    session.try_test(later=expected_cost(session))
    try:
        STRATEGIES[config.strategy](session)
        complete = True
    except OutOfTimeError:
        complete = False
    session.is_chosen = True
    session.on_validation.free()
    finalists = session.confirm(complete=complete) if session.generates else {}
    validation, test = session.compare(session.best)
    harms = session.measure_harms()
    session.end_stage()
    ledger = session.on_validation
    return SearchResult(
        run=run.id,
        strategy=config.strategy,
        best=session.best,
        candidates=_candidate_count(session),
        scored=len({*ledger.scores, *ledger.failed} - {""}),
        failed=ledger.failed,
        validation=validation,
        test=test,
        seconds=time.monotonic() - start,
        complete=complete,
        boundary_bytes=executor.activation_bytes,
        decomposition_bytes=executor.decomposition_bytes,
        rungs=tuple(session.rungs),
        screened=session.screen_report,
        steps=tuple(session.steps),
        finalists=finalists,
        settings=json.loads(json.dumps(settings)),  # as they come back from a store
        harms=harms,
        points=session.points,
        phases=session.phases,
    )


def _candidate_count(session: SearchSession) -> int:
    """Return the number of things to choose from: candidates, or single components."""
    if session.config.is_of_components:
        return sum(m.max_rank for m in separate_matrices(session.candidates))
    return len(session.candidates)
