"""The course of one search: how it goes on by each strategy, what it chooses and what it tells on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from scipy import stats

from laserlm.errors import ScoringError
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import Comparison, compare
from laserlm.scoring.records import Evaluation
from laserlm.searching.candidates import Candidate
from laserlm.searching.compose import compose, in_order
from laserlm.searching.desk import ScreenTask
from laserlm.searching.executors import OutOfTimeError
from laserlm.searching.ledger import ScoreLedger
from laserlm.searching.race import RaceOptions, choose, race, rung_sizes
from laserlm.searching.result import ComposeStep, Metric, Mode, RungReport, ScreenReport, SearchProgress, Strategy, sort_key
from laserlm.searching.screen import Prediction
from laserlm.store import Run

__all__ = ["SearchSession", "screen_size", "screen_tasks"]

BASE = Intervention()
FINALISTS = 4
"""Those that the loss ranks best, under which the model then writes."""
SCREEN_PASSES = 3
"""A pass through the model, another one block by block, and the gradient's way back, which skips that of the weights."""


@dataclass
class SearchSession:
    """One search: how it goes on by each strategy, and what it shows on the way.

    Args:
        run: where all is kept.
        trials: scores on the validation split.
        tests: scores on the test split.
        finals: scores of the last few on the validation split, as the test split is scored; ``trials`` itself unless what
            the model writes is judged.
        candidates: what may be chosen.
        metric: what the choice goes by.
        options: of the race and the screen.
        seed: of the controls.
        on_step: called after each piece of work.
    """

    run: Run
    trials: ScoreLedger
    tests: ScoreLedger
    finals: ScoreLedger
    candidates: Sequence[Candidate]
    metric: Metric
    options: RaceOptions
    seed: int
    on_step: Callable[[SearchProgress], None]
    best: Intervention = BASE
    rungs: list[RungReport] = field(default_factory=list)
    steps: list[ComposeStep] = field(default_factory=list)
    screened: ScreenReport | None = None
    _shown: Evaluation | None = None
    _stage: str = ""
    _alive: int = 0
    _expected: float = 0.0

    def __post_init__(self) -> None:
        self.trials.on_scored = self.tests.on_scored = self.finals.on_scored = self._tell
        # Where the model writes, candidates are told apart by the loss of the right answers, which needs no writing.
        self._ranked: Metric = self.metric if self.finals is self.trials else "loss"

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

    def confirm(self, complete: bool) -> dict[str, float]:
        """Let the model write under the best few and under none, keep what is best then, and return their accuracies.

        Where the time is used up, it writes under the best and under none.
        """
        n = len(self.trials.split)
        # By name, so that of equals it does not matter which was scored first.
        whole = [Intervention.parse(text) for text, e in sorted(self.trials.scores.items()) if e.n == n and text]
        ranked = sorted(whole, key=lambda i: sort_key(self.trials.first(i, n), "loss"), reverse=True)
        few = [self.best] if self.metric == "loss" or not complete else ranked[:FINALISTS]
        finalists = list(dict.fromkeys([BASE, *few, self.best]))
        self._begin("finalists", finalists, n, trials=self.finals)
        self.finals.extend(finalists, n)
        scored = [i for i in finalists if str(i) not in self.finals.failed]
        if self.best not in scored or self.metric == "accuracy":
            self.best = max(scored, key=lambda i: sort_key(self.finals.first(i, n), self.metric))
        return {str(i): self.finals.first(i, n).accuracy for i in scored}

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
        n = min(self.finals.n(BASE), self.finals.n(best))
        if not n:  # out of time before the first score
            self.finals.deadline = math.inf
            n = min(len(self.finals.split), self.options.first)
            self.finals.extend([BASE], n)
        validated = compare(self.finals.first(BASE, n), self.finals.first(best, n))
        return replace(validated, split=self.trials.split.name), compare(self.measure(BASE), self.measure(best))

    def _exhaustive(self) -> None:
        everything = [BASE, *(c.intervention for c in self.candidates)]
        self._begin("exhaustive", everything, len(self.trials.split))
        try:
            self.trials.extend(everything, len(self.trials.split))
        finally:
            scored = [i for i in everything if self.trials.n(i) and str(i) not in self.trials.failed]
            self._choose(scored, min(map(self.trials.n, scored), default=0))

    def _race(self) -> None:
        predictions, seconds = self._screen()
        chosen, controls = choose(self.candidates, predictions, self.options, self.seed)
        entered = [*chosen, *controls]

        def on_rung(number: int, rungs: int, alive: Sequence[Intervention], stop: int) -> None:
            self._begin(f"rung {number} of {rungs}", alive, stop)
            self._expected += self._later(alive, stop)

        try:
            for rung in race(self.trials, entered, self.candidates, self._ranked, self.options, on_rung):
                self.rungs.append(rung)
                self.best = Intervention.parse(rung.leader)
                if self.screened is None:
                    self.screened = self._judged(predictions, chosen, controls, rung.examples, seconds)
        except OutOfTimeError:
            # Of those that the last whole rung left, or of those that the first one came to.
            everything = [BASE, *(c.intervention for c in self.candidates)]
            self._choose(everything, self.rungs[-1].examples if self.rungs else min(self.options.first, len(self.trials.split)))
            raise

    def _later(self, alive: Sequence[Intervention], stop: int) -> float:
        """Return the work of the rungs after this one, if as many leave as may stay."""
        room, share, work = float(len(alive)), sum(map(self.trials.share, alive)) / len(alive), 0.0
        for later in rung_sizes(len(self.trials.split), self.options.first):
            if later > stop:
                room = max(1.0, self.options.keep * room)
                work += (later - stop) * (1 + room * share)
                stop = later
        return work

    def _compose(self, mode: Mode) -> None:
        predictions = self._screen()[0] if mode == "joint" else {}
        ordered = in_order(self.candidates, mode, predictions, self.options)

        def on_try(number: int, tried: Intervention) -> None:
            self._begin(f"trial {number + 1} of {len(ordered)}", [tried], len(self.trials.split))

        self._begin("compose", [BASE], len(self.trials.split))
        for step in compose(self.trials, ordered, self._ranked, self.options.first, on_try):
            self.steps.append(step)
            self.best = Intervention.parse(step.intervention)

    def _choose(self, interventions: Sequence[Intervention], n: int) -> None:
        """Keep the best of those that were scored on ``n`` examples and did not fail later; of equals the earlier."""
        scored = [i for i in interventions if n and self.trials.n(i) >= n and str(i) not in self.trials.failed]
        self.best = max(scored, key=lambda i: sort_key(self.trials.first(i, n), self._ranked), default=BASE)

    def _screen(self) -> tuple[dict[str, Prediction], float]:
        """Screen all candidates, or take what an earlier process found; return it with the seconds it took."""
        if "screen" in self.run.notes:
            noted = self.run.notes["screen"]
            return {text: Prediction(*values) for text, values in noted["predictions"].items()}, noted["seconds"]
        self._begin("screen", [], 0)
        self._tell(BASE)
        start = time.perf_counter()
        predictions: dict[str, Prediction] = {}
        executor, n = self.trials.executor, self._to_screen
        # The last examples of the order: those of the first rungs then tell something new.
        first = len(self.trials.split) - n
        between_choices = self._ranked == "accuracy" and self.trials.material.scorer == "choice"
        shares = screen_tasks(self.candidates, self.trials.name, first, SCREEN_PASSES * n, executor.workers, between_choices)
        for _, found in executor.run(shares, deadline=self.trials.deadline, needless=lambda _: False):
            if isinstance(found, str):
                raise ScoringError(f"the screen could not be made: {found}")
            predictions |= found
        seconds = time.perf_counter() - start
        noted = {text: [p.change, p.deviation, p.examples] for text, p in predictions.items()}
        self.run.note("screen", {"predictions": noted, "seconds": seconds})
        return predictions, seconds

    @property
    def _to_screen(self) -> int:
        return screen_size(len(self.trials.split), self.options)

    def _judged(
        self,
        predictions: dict[str, Prediction],
        chosen: Sequence[Candidate],
        controls: Sequence[Candidate],
        n: int,
        seconds: float,
    ) -> ScreenReport:
        """Hold what the screen expected against what the first rung measured."""
        base = self.trials.first(BASE, n).loss
        sent = [str(c.intervention) for c in (*chosen, *controls) if str(c.intervention) in predictions]
        of_rung = {t: i for t in sent if self.trials.n(i := Intervention.parse(t)) >= n}
        measured = {t: self.trials.first(i, n).loss - base for t, i in of_rung.items()}
        expected = {t: predictions[t].expected for t in sent}
        both = list(measured)
        ranks = stats.spearmanr([expected[t] for t in both], [measured[t] for t in both]) if len(both) > 2 else None
        drawn = {str(c.intervention) for c in controls}
        pairs = [(measured[a], measured[b]) for a in both if a in drawn for b in both if b not in drawn]
        return ScreenReport(
            examples=self._to_screen,
            candidates=len(predictions),
            chosen=len(chosen),
            controls=len(controls),
            correlation=float(ranks.statistic) if ranks is not None and math.isfinite(ranks.statistic) else None,
            controls_ahead=sum(a < b for a, b in pairs) / len(pairs) if pairs else None,
            seconds=seconds,
            expected=expected,
            measured=measured,
        )

    @property
    def _all(self) -> list[ScoreLedger]:
        return [self.trials, self.tests, *([] if self.finals is self.trials else [self.finals])]

    @property
    def _done(self) -> float:
        return sum(t.work for t in self._all)

    def _begin(self, stage: str, alive: Sequence[Intervention], stop: int, trials: ScoreLedger | None = None) -> None:
        """Note what is begun and what work it will take."""
        trials = trials or self.trials
        self._stage, self._alive = stage, len(alive)
        left = sum(trials.share(i) * max(0, stop - trials.n(i)) for i in alive if str(i) not in trials.failed)
        self._expected = self._done + left

    def _tell(self, last: Intervention) -> None:
        found = self.trials.scores.get(str(last)) if self._stage not in ("test", "finalists") else None
        if found is not None:
            shown = self._shown
            if (
                shown is None
                or found.n > shown.n
                or (found.n == shown.n and sort_key(found, self._ranked) > sort_key(shown, self._ranked))
            ):
                self._shown = found
        self.on_step(
            SearchProgress(
                stage=self._stage,
                alive=self._alive,
                done=self._done,
                total=self._expected,
                scored=sum(t.scored for t in self._all),
                best=self._shown,
                last=str(last),
            )
        )


def screen_size(examples: int, options: RaceOptions) -> int:
    """Return the number of examples to screen: those beyond the first rung, or half of them all where that is more."""
    return min(options.screened, max(examples - options.first, (examples + 1) // 2))


def screen_tasks(
    candidates: Sequence[Candidate], material: str, first: int, work: float, workers: int, between_choices: bool = False
) -> list[ScreenTask]:
    """Return the screen as a piece for each process: all pass the gradient, each decomposes its share of the matrices."""
    matrices = {m: number for number, m in enumerate(dict.fromkeys(c.matrix for c in candidates))}
    shares: list[list[Candidate]] = [[] for _ in range(min(workers, len(matrices)))]
    for candidate in candidates:
        shares[matrices[candidate.matrix] % len(shares)].append(candidate)
    return [ScreenTask(material, first, tuple(share), between_choices, work) for share in shares]
