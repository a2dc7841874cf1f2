"""Choose single components to remove: the most gain on the questions for the least harm on the guards.

The derivative c_ei of the loss of question e by the strength of component i says what its removal changes: -c_ei to first
order. The mean loss of the questions falls by ``mean(x) - var(x) / 2``, where x_e is the sum of c_ei over all components that
are removed: the log-loss bends upwards by the variance of its slope. On text that the model wrote itself, the divergence
rises by half the Fisher information of each strength.

Components are removed in steps. A step takes components by their gain for their harm, and puts back earlier ones that have
become useful. It is then measured. The validation questions are three parts. Two of them choose a step, the third accepts it,
and they take turns. So no question accepts a step that was chosen on it. Where no step is accepted by any of the parts, the
search ends: the chance that useless steps alone are accepted is ``delta`` at most.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from laserlm.errors import ScoringError
from laserlm.linalg.decomposition import ALGORITHM
from laserlm.models.matrices import Matrix
from laserlm.paths import atomic_file
from laserlm.reductions import Intervention, Layers, Reduction, Size, Strengths
from laserlm.scoring.identity import digest
from laserlm.searching.candidates import Candidate
from laserlm.searching.config import LEAST_FACTS, Metric, SearchConfig
from laserlm.searching.guard import PASSAGES
from laserlm.searching.ledger import BASE, ScoreLedger
from laserlm.searching.memory_plan import GIB, memory_option
from laserlm.searching.race import is_significantly_worse
from laserlm.searching.scorer import Failure
from laserlm.searching.session import GuardScores, SearchSession
from laserlm.searching.work import SCREEN_PASSES, contribution_tasks

log = logging.getLogger(__name__)
STEP_COMPONENTS = 150
"""Components that a step changes at most."""
MIN_GAIN = 0.001
"""Least gain that a component is expected to have, in nats per answer token of the mean question."""
LEAST_HARM = 2e-5
"""Harm that a component counts with at least, in nats per token; smaller ones cannot be told apart."""
STEP_SHARE, LEAST_SHARE = 0.5, 0.03
"""Shares of the harm that is left within the bound: what a step is expected to use at most, and below what none is tried."""
LEAST_QUESTIONS = 8
"""Questions of each part that choose a step in any case."""
DERIVATIVE_BYTES = 16
"""Bytes of ``--memory`` for each derivative of a question by a component: a quarter of it is for derivatives."""
MOST_KEPT = 2**28
"""Bytes of the gradients of a guard's passages, at most, that the cache keeps."""
COLUMNS = 8192
"""Components whose errors are computed together, which bounds the memory."""
PARTS = LEAST_FACTS
"""Parts of the validation questions, of which one accepts what the others choose."""


def choose_components(session: SearchSession) -> None:
    """Remove components step by step, as long as the validation questions gain and the guards keep within the bound.

    Questions of too few facts choose nothing.

    Raises:
        WeightError: if derivatives are not finite.
        OutOfTimeError: if the time is used up.
    """
    ledger = session.on_validation
    n = len(ledger.split)
    session.begin("components", [BASE], n, later=min(session.config.steps, PARTS) * cost_of_step(n, session.config))
    ledger.extend([BASE], len(ledger.split))
    trials = _Trials(session)
    while trials.parts and len(trials.done) < session.config.steps and trials.failures < PARTS:
        trials.next()


