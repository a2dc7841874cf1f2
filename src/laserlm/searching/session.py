"""The state of one search: its ledgers, its choice so far, and what it reports on the way."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice

from laserlm.errors import ScoringError
from laserlm.reductions import Intervention, short_form
from laserlm.scoring.evaluate import Comparison, compare
from laserlm.scoring.records import Evaluation
from laserlm.scoring.scorers import GENERATING
from laserlm.searching.candidates import Candidate
from laserlm.searching.config import Metric, SearchConfig
from laserlm.searching.executors import OutOfTimeError
from laserlm.searching.guard import Guard, Harm
from laserlm.searching.ledger import BASE, ScoreLedger
from laserlm.searching.race import is_significantly_worse
from laserlm.searching.result import ComposeStep, Point, RungReport, ScreenReport, SearchProgress, sort_key
from laserlm.store import Run

log = logging.getLogger(__name__)
MAX_FINALISTS = 4
"""Number of candidates, the best by loss, under which the model generates text."""
MAX_HARMS = 16
"""Most candidates, the best by validation, whose harm a race or an exhaustive search measures for its map and its list."""
FIRST_HARM_EXAMPLES = 16
"""Examples of a guard after which candidates are left out that another one beats in gain, loss and harm."""
HARM_DELTA = 0.001
"""Largest error probability of saying, for the list of gain against harm, that a candidate has more harm than another one."""
MEAN_SHARE = 0.5
"""Part of the blocks that a pass runs, where it is not known what is scored."""
GENERATED_PASSES = 8.0
"""Passes of one example that the writing of an answer counts as, about. Only the progress display uses it."""


@dataclass(frozen=True)
class GuardScores:
    """The scores on the two parts of a guard."""

    guard: Guard
    choosing: ScoreLedger
    measuring: ScoreLedger

    def choosing_harm(self, intervention: Intervention) -> Harm:
        """Return the harm on the part that a search looks at when it chooses."""
        return self._harm(self.choosing, intervention)

    def measured_harm(self, intervention: Intervention) -> Harm:
        """Return the harm on the part that a search does not look at when it chooses."""
        return self._harm(self.measuring, intervention)

    def _harm(self, ledger: ScoreLedger, intervention: Intervention) -> Harm:
        """Return the harm on one part.

        Raises:
            ScoringError: if the intervention cannot be scored there.
        """
        n, text = len(ledger.split), str(intervention)
        ledger.extend([BASE, intervention], n)
        if text in ledger.failed:
            raise ScoringError(f"{short_form(text)} cannot be scored on the guard {self.guard.name}: {ledger.failed[text]}")
        return Harm(self.guard.name, self.guard.kind, compare(ledger.first(BASE, n), ledger.first(intervention, n)))


@dataclass
class SearchSession:
    """One search.

    Args:
        run: where all scores are kept.
        on_validation: scores on the validation split.
        on_test: scores on the test split.
        on_finalists: scores of the finalists on the validation split, by the scorer of the task. The same ledger as
            ``on_validation`` unless the scorer grades generated text.
        candidates: what may be chosen.
        config: the settings, complete (``SearchConfig.for_task``).
        guards: scores on the guards.
        on_step: called after each part of the work.
        on_stage: called when a stage begins.
        start: value of ``time.monotonic`` at which the search began.

    Attributes:
        best: the best intervention so far.
        rungs: reports of the rungs of a race.
        steps: accepted steps of a composition.
        screen_report: how the screen ranked the candidates of a race.
        is_chosen: whether the strategy has come to its choice.
        harms: harm on the choosing parts of the guards, by the canonical text of what the search looked at the harm of.
        phases: seconds by the first word of the stages, up to the present stage.
    """

    run: Run
    on_validation: ScoreLedger
    on_test: ScoreLedger
    on_finalists: ScoreLedger
    candidates: Sequence[Candidate]
    config: SearchConfig
    guards: Sequence[GuardScores]
    on_step: Callable[[SearchProgress], None]
    on_stage: Callable[[SearchProgress], None] = lambda _: None
    start: float = field(default_factory=time.monotonic)
    best: Intervention = BASE
    rungs: list[RungReport] = field(default_factory=list)
    steps: list[ComposeStep] = field(default_factory=list)
    screen_report: ScreenReport | None = None
    is_chosen: bool = False
    harms: dict[str, tuple[Harm, ...]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    _best_shown: Evaluation | None = None
    _are_harms_compared: bool = False
    _stage: str = "start"
    _n_interventions: int = 0
    _other_cost: float = 0.0
    _expected_cost: float = 0.0

    def __post_init__(self) -> None:
        self._stage_start = self.start
        for ledger in self._ledgers:
            ledger.on_scored = self.report_progress

    @property
    def generates(self) -> bool:
        """Whether the scorer grades text that the model generates."""
        return self.on_finalists is not self.on_validation

    @property
    def ranking_metric(self) -> Metric:
        """What candidates are ranked by: for generated text the loss of the right answers, which needs no generation."""
        return "loss" if self.generates else self.config.metric or "accuracy"

    @property
    def between_choices(self) -> bool:
        """Whether choices are compared, so that the loss of the right one among all tokens means little."""
        return self.ranking_metric == "accuracy" and self.on_validation.encoded.scorer == "choice"

    def begin(
        self,
        stage: str,
        interventions: Sequence[Intervention],
        stop: int,
        ledger: ScoreLedger | None = None,
        *,
        later: float = 0.0,
    ) -> None:
        """Note and report the stage that begins, and the work that is left.

        Args:
            stage: its name.
            interventions: what is scored.
            stop: number of examples that they are scored on.
            ledger: where; None takes the validation split.
            later: expected work up to the choice that this stage does not count, in passes of one example.
        """
        self.end_stage()
        ledger = ledger or self.on_validation
        self._stage, self._n_interventions = stage, len(interventions)
        left = _cost_left(ledger, interventions, stop, ledger)
        self._expected_cost = self._cost + left + later + self._cost_after_choice(ledger, interventions)
        self.on_stage(self._progress(BASE))

    def end_stage(self) -> None:
        """Add the time since the present stage began to its phase."""
        now, phase = time.monotonic(), self._stage.split()[0]
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._stage_start
        self._stage_start = now

    def count(self, cost: float) -> None:
        """Count work that no ledger counts, in passes of one example."""
        self._other_cost += cost

    def _cost_after_choice(self, current: ScoreLedger, interventions: Sequence[Intervention]) -> float:
        """Return the expected work on finalists, on the test split and on harm, without that of the current stage."""
        cost = 0.0
        if self.generates and current is not self.on_finalists and not self.is_chosen:
            n_finalists = 1 + MEAN_SHARE * MAX_FINALISTS
            cost += _passes(self.on_finalists) * n_finalists * len(self.on_finalists.split)
        for ledger in (self.on_test, *(guard.measuring for guard in self.guards)):
            n = len(ledger.split)
            wanted = dict.fromkeys([BASE, self.best] if self.is_chosen else [BASE])
            others = [i for i in wanted if ledger is not current or i not in interventions]
            cost += _cost_left(ledger, others, n, self.on_validation)
            cost += 0.0 if self.is_chosen else _passes(ledger) * MEAN_SHARE * n
        if self.config.strategy in ("race", "exhaustive") and not self._are_harms_compared:
            of_guards = sum(_passes(guard.choosing) * len(guard.choosing.split) for guard in self.guards)
            cost += (1 + MEAN_SHARE * MAX_HARMS) * of_guards
        return cost

    def choose(self, interventions: Sequence[Intervention], n: int) -> None:
        """Keep the best of those that were scored on ``n`` examples and did not fail later; of equals the earlier."""
        ledger = self.on_validation
        scored = [i for i in interventions if n and ledger.n(i) >= n and str(i) not in ledger.failed]
        if scored and BASE not in scored:  # it is the last of a rung, and the time was used up before
            ledger.deadline = math.inf
            ledger.extend([BASE], n)
            scored = [BASE, *scored]
        ranked = self._best_first(scored, n)
        for guard in self.guards:
            guard.choosing.deadline = math.inf  # what was chosen has to be within the bound, also where the time is used up
        self.best = next(filter(self.allows, ranked), BASE)

    def _best_first(self, interventions: Iterable[Intervention], n: int) -> list[Intervention]:
        """Return interventions by their scores on the first ``n`` validation examples; of equals the earlier first."""
        ledger = self.on_validation
        return sorted(interventions, key=lambda i: sort_key(ledger.first(i, n), self.ranking_metric), reverse=True)

    def confirm(self, *, complete: bool) -> dict[str, float]:
        """Generate text under the best few and under the unchanged model; keep the best of them, return their accuracies.

        Where the time is used up, the model generates under the best and the unchanged model alone.
        """
        ledger, metric = self.on_finalists, self.config.metric or "accuracy"
        n = len(ledger.split)
        # Sorted by name, so that of equals it does not matter which was scored first.
        fully_scored = [Intervention.parse(t) for t, e in sorted(self.on_validation.scores.items()) if e.n == n and t]
        ranked = sorted(fully_scored, key=lambda i: sort_key(self.on_validation.first(i, n), "loss"), reverse=True)
        allowed = islice(filter(self.allows, ranked), MAX_FINALISTS)
        # A set of components that was not accepted is no finalist, whatever its loss is.
        is_chosen = metric == "loss" or not complete or self.config.is_of_components
        few = [self.best] if is_chosen else list(allowed)
        finalists = list(dict.fromkeys([BASE, *few, self.best]))
        self.is_chosen = False  # the finalists decide
        self.begin("finalists", finalists, n, ledger)
        ledger.extend(finalists, n)
        scored = [i for i in finalists if str(i) not in ledger.failed]
        if self.best not in scored or metric == "accuracy":
            self.best = max(scored, key=lambda i: sort_key(ledger.first(i, n), metric))
        self.is_chosen = True
        return {str(i): ledger.first(i, n).accuracy for i in scored}

    def harm_of(self, intervention: Intervention) -> tuple[Harm, ...]:
        """Return the harm of an intervention on the choosing parts of the guards."""
        text = str(intervention)
        if text not in self.harms:
            self.harms[text] = tuple(guard.choosing_harm(intervention) for guard in self.guards)
        return self.harms[text]

    def allows(self, intervention: Intervention) -> bool:
        """Return whether the harm of an intervention, and one standard error more, is within the bound on every guard.

        Without a bound the harm is not looked at.
        """
        if not intervention or math.isinf(self.config.harm_bound):
            return True
        return self.harm_used(intervention) <= self.config.harm_bound

    @property
    def harm_left(self) -> float:
        """What the best so far leaves of the bound, in nats per token."""
        return max(0.0, self.config.harm_bound - (self.harm_used(self.best) if self.best else 0.0))

    def harm_used(self, intervention: Intervention) -> float:
        """Return the harm of an intervention and one standard error more, on the guard where this is largest."""
        return max((harm.change + harm.error for harm in self.harm_of(intervention)), default=0.0)

    @property
    def points(self) -> tuple[Point, ...]:
        """Gain and harm of all that were scored on every validation example and whose harm was looked at."""
        ledger, n = self.on_validation, len(self.on_validation.split)
        scored = [text for text in self.harms if ledger.scores.n(text) >= n]
        base = ledger.first(BASE, n) if scored else None
        return tuple(Point(t, compare(base, ledger.scores.first(t, n)), self.harms[t]) for t in scored if base is not None)

    def compare_harms(self) -> None:
        """Measure the harm of the candidates that were scored on every validation example, of the best ``MAX_HARMS`` at most.

        It is for the list of gain against harm and for the map. The choice stays as it is. What another candidate beats in
        gain and loss, and clearly in harm on the first examples, is hardly in the list: its harm is not measured further.
        Where the time is used up, the harm of some is not measured, and a warning says of how many.
        """
        ledger, n = self.on_validation, len(self.on_validation.split)
        scored = [Intervention.parse(t) for t in sorted(ledger.scores) if t and ledger.scores.n(t) >= n]
        few = list(dict.fromkeys([*([self.best] if self.best else []), *self._best_first(scored, n)]))[:MAX_HARMS]
        self._are_harms_compared = True
        if not (few and self.guards):
            return
        if max(len(guard.choosing.split) for guard in self.guards) > FIRST_HARM_EXAMPLES:
            self._score_guards(few, FIRST_HARM_EXAMPLES)
            few = [i for i in few if i == self.best or str(i) in self.harms or not self._is_beaten(i, few)]
        self._score_guards(few)
        measured = [i for i in few if all(g.choosing.n(i) >= len(g.choosing.split) for g in self.guards)]
        for intervention in measured:
            self.harm_of(intervention)
        if len(measured) < len(few):
            reasons = {reason for g in self.guards for i in few if (reason := g.choosing.failed.get(str(i)))}
            log.warning(
                "the harm of %d of the %d best candidates is not measured: %s",
                len(few) - len(measured),
                len(few),
                "; ".join(sorted(reasons)) or "the time was used up",
            )

    def _score_guards(self, interventions: Sequence[Intervention], most: int | None = None) -> None:
        """Score on what the search looks at of each guard, on all or on the first examples; as far as there is time."""
        for guard in self.guards:
            choosing = guard.choosing
            stop = len(choosing.split) if most is None else min(most, len(choosing.split))
            choosing.deadline = self.on_validation.deadline
            scored = [BASE, *interventions]
            whole, part = (_cost_left(choosing, scored, n, choosing) for n in (len(choosing.split), stop))
            self.begin("harm", scored, stop, choosing, later=whole - part)
            with suppress(OutOfTimeError):  # a warning counts what is missing
                choosing.extend(scored, stop)
            choosing.deadline = math.inf

    def _is_beaten(self, one: Intervention, others: Sequence[Intervention]) -> bool:
        """Return whether another one has no less gain, no more loss, and clearly less harm on the first examples of guards."""
        n = len(self.on_validation.split)
        ours = self.on_validation.first(one, n)

        def beats(other: Intervention) -> bool:
            theirs = self.on_validation.first(other, n)
            no_worse = theirs.accuracy >= ours.accuracy and theirs.loss <= ours.loss
            return no_worse and all(_has_less_harm(guard.choosing, other, one) for guard in self.guards)

        return any(beats(other) for other in others if other != one)

    def measure_harms(self) -> tuple[Harm, ...]:
        """Return what the best costs on the measuring parts of the guards."""
        harms = []
        for guard in self.guards:
            self.begin("harm", list(dict.fromkeys([BASE, self.best])), len(guard.measuring.split), guard.measuring)
            harms.append(guard.measured_harm(self.best))
        return tuple(harms)

    def try_test(self, *, later: float) -> None:
        """Score the unchanged model on one batch of the test split, so that a split that cannot be scored is reported early.

        Args:
            later: see ``begin``.

        Raises:
            ScoringError: if it cannot be scored there.
        """
        ledger = self.on_test
        self.begin("test", [BASE], len(ledger.split), ledger, later=later)
        ledger.extend([BASE], min(len(ledger.split), self.config.batch_size))

    def measure(self, best: Intervention) -> tuple[Evaluation, Evaluation]:
        """Score the unchanged model and the best on all of the test split, from the same cached activations.

        Raises:
            ScoringError: if one of them cannot be scored there.
        """
        ledger, pair, n = self.on_test, list(dict.fromkeys([BASE, best])), len(self.on_test.split)
        if any(ledger.n(i) < n for i in pair):
            self.begin("test", pair, n, ledger)
            ledger.extend(pair, n)
        if str(best) in ledger.failed:
            raise ScoringError(
                f"{short_form(best)} cannot be scored on the test split: {ledger.failed[str(best)]}; leave it out of the grid, "
                "or load the model with another dtype"
            )
        return ledger.scores[""], ledger.scores[str(best)]

    def compare(self, best: Intervention) -> tuple[Comparison, Comparison]:
        """Compare the unchanged model with the best, on the validation examples that both have, and on the test split."""
        ledger = self.on_finalists
        n = min(ledger.n(BASE), ledger.n(best))
        if not n:  # out of time before the first score
            ledger.deadline = math.inf
            n = min(len(ledger.split), self.config.first_rung)
            ledger.extend([BASE], n)
        on_validation = compare(ledger.first(BASE, n), ledger.first(best, n))
        on_test = compare(*self.measure(best))
        return replace(on_validation, split=self.on_validation.split.name), on_test

    def report_progress(self, last: Intervention) -> None:
        """Report what is done after an intervention was scored."""
        scores = self.on_validation.scores.get(str(last)) if self._stage not in ("test", "finalists") else None
        if scores is not None and (self._best_shown is None or self._rank(scores) > self._rank(self._best_shown)):
            self._best_shown = scores
        self.on_step(self._progress(last))

    def _progress(self, last: Intervention) -> SearchProgress:
        return SearchProgress(
            stage=self._stage,
            alive=self._n_interventions,
            done=self._cost,
            total=max(self._cost, self._expected_cost),
            scored=sum(ledger.scored for ledger in self._ledgers),
            best=self._best_shown,
            last=str(last),
        )

    def _rank(self, scores: Evaluation) -> tuple[float, ...]:
        return (scores.n, *sort_key(scores, self.ranking_metric))

    @property
    def _ledgers(self) -> list[ScoreLedger]:
        of_guards = [ledger for guard in self.guards for ledger in (guard.choosing, guard.measuring)]
        return [self.on_validation, self.on_test, *([self.on_finalists] if self.generates else []), *of_guards]

    @property
    def _cost(self) -> float:
        return self._other_cost + sum(_passes(ledger) * ledger.cost for ledger in self._ledgers)


def _has_less_harm(choosing: ScoreLedger, one: Intervention, other: Intervention) -> bool:
    """Return whether one has significantly less loss than another on the first examples of a guard that both have."""
    n = min(choosing.n(one), choosing.n(other), FIRST_HARM_EXAMPLES)
    return n > 0 and is_significantly_worse(choosing.first(one, n), choosing.first(other, n), "loss", HARM_DELTA)


def _passes(ledger: ScoreLedger) -> float:
    """Return the passes of an example that a ledger counts as one: of several tokens where the model writes."""
    return GENERATED_PASSES if ledger.encoded.scorer in GENERATING else 1.0


def _cost_left(ledger: ScoreLedger, interventions: Iterable[Intervention], stop: int, shares: ScoreLedger) -> float:
    """Return the work that is left on the first ``stop`` examples; ``shares`` says what part of the blocks is run."""
    left = {i: max(0, stop - ledger.n(i)) for i in interventions if str(i) not in ledger.failed}
    return _passes(ledger) * sum((shares.share(i) if i else 1.0) * n for i, n in left.items() if n)
