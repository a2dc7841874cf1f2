"""The progress and the result of a search."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from laserlm.reductions import Intervention, short_form
from laserlm.scoring.evaluate import Comparison
from laserlm.scoring.records import Evaluation
from laserlm.scoring.scorers import GENERATING
from laserlm.searching.config import LEAST_FACTS, OF_COMPONENTS, Metric, SearchConfig, Strategy
from laserlm.searching.guard import Harm

_RUNG_KEYS_OF_0_1_0 = {"beaten": "eliminated", "halved": "pruned", "joined": "added"}


def sort_key(e: Evaluation, metric: Metric) -> tuple[float, float]:
    """Return what evaluations are ordered by: accuracy, ties by lower loss; or loss, ties by accuracy. More is better."""
    return (e.accuracy, -e.loss) if metric == "accuracy" else (-e.loss, e.accuracy)


@dataclass(frozen=True)
class SearchProgress:
    """The progress of a search, for a display.

    Args:
        stage: what is being done, such as ``rung 2 of 5``.
        alive: what is scored in this stage, the unchanged model counted where it is.
        done: work done in this call, in passes of one example through the full model.
        total: work expected; less may turn out to be needed.
        scored: examples scored in this call, counted for each candidate.
        best: the best so far, the unchanged model included, on the examples scored so far; None before the first.
        last: canonical text of what was scored last.
    """

    stage: str
    alive: int
    done: float
    total: float
    scored: int
    best: Evaluation | None
    last: str


@dataclass(frozen=True)
class RungReport:
    """One rung of a race.

    Args:
        examples: number of examples that all candidates in it were scored on, earlier rungs included.
        entered: candidates in it, the unchanged model not counted.
        eliminated: candidates dropped because the leader is significantly better.
        pruned: candidates dropped because others looked better, without proof.
        failed: candidates that could not be scored.
        added: neighbours of the leader in rank that enter the next rung.
        leader: canonical text of the best, empty for the unchanged model.
        harmful: candidates dropped because their harm is beyond the bound.
    """

    examples: int
    entered: int
    eliminated: int
    pruned: int
    failed: int
    added: int
    leader: str
    harmful: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RungReport:
        """Read what ``asdict`` returned, now or in version 0.1.0."""
        return cls(**_known(cls, {_RUNG_KEYS_OF_0_1_0.get(key, key): value for key, value in values.items()}))


@dataclass(frozen=True)
class ScreenReport:
    """What the first-order screen did, and how well it ranked what the race then measured.

    Args:
        examples: number of examples its gradient is over.
        candidates: candidates ranked.
        chosen: those it sent into the race.
        controls: others, drawn at random, that were sent too.
        correlation: Spearman's rank correlation, over all of these, of the expected change of loss with the change
            measured on the first rung's examples; None for fewer than three.
        controls_ahead: share of pairs of a control and a chosen one in which the control measured better; 0.5 would mean
            that the screen knows nothing.
        seconds: wall time, decompositions included.
        expected: change of loss that the screen expects, in nats, of all that were sent.
        measured: change of loss on the first rung's examples.
        unranked: candidates that it could not rank.
        reasons: number of these by the reason.
        left_out: most examples that were left out of a ranked candidate, because their gradient is not finite or the time
            was used up.
    """

    examples: int
    candidates: int
    chosen: int
    controls: int
    correlation: float | None
    controls_ahead: float | None
    seconds: float
    expected: dict[str, float]
    measured: dict[str, float]
    unranked: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    left_out: int = 0

    def warnings(self) -> list[str]:
        """Return in sentences what the screen left out."""
        reasons = "; ".join(f"{reason} ({n})" for reason, n in self.reasons.items())
        sentences = [f"{self.unranked} candidates could not be ranked: {reasons}."] if self.unranked else []
        if self.left_out:
            sentences.append(
                f"Up to {self.left_out} of the {self.examples} questions had no part in the ranks of some candidates."
            )
        return sentences


@dataclass(frozen=True)
class ComposeStep:
    """One accepted step of a composition.

    Args:
        added: canonical text of the reduction that was added.
        intervention: canonical text of all reductions after it.
        comparison: validation before and after this step alone.
    """

    added: str
    intervention: str
    comparison: Comparison

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {"added": self.added, "intervention": self.intervention, "comparison": _as_best(self.comparison)}


@dataclass(frozen=True)
class Point:
    """An intervention with its gain on validation and its harm on the parts of the guards that the search looks at.

    Args:
        intervention: canonical text.
        comparison: base against this intervention on validation.
        harms: one for each guard.
    """

    intervention: str
    comparison: Comparison
    harms: tuple[Harm, ...]

    @property
    def change(self) -> float:
        """The largest rise of the loss on a guard, in nats per token."""
        return max((harm.change for harm in self.harms), default=0.0)

    def dominates(self, other: Point) -> bool:
        """Whether the point has at least the gain, and at most the loss and the harm of another one, and is not equal."""
        ours, theirs = (
            (-p.comparison.gain, p.comparison.edited_loss - p.comparison.base_loss, p.change) for p in (self, other)
        )
        return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "intervention": self.intervention,
            "comparison": _as_best(self.comparison),
            "harms": [harm.as_dict() for harm in self.harms],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Point:
        """Read what ``as_dict`` returned."""
        return cls(values["intervention"], _comparison(values["comparison"]), tuple(map(Harm.from_dict, values["harms"])))


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Args:
        run: id of the run in the store.
        strategy: how candidates were tried.
        best: the intervention that was best on validation; empty if that is the unchanged model.
        candidates: number of candidates that the choice was among, the unchanged model not counted.
        scored: number of interventions that were scored on some validation examples at least, the unchanged model not
            counted; a composition's trials are sets of candidates.
        failed: canonical text and reason of candidates that could not be scored.
        validation: base against best on the validation examples that both were scored on; the search chose on them, so
            it is biased upwards.
        test: base against best on examples that had no part in the choice.
        seconds: wall time of this call.
        complete: whether the search came to its end, and not to that of its time.
        boundary_bytes: most memory that boundaries of the frontier took.
        decomposition_bytes: most memory that decompositions took.
        rungs: of a race.
        screened: the screen before a race.
        steps: accepted steps of a composition.
        finalists: where the scorer judges what the model writes: accuracy on validation, by canonical text, of those that
            the log-loss of the answers ranked best, and of the unchanged model.
        settings: all that the result depends on, hashes of the model and of both splits among them.
        harms: what the best costs on the measuring part of each guard; empty for a model without a guard.
        points: gain and harm of all interventions whose harm was looked at, in their order; the last of equals is the best.
        phases: seconds of this call by phase: ``start``, ``screen``, ``rung``, ``gradient``, ``step``, ``test``, ``harm``.
        done_earlier: whether an earlier call ran the search, so that this one ran nothing.
    """

    run: str
    strategy: Strategy
    best: Intervention
    candidates: int
    scored: int
    failed: dict[str, str]
    validation: Comparison
    test: Comparison
    seconds: float
    complete: bool
    boundary_bytes: int
    decomposition_bytes: int
    rungs: tuple[RungReport, ...] = ()
    screened: ScreenReport | None = None
    steps: tuple[ComposeStep, ...] = ()
    finalists: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    harms: tuple[Harm, ...] = ()
    points: tuple[Point, ...] = ()
    phases: dict[str, float] = field(default_factory=dict, compare=False)
    done_earlier: bool = field(default=False, compare=False)

    def __repr__(self) -> str:
        """Return one line: what was chosen may be thousands of strengths."""
        return f"SearchResult({self.run}, {self.strategy}, best {short_form(self.best) or 'the unchanged model'}, {self.test})"

    @property
    def pareto(self) -> list[Point]:
        """The points that no other one dominates, by rising harm."""
        best = [p for p in self.points if not any(other.dominates(p) for other in self.points)]
        return sorted(best, key=lambda p: p.change)

    @property
    def unit(self) -> str:
        """What ``candidates`` counts."""
        return "components" if self.strategy in OF_COMPONENTS else "candidates"

    @property
    def harm_bound(self) -> float:
        """Largest rise of the loss on a guard that the choice could have, in nats per token; infinite without a bound."""
        return SearchConfig(strategy=self.strategy, max_harm=self.settings.get("max_harm")).harm_bound

    def next_commands(self, model: str, out: str) -> list[tuple[str, str]]:
        """Return the commands that save the choice in ``out`` or search wider, each with a comment."""
        if not self.best:
            other = ("--strategy race", "one reduction of one matrix")
            wider = other if self.strategy in OF_COMPONENTS else ("--effort thorough", "the same search, wider")
            return [(f"laser search {self._named(model)} ... {wider[0]}", wider[1])]
        save = self.save_command(model)
        point = [(f"{save} --point N --out {out}", "another point of the list")] if len(self.pareto) > 1 else []
        return [(f"{save} --out {out}", ""), *point]

    def save_command(self, model: str) -> str:
        """Return the command that saves a choice of this search, without the folder to write."""
        return f"laser save {self._named(model)} --run {self.run}"

    def _named(self, model: str) -> str:
        """Return the arguments of a command that name a model, and the adapter whose update was reduced."""
        adapter = self.settings.get("adapter")
        return shlex.quote(model) + ("" if adapter is None else f" --adapter {shlex.quote(adapter)}")

    def harm_sentences(self) -> list[str]:
        """Return in sentences what the best costs on each guard; none for the unchanged model."""
        if self.best and not self.harms:
            return ["Harm: not measured. Name a text or a task that must not get worse with --guard."]
        return [f"Harm: {harm}." for harm in self.harms if self.best]

    def pareto_note(self) -> str:
        """Return in sentences how far the figures of the Pareto list can be believed."""
        n = len(self.points)
        note = (
            f"The list is chosen by the validation figures of {n} point{'s' if n > 1 else ''}, so the figures are too good "
            "(winner's curse). Only the chosen one is tested on held-out questions."
        )
        if self.settings.get("scorer") in GENERATING:
            note += " Its accuracies are of the answer's own tokens; what the model writes is scored for the chosen one alone."
        if self.best and str(self.best) not in [point.intervention for point in self.pareto]:
            note += " It is not in the list: another one looks at least as good there for no more harm."
        return note

    def verdict(self) -> list[str]:
        """Return in sentences whether the gain holds on the test examples."""
        of_text = self.settings.get("scorer") == "perplexity"
        low, high = self.test.interval
        if not self.best:
            return [self._why_unchanged()]
        sentences = []
        if not of_text and low > 0:
            sentences.append("The gain in accuracy holds on questions that had no part in the choice.")
        elif not of_text and high < 0:
            sentences.append("The choice does not hold: it loses on the held-out questions.")
        elif not of_text:
            sentences.append("The held-out questions show no clear change of accuracy: the interval of the gain includes zero.")
        if self.test.loss_interval.high < 0:
            sentences.append("Their loss falls: the interval of its change lies below zero.")
        elif self.test.loss_interval.low > 0:
            sentences.append("Their loss rises: the interval of its change lies above zero.")
        return sentences

    def _why_unchanged(self) -> str:
        if not self.scored and not self.complete:
            by_screen = " by the screen" if self.strategy == "race" else ""
            return f"No candidate was tried: the time was used up{by_screen}. Give the search more time (--budget)."
        if self.scored and self.scored == len(self.failed.keys() - {""}):
            reason = next(iter(self.failed.values()))
            return f"No candidate could be compared: all {self.scored} that were tried failed, such as with {reason}"
        if refused := [accuracy for text, accuracy in self.finalists.items() if text]:
            return (
                f"What the model writes decides: {max(refused):.1%} of the validation questions are answered right under the "
                f"best of {len(refused)} by the loss, and {self.finalists.get('', 0):.1%} by the unchanged model."
            )
        if self.strategy in OF_COMPONENTS:
            if (self.validation.facts or LEAST_FACTS) < LEAST_FACTS:
                return (
                    f"Nothing was tried: the validation questions are of {self.validation.facts} facts. A choice of components "
                    f"needs {LEAST_FACTS} at least, and says little below 100. Give more questions, or choose one reduction "
                    "with --strategy race."
                )
            bound = f"{math.expm1(self.harm_bound):.2g}"
            if self.strategy == "strengths":
                return (
                    f"No strengths within the bound on harm (--max-harm {bound}) helped the validation questions that they "
                    "were not chosen on. More questions may show some."
                )
            if any(point.intervention for point in self.points):
                return f"Every step that gained cost more than the bound on harm (--max-harm {bound}) allows."
            return (
                f"No step within the bound on harm (--max-harm {bound}) helped the validation questions that it was not chosen "
                "on. More questions may show one."
            )
        return "No candidate beat the unchanged model on validation."

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "run": self.run,
            "strategy": self.strategy,
            "best": str(self.best),
            "candidates": self.candidates,
            "scored": self.scored,
            "failed": self.failed,
            "seconds": self.seconds,
            "phases": self.phases,
            "complete": self.complete,
            "boundary_bytes": self.boundary_bytes,
            "decomposition_bytes": self.decomposition_bytes,
            "validation": _as_best(self.validation),
            "test": _as_best(self.test),
            "rungs": [asdict(rung) for rung in self.rungs],
            "screened": asdict(self.screened) if self.screened else None,
            "steps": [step.as_dict() for step in self.steps],
            "finalists": self.finalists,
            "settings": self.settings,
            "harms": [harm.as_dict() for harm in self.harms],
            "points": [point.as_dict() for point in self.points],
            "pareto": [self.points.index(point) for point in self.pareto],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SearchResult:
        """Read what ``as_dict`` returned, and ignore fields that only a later version of laserlm knows."""
        return cls(
            **_known(cls, values)
            | {
                "best": Intervention.parse(values["best"]),
                "validation": _comparison(values["validation"]),
                "test": _comparison(values["test"]),
                "harms": tuple(map(Harm.from_dict, values.get("harms", ()))),
                "points": tuple(map(Point.from_dict, values.get("points", ()))),
                "rungs": tuple(RungReport.from_dict(rung) for rung in values["rungs"]),
                "screened": ScreenReport(**_known(ScreenReport, values["screened"])) if values["screened"] else None,
                "steps": tuple(
                    ComposeStep(**_known(ComposeStep, step) | {"comparison": _comparison(step["comparison"])})
                    for step in values["steps"]
                ),
            }
        )


def _known(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are fields of a dataclass."""
    names = {f.name for f in fields(cls)}
    return {name: value for name, value in values.items() if name in names}


def _as_best(comparison: Comparison) -> dict[str, Any]:
    return {key.replace("edited", "best"): value for key, value in comparison.as_dict().items()}


def _comparison(values: dict[str, Any]) -> Comparison:
    return Comparison.from_dict({key.replace("best", "edited"): value for key, value in values.items()})