@dataclass
class _Trials:
    """The steps that were tried so far.

    Attributes:
        done: what each trial tried. It is noted with the run, so that a search that continues takes no gradient twice.
        judge: the part of the questions that accepts the next step; the others choose it.
        failures: parts in a row that accepted no step.
        share: of the harm that is left, which the next step is expected to use at most.
        warned: whether a warning names the questions for which there is no room.
    """

    session: SearchSession
    done: list[str] = field(default_factory=list)
    judge: int = 0
    failures: int = 0
    share: float = STEP_SHARE
    warned: bool = False

    def __post_init__(self) -> None:
        self.pool = ComponentPool(separate_matrices(self.session.candidates))
        self.noted: list[str] = self.session.run.notes.get("trials", [])
        self.facts = [e.fact or e.id for e in self.session.on_validation.split]
        self.parts = parts_of(self.facts)
        self._harm: Tensor | None = None
        self._derivatives: Tensor | None = None

    def next(self) -> None:
        """Choose a step on two parts, and accept it if the third one gains and the guards keep within the bound."""
        session, number = self.session, len(self.done)
        tried = Intervention.parse(self.noted[number]) if number < len(self.noted) else self._choose()
        self.done.append(str(tried))
        if number >= len(self.noted):
            session.run.note("trials", self.done)
        session.begin(f"step {number + 1}", [tried], len(self.facts), later=self._later)
        if tried == session.best or not self._is_better(tried):
            self._take_turns(failed=True)
        elif session.allows(tried):
            session.best = tried
            self._take_turns(failed=False)
        else:
            self.share /= 4
            if self.share < LEAST_SHARE:
                self._take_turns(failed=True)

    @property
    def _later(self) -> float:
        """Expected work after the present step: at least until no part of the questions has accepted one."""
        steps = min(PARTS - self.failures, self.session.config.steps - len(self.done))
        return max(0, steps) * cost_of_step(len(self.facts), self.session.config)

    def _take_turns(self, *, failed: bool) -> None:
        self.judge = (self.judge + 1) % PARTS
        self.failures = self.failures + 1 if failed else 0
        self.share = STEP_SHARE
        self._derivatives = None

    def _is_better(self, tried: Intervention) -> bool:
        """Return whether the part that did not choose a step is significantly better after it than before.

        Steps are tested one after the other, and the search ends at the first one that no part accepts. So each step has
        all of ``delta`` for itself, in shares for the parts.
        """
        session, ledger = self.session, self.session.on_validation
        n = len(ledger.split)
        ledger.extend([tried], n)
        if ledger.fails(tried, n):
            return False
        part = self.parts[self.judge]
        before, after = (
            replace(e, scores=e.scores[part.start : part.stop]) for e in (ledger.first(i, n) for i in (session.best, tried))
        )
        metric: Metric = "accuracy" if session.between_choices else "loss"
        return is_significantly_worse(after, before, metric, session.config.delta / PARTS)

    def _questions(self) -> list[int]:
        """Return the questions that choose the next step: as many as their derivatives have room for."""
        others = [part for number, part in enumerate(self.parts) if number != self.judge]
        asked = questions_with_room(self.session.config, len(self.pool), others, warn=not self.warned)
        self.warned = True
        return asked

    def _choose(self) -> Intervention:
        session, ledger = self.session, self.session.on_validation
        if self._harm is None:
            self._harm = self.pool.harm(session)
        chosen_on = self._questions()
        if self._derivatives is None:
            later = self._later + SCREEN_PASSES * len(chosen_on)
            session.begin(f"gradient {len(self.done) + 1}", [session.best], 0, later=later)
            session.report_progress(session.best)
            self._derivatives = derivatives_of(
                ledger, chosen_on, session.best, self.pool.matrices, between_choices=session.between_choices
            )
        facts, allowed = [self.facts[i] for i in chosen_on], self.share * session.harm_left
        taken = self.pool.taken(session.best)
        removed = taken.nonzero()[:, 0].tolist()
        changed = choose_step(self._derivatives, facts, self._harm, removed, cap=STEP_COMPONENTS, allowed=allowed)
        taken[changed] = 1 - taken[changed]
        return self.pool.intervention(taken)


