"""Search for the intervention that helps most on validation, and measure it once on test."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch
from scipy import stats

from laserlm.algebra.decomposition import ALGORITHM
from laserlm.editing.cache import DecompositionCache
from laserlm.errors import ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.provenance import provenance
from laserlm.results import Run, Store
from laserlm.scoring.evaluate import Comparison, compare
from laserlm.scoring.forward import too_large
from laserlm.scoring.records import Evaluation
from laserlm.searching.candidates import Candidate, expand
from laserlm.searching.compose import compose, in_order
from laserlm.searching.found import Accepted, Found, Metric, Mode, Rung, Screened, Step, Strategy, merit
from laserlm.searching.race import RaceOptions, choose, race, shuffled
from laserlm.searching.screen import Prediction, screen
from laserlm.searching.trials import OutOfTimeError, Trials
from laserlm.spec import Grid, Intervention
from laserlm.tasks import Scorer, Task

__all__ = ["search"]

SCORING = 2
"""Goes up when a change of scoring moves scores, so that no run mixes old with new ones."""
BASE = Intervention()


def search(
    lm: LanguageModel,
    task: Task,
    *,
    strategy: Strategy = "race",
    grid: str | Grid = "fine",
    metric: Metric = "accuracy",
    store: str | Path | None = None,
    scorer: Scorer | None = None,
    batch_size: int = 32,
    seed: int = 0,
    budget: float | None = None,
    memory: float = 2**30,
    mode: Mode = "joint",
    options: RaceOptions | None = None,
    restart: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Found:
    """Choose the best intervention on the validation split, and score that one on the test split.

    ``race``: a first-order screen ranks all candidates; those it expects most of meet the examples in rungs, and the
    worse ones leave after each. ``exhaustive``: every candidate meets every example. ``compose``: reductions are added
    one after another, each only if validation improves beyond its paired interval. The unchanged model is always among
    those to choose from. The choice goes by accuracy, ties by lower loss (or by loss, ties by accuracy); of equals the
    earlier stays. A candidate that cannot be scored is recorded with its reason and passed over. With a store, every
    score is saved as it is made; the same call goes on where an interrupted one stopped, and returns what a finished
    one found.

    Args:
        lm: the unchanged model.
        task: its validation split decides, its test split measures.
        strategy: ``race``, ``exhaustive`` or ``compose``.
        grid: ``paper``, ``mlp``, ``fine`` or text such as ``27-29.mlp@0.05,0.5``.
        metric: ``accuracy`` or ``loss``.
        store: file or SQLAlchemy URL of the results database; None keeps nothing.
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
        on_step: called after each piece of work.

    Raises:
        LaserError: if the grid, the task or the model cannot be used.
        RunBusyError: if another process is at the same search in the same store.
    """
    for name, value, known in (("metric", metric, Metric), ("strategy", strategy, Strategy), ("mode", mode, Mode)):
        if value not in get_args(known):
            raise ScoringError(f"no {name} {value!r}; there are {', '.join(get_args(known))}")
    if lm.active:
        raise ScoringError(f"the model is changed by {lm.intervention}; a search begins with the unchanged one")
    for split in (task.validation, task.test):
        if not len(split):
            raise ScoringError(f"the {split.name} split of {task.name} is empty; a search needs both: give more examples")
    options = options or RaceOptions()
    scorer = scorer or task.validation.scorer
    candidates = expand(grid, lm.matrices)
    order = shuffled([e.id for e in task.validation], seed)
    validation = replace(task.validation, examples=tuple(task.validation.examples[i] for i in order))
    # All that the result depends on; a run with the same goes on where an earlier one stopped.
    settings = {
        "model": lm.name,
        "model_hash": lm.hash,
        "dtype": str(lm.dtype),
        "task": task.name,
        "validation": task.validation.hash,
        "test": task.test.hash,
        "scorer": scorer,
        "grid": str(Grid.parse(grid)),
        "metric": metric,
        "strategy": strategy,
        "algorithm": ALGORITHM,
        "scoring": SCORING,
        "seed": seed,
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
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        run = stack.enter_context(results.run(kind="search", key=key, settings=settings, provenance=made_by, restart=restart))
        if run.outcome is not None:
            return Found.from_dict(run.outcome)
        cache = DecompositionCache(lm.cache / "decompositions", memory=int(memory))
        deadline = math.inf if budget is None else start + 60 * budget
        work = _Search(
            lm=lm,
            run=run,
            trials=Trials(lm, run, validation, scorer, cache, batch_size, memory, deadline, seed),
            tests=Trials(lm, run, task.test, scorer, cache, batch_size, memory, math.inf, seed),
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
        best = work.best
        validated, tested = work.compare(best)
        found = Found(
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
            boundary_bytes=max(work.trials.boundary, work.tests.boundary),
            decomposition_bytes=cache.peak,
            rungs=tuple(work.rungs),
            screened=work.screened,
            steps=tuple(work.steps),
        )
        run.finish(found.as_dict())
        return found


@dataclass
class _Search:
    """One search: how it goes on by each strategy, and what it shows on the way."""

    lm: LanguageModel
    run: Run
    trials: Trials
    tests: Trials
    candidates: Sequence[Candidate]
    metric: Metric
    options: RaceOptions
    seed: int
    on_step: Callable[[Step], None]
    best: Intervention = BASE
    rungs: list[Rung] = field(default_factory=list)
    steps: list[Accepted] = field(default_factory=list)
    screened: Screened | None = None
    _shown: Evaluation | None = None
    _stage: str = ""
    _alive: int = 0
    _expected: float = 0.0

    def __post_init__(self) -> None:
        self.trials.on_scored = self.tests.on_scored = self._tell

    def by(self, strategy: Strategy, mode: Mode) -> None:
        """Search, and keep the best so far in ``best`` from the moment there is one.

        Raises:
            OutOfTimeError: at the deadline.
        """
        if strategy == "exhaustive":
            self._exhaustive()
        elif strategy == "race":
            self._race()
        else:
            self._compose(mode)

    def measure(self, intervention: Intervention) -> Evaluation:
        """Score an intervention on the whole test split.

        Raises:
            ScoringError: if it cannot be scored there.
        """
        stage = self._stage
        self._begin("test", [intervention], len(self.tests.split), trials=self.tests)
        self.tests.extend([intervention], len(self.tests.split))
        self._stage = stage
        if str(intervention) in self.tests.failed:
            raise ScoringError(
                f"{intervention or 'the unchanged model'} cannot be scored on the test split: "
                f"{self.tests.failed[str(intervention)]}; leave it out of the grid, or load the model with another dtype"
            )
        return self.tests.scores[str(intervention)]

    def compare(self, best: Intervention) -> tuple[Comparison, Comparison]:
        """Compare the unchanged model with the best, on the validation examples both have seen and on the test split."""
        n = min(self.trials.n(BASE), self.trials.n(best))
        if not n:  # out of time before the first score
            self.trials.deadline = math.inf
            n = min(len(self.trials.split), self.options.first)
            self.trials.extend([BASE], n)
        return (
            compare(self.trials.first(BASE, n), self.trials.first(best, n)),
            compare(self.measure(BASE), self.measure(best)),
        )

    def _exhaustive(self) -> None:
        everything = [BASE, *(c.intervention for c in self.candidates)]
        self._begin("exhaustive", everything, len(self.trials.split))
        try:
            self.trials.extend(everything, len(self.trials.split))
        finally:
            self._choose(everything)

    def _race(self) -> None:
        predictions, seconds = self._screen()
        chosen, controls = choose(self.candidates, predictions, self.options, self.seed)
        entered = [*chosen, *controls]

        def on_rung(number: int, rungs: int, alive: Sequence[Intervention], stop: int) -> None:
            self._begin(f"rung {number} of {rungs}", alive, stop)

        try:
            for rung in race(self.trials, entered, self.candidates, self.metric, self.options, on_rung):
                self.rungs.append(rung)
                self.best = Intervention.parse(rung.leader)
                if self.screened is None:
                    self.screened = self._judged(predictions, chosen, controls, rung.examples, seconds)
        except OutOfTimeError:
            if not self.rungs:
                self._choose([BASE, *(c.intervention for c in entered)])
            raise

    def _compose(self, mode: Mode) -> None:
        predictions = self._screen()[0] if mode == "joint" else {}
        ordered = in_order(self.candidates, mode, predictions, self.options.width)

        def on_try(number: int, tried: Intervention) -> None:
            self._begin(f"trial {number + 1} of {len(ordered)}", [tried], len(self.trials.split))

        self._begin("compose", [BASE], len(self.trials.split))
        for step in compose(self.trials, ordered, self.metric, self.options.first, on_try):
            self.steps.append(step)
            self.best = Intervention.parse(step.intervention)

    def _choose(self, interventions: Sequence[Intervention]) -> None:
        """Keep the best on the examples that all of them that were scored at all have seen; of equals the earlier."""
        scored = [i for i in interventions if self.trials.n(i)]
        if scored:
            n = min(map(self.trials.n, scored))
            self.best = max(scored, key=lambda i: merit(self.trials.first(i, n), self.metric))

    def _screen(self) -> tuple[dict[str, Prediction], float]:
        """Screen all candidates, or take what an earlier process found; return it with the seconds it took."""
        if "screen" in self.run.notes:
            noted = self.run.notes["screen"]
            return {text: Prediction(*values) for text, values in noted["predictions"].items()}, noted["seconds"]
        self._begin("screen", [], 0)
        self._tell(BASE)
        start = time.perf_counter()
        # The last examples of the order: those of the first rungs then tell something new.
        split = self.trials.split
        first = max(0, len(split) - self.options.screened)
        rows = [replace(r, example=r.example - first) for r in self.trials.rows if r.example >= first]
        predictions: dict[str, Prediction] | None = None
        batch_size = self.trials.batch_size
        while predictions is None:
            try:
                predictions = screen(
                    self.lm,
                    split.examples[first:],
                    rows,
                    self.trials.scorer,
                    self.candidates,
                    cache=self.trials.cache,
                    batch_size=batch_size,
                    between_choices=self.metric == "accuracy" and self.trials.scorer == "choice",
                )
            except torch.OutOfMemoryError as error:
                full = too_large(self.lm, error)
            if predictions is None:  # outside the handler, whose traceback holds the failed pass's tensors
                if batch_size == 1:
                    raise full
                batch_size //= 2
                torch.cuda.empty_cache()
        seconds = time.perf_counter() - start
        noted = {text: [p.change, p.deviation, p.examples] for text, p in predictions.items()}
        self.run.note("screen", {"predictions": noted, "seconds": seconds})
        return predictions, seconds

    def _judged(
        self,
        predictions: dict[str, Prediction],
        chosen: Sequence[Candidate],
        controls: Sequence[Candidate],
        n: int,
        seconds: float,
    ) -> Screened:
        """Hold what the screen expected against what the first rung measured."""
        base = self.trials.first(BASE, n).loss
        sent = [str(c.intervention) for c in (*chosen, *controls) if str(c.intervention) in predictions]
        measured = {t: self.trials.first(Intervention.parse(t), n).loss - base for t in sent if t in self.trials.scores}
        expected = {t: predictions[t].expected for t in sent}
        both = list(measured)
        ranks = stats.spearmanr([expected[t] for t in both], [measured[t] for t in both]) if len(both) > 2 else None
        drawn = {str(c.intervention) for c in controls}
        pairs = [(measured[a], measured[b]) for a in both if a in drawn for b in both if b not in drawn]
        return Screened(
            examples=min(self.options.screened, len(self.trials.split)),
            candidates=len(predictions),
            chosen=len(chosen),
            controls=len(controls),
            correlation=None if ranks is None else float(ranks.statistic),
            controls_ahead=sum(a < b for a, b in pairs) / len(pairs) if pairs else None,
            seconds=seconds,
            expected=expected,
            measured=measured,
        )

    def _begin(self, stage: str, alive: Sequence[Intervention], stop: int, trials: Trials | None = None) -> None:
        """Note what is begun and what work it will take."""
        trials = trials or self.trials
        self._stage, self._alive = stage, len(alive)
        left = sum(trials.share(i) * max(0, stop - trials.n(i)) for i in alive if str(i) not in trials.failed)
        self._expected = self.trials.work + self.tests.work + left

    def _tell(self, last: Intervention) -> None:
        found = self.trials.scores.get(str(last)) if self._stage != "test" else None
        if found is not None:
            shown = self._shown
            if (
                shown is None
                or found.n > shown.n
                or (found.n == shown.n and merit(found, self.metric) > merit(shown, self.metric))
            ):
                self._shown = found
        self.on_step(
            Step(
                stage=self._stage,
                alive=self._alive,
                done=self.trials.work + self.tests.work,
                total=self._expected,
                scored=self.trials.scored + self.tests.scored,
                best=self._shown,
                last=str(last),
            )
        )