@dataclass(frozen=True)
class ComponentPool:
    """The components of some matrices, numbered one matrix after the other; K in all.

    Args:
        matrices: of which no two share weights.
    """

    matrices: Sequence[Matrix]

    def __len__(self) -> int:
        return sum(m.max_rank for m in self.matrices)

    def intervention(self, taken: Tensor) -> Intervention:
        """Return the intervention that takes a share away from each component; ``taken`` is (K,)."""
        reductions = []
        for m, of_matrix in zip(self.matrices, taken.split([m.max_rank for m in self.matrices]), strict=True):
            if numbers := of_matrix.nonzero()[:, 0].tolist():
                strengths = Strengths.of({i: 1 - float(of_matrix[i]) for i in numbers})
                layers = Layers(first=m.layer, last=m.layer)
                reductions.append(Reduction(layers, m.name, Size(scale=strengths), stack=m.stack))
        return Intervention(tuple(reductions))

    def taken(self, intervention: Intervention) -> Tensor:
        """Return what an intervention that ``intervention`` returned takes away from each component, (K,)."""
        strengths = {(r.stack, r.layers.first, r.matrix): r.size.strengths or {} for r in intervention.reductions}
        taken = torch.zeros(len(self))
        for m, of_matrix in zip(self.matrices, taken.split([m.max_rank for m in self.matrices]), strict=True):
            for i, strength in strengths.get((m.stack, m.layer, m.name), {}).items():
                of_matrix[i] = 1 - strength
        return taken

    def harm(self, session: SearchSession) -> Tensor:
        """Return what the removal of each component is expected to cost on the guards, (K,), in nats per token.

        It is half the mean over tokens of the squared derivative; with several guards the largest one.
        """
        return torch.stack([self._harm(session, guard.choosing) for guard in session.guards]).amax(0)

    def _harm(self, session: SearchSession, ledger: ScoreLedger) -> Tensor:
        """Return the harm on one guard. It does not depend on the task, so the cache keeps it for other searches."""
        file = self._file_of(ledger)
        with suppress(OSError, SafetensorError):
            return load_file(file)["harm"]
        squares = self._guard_derivatives(session, ledger, range(len(ledger.split)), squared=True)[0]
        harm = squares / sum(len(s.targets) for s in ledger.encoded.sequences) / 2
        with suppress(OSError, SafetensorError), atomic_file(file) as part:
            save_file({"harm": harm}, part)
        return harm

    def _file_of(self, ledger: ScoreLedger) -> Path:
        lm = ledger.lm
        tokens = [(s.ids, s.decoder, s.targets) for s in ledger.encoded.sequences]
        pooling = None if lm.pooling is None else lm.pooling.as_dict()
        of_guard = [ledger.encoded.scorer, ledger.split.hash, tokens]
        key = digest([lm.hash, pooling, str(lm.dtype), ALGORITHM, [m.id for m in self.matrices], of_guard])
        return lm.cache / "texts" / f"{key}.safetensors"

    def harm_and_passages(self, session: SearchSession) -> tuple[Tensor, list[Tensor]]:
        """Return ``harm``, and the gradients of some passages or questions of each guard, (P, K) each.

        The gradients are scaled for ``strengths.expected_harm``.
        """
        both = [self._harm_and_passages(session, guard) for guard in session.guards]
        return torch.stack([harm for harm, _ in both]).amax(0), [passages for _, passages in both]

    def _harm_and_passages(self, session: SearchSession, guard: GuardScores) -> tuple[Tensor, Tensor]:
        """Return harm (K,) and passages (P, K) of a guard. Those of a text come from one gradient, which the cache keeps."""
        ledger = guard.choosing
        if guard.guard.kind != "text":
            return self._harm(session, ledger), self._passages(session, ledger)
        file = self._file_of(ledger)
        with suppress(OSError, SafetensorError, KeyError):
            kept = load_file(file)
            return kept["harm"], kept["passages"]
        both = self._guard_derivatives(session, ledger, range(len(ledger.split)), both=True)
        tokens = sum(len(s.targets) for s in ledger.encoded.sequences)
        harm, passages = both[-1] / tokens / 2, both[:-1].div_(tokens**0.5)
        computed = {"harm": harm} | ({"passages": passages} if passages.nbytes <= MOST_KEPT else {})
        with suppress(OSError, SafetensorError), atomic_file(file) as part:
            save_file(computed, part)
        return harm, passages

    def _passages(self, session: SearchSession, ledger: ScoreLedger) -> Tensor:
        """Return the gradients of some questions of a guard, (P, K), scaled for ``strengths.expected_harm``."""
        asked = range(min(PASSAGES, len(ledger.split)))
        tokens, sequences = torch.zeros(len(asked)), torch.zeros(len(asked))
        for s in ledger.encoded.sequences:
            if s.example in asked:
                tokens[s.example] += len(s.targets)
                sequences[s.example] += 1
        tokens /= sequences  # of the right choice, about: the others have no part in the loss
        return self._guard_derivatives(session, ledger, asked) * (tokens / tokens.sum() ** 0.5)[:, None]

    def _guard_derivatives(
        self,
        session: SearchSession,
        ledger: ScoreLedger,
        asked: Sequence[int],
        *,
        squared: bool = False,
        both: bool = False,
    ) -> Tensor:
        of_steps = PARTS * cost_of_step(len(session.on_validation.split), session.config)
        later = SCREEN_PASSES * len(ledger.split) + of_steps
        session.begin(f"harm on {ledger.split.task}", [BASE], 0, later=later)
        session.report_progress(BASE)
        return derivatives_of(ledger, asked, BASE, self.matrices, squared=squared, both=both)


def cost_of_step(questions: int, config: SearchConfig) -> float:
    """Return the work of a step, in passes of one example: the gradient over the questions that choose, and the trial."""
    return SCREEN_PASSES * min(config.gradient_examples, questions * (PARTS - 1) / PARTS) + questions


def room_for_derivatives(config: SearchConfig, components: int) -> int:
    """Return how many questions a gradient may be over."""
    return min(config.gradient_examples, int(config.memory / (DERIVATIVE_BYTES * components)))


def questions_with_room(config: SearchConfig, components: int, parts: Sequence[range], *, warn: bool = True) -> list[int]:
    """Return the questions of parts over which a gradient is taken: as many of each as there is room for the derivatives of."""
    room = room_for_derivatives(config, components)
    most = max(LEAST_QUESTIONS, room // len(parts))
    asked = [i for part in parts for i in part[:most]]
    if warn and room < config.gradient_examples and any(len(part) > most for part in parts):
        enough = DERIVATIVE_BYTES * components * min(config.gradient_examples, len(parts) * max(map(len, parts)))
        log.warning(
            "components are chosen on %d of %d questions, for whose derivatives --memory %.6g has room; the least bound that "
            "has room for all that are used is --memory %s",
            *(len(asked), sum(map(len, parts)), config.memory / GIB, memory_option(enough)),
        )
    return asked


def choose_step(
    contributions: Tensor, facts: Sequence[str], harm: Tensor, removed: Sequence[int], *, cap: int, allowed: float
) -> list[int]:
    """Return the components that a step removes, or puts back if they are among the removed ones.

    Args:
        contributions: (E, K) derivatives of the loss of each question.
        facts: of each question.
        harm: (K,) of each component.
        removed: those that are removed now.
        cap: largest number of components.
        allowed: harm that may be added, in nats per token.
    """
    E = len(facts)
    mean = contributions.mean(0)
    sign, cost = torch.ones_like(mean), harm.clamp(min=LEAST_HARM)
    sign[list(removed)], cost[list(removed)] = -1, LEAST_HARM
    gain = sign * shrunk_mean(contributions, facts) - contributions.var(0) / 2
    pool = (gain > MIN_GAIN).nonzero()[:, 0]
    slopes = (contributions[:, pool] - mean[pool]) * sign[pool]  # (E, P)
    gain, cost = gain[pool], cost[pool]
    chosen: list[int] = []
    while len(chosen) < cap:
        score = torch.where((gain > MIN_GAIN) & (cost <= allowed), gain / cost, 0.0)
        if not len(pool) or not float(score.max()) > 0:
            break
        j = int(score.argmax())
        chosen.append(int(pool[j]))
        allowed -= float(cost[j])
        gain = gain - slopes.T @ slopes[:, j] / (E - 1)  # what the others still gain when this one is removed
        gain[j] = -math.inf
    return chosen


def shrunk_mean(contributions: Tensor, facts: Sequence[str]) -> Tensor:
    """Return the means (K,) over the questions, times one factor for what is known of their errors.

    The factor is 1 - c / (mean of the squared ratios of mean to error over all components), where c is what chance alone
    gives. So it is 0 where the questions say nothing.
    """
    mean = contributions.mean(0)
    ratios = mean / torch.cat([_standard_errors(part - part.mean(0), facts) for part in contributions.split(COLUMNS, 1)])
    J = len(set(facts))
    by_chance = (J - 1) / (J - 3) if J > 3 else math.inf  # the mean square of Student's t with J - 1 degrees of freedom
    return max(0.0, 1 - by_chance / float(ratios[ratios.isfinite()].square().mean())) * mean


def _standard_errors(deviations: Tensor, facts: Sequence[str]) -> Tensor:
    """Return the standard error of the mean of values with deviations (E, K) from it; only facts are independent."""
    number = {fact: i for i, fact in enumerate(dict.fromkeys(facts))}
    sums = torch.zeros(len(number), deviations.shape[1], dtype=deviations.dtype)
    sums.index_add_(0, torch.tensor([number[fact] for fact in facts]), deviations)
    correction = len(number) / max(1, len(number) - 1)
    return (correction * sums.square().sum(0)).sqrt() / len(facts)


def derivatives_of(
    ledger: ScoreLedger,
    examples: Sequence[int],
    intervention: Intervention,
    matrices: Sequence[Matrix],
    *,
    squared: bool = False,
    both: bool = False,
    between_choices: bool = False,
) -> Tensor:
    """Return the derivatives of the losses of examples by the strengths of all components, (E, K); or sums of squares (1, K).

    With ``both``, return the derivatives of the summed log-losses of the examples, and the sums of squares below them.

    Raises:
        OutOfTimeError: at the deadline.
        ScoringError: if workers ended at it.
    """
    tasks = contribution_tasks(
        ledger.name,
        examples,
        intervention,
        matrices,
        ledger.executor.workers,
        squared=squared,
        both=both,
        between_choices=between_choices,
    )
    by_matrix: dict[str, Tensor] = {}
    for task, result in ledger.executor.run(tasks, deadline=ledger.deadline, is_cancelled=lambda _: False):
        if isinstance(result, Failure):
            raise ScoringError(f"the gradient over {ledger.split.task} could not be taken: {result.reason}")
        by_matrix |= result
        ledger.cost += task.cost
    rows = 1 if squared else len(examples) + both
    derivatives = torch.empty(rows, sum(m.max_rank for m in matrices))
    for m, columns in zip(matrices, derivatives.split([m.max_rank for m in matrices], 1), strict=True):
        of_matrix = by_matrix.pop(m.id, None)  # which frees it
        if of_matrix is None:  # no example uses it
            columns.zero_()
        else:
            columns.copy_(of_matrix)
    return derivatives


def separate_matrices(candidates: Sequence[Candidate]) -> list[Matrix]:
    """Return the matrices of the candidates, without those that share weights with an earlier one."""
    separate: list[Matrix] = []
    for m in dict.fromkeys(c.matrix for c in candidates):
        if not any(m.overlaps(other) for other in separate):
            separate.append(m)
    return separate


def parts_of(facts: Sequence[str]) -> list[range]:
    """Return parts of about equal size of questions in the order of their facts; none of too few facts."""
    starts = [i for i in range(1, len(facts)) if facts[i] != facts[i - 1]]
    if len(starts) < PARTS - 1:
        return []
    cuts: list[int] = []
    for k in range(1, PARTS):
        left = [i for i in starts[: len(starts) - (PARTS - 1 - k)] if i > max(cuts, default=0)]
        cuts.append(min(left, key=lambda i: abs(PARTS * i - k * len(facts))))
    return [range(a, b) for a, b in pairwise([0, *cuts, len(facts)])]
