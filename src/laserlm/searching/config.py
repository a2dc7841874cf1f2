"""The settings of a search, from the command line to the database."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from laserlm.errors import ScoringError
from laserlm.models.kinds import Kind
from laserlm.reductions import Grid
from laserlm.scoring.scorers import SCORERS, scorer_for
from laserlm.tasks import Scorer, Task

Metric = Literal["accuracy", "loss"]
Strategy = Literal["strengths", "components", "race", "exhaustive", "compose"]
Mode = Literal["joint", "greedy"]
Effort = Literal["quick", "normal", "thorough"]

EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "quick": {
        "gradient_examples": 150,
        "steps": 4,
        "candidates": 16,
        "sizes_per_matrix": 2,
        "screen_examples": 50,
        "first_rung": 16,
        "keep": 0.25,
    },
    "normal": {},
    "thorough": {
        "gradient_examples": 4000,
        "steps": 24,
        "candidates": 150,
        "sizes_per_matrix": 6,
        "screen_examples": 200,
        "first_rung": 64,
        "keep": 0.5,
    },
}
"""What each effort changes in the default settings."""
DEFAULT_GRID = "fine"
OF_COMPONENTS = ("strengths", "components")
"""The strategies that change single components."""
LEAST_FACTS = 3
"""Facts that the validation questions of a choice of components need: one for each part. With fewer the model is kept."""
DEFAULT_MAX_HARM = 0.05
"""Relative rise of perplexity that the choice of components may cause."""
RACE_SETTINGS = (
    "candidates",
    "sizes_per_matrix",
    "random_candidates",
    "screen_examples",
    "first_rung",
    "keep",
    "delta",
)
SETTINGS_OF: Mapping[Strategy, Sequence[str]] = {"race": [n for n in RACE_SETTINGS if n != "delta"], "components": ["steps"]}
"""Settings that ask for a strategy where none is named."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The settings of a search.

    Args:
        strategy: ``strengths``, ``components``, ``race``, ``exhaustive`` or ``compose``. None takes ``strengths``, and
            ``race`` with another grid than ``fine`` and where no guard measures harm. ``SearchConfig.of``, ``search`` and the
            command take ``components`` where ``steps`` is set, and ``race`` where a setting of a race is.
        grid: ``paper``, ``mlp``, ``fine`` or text such as ``27-29.mlp@0.05,0.5``. ``components`` and ``strengths`` take its
            matrices alone.
        max_harm: largest relative rise of the perplexity on the guards that the choice may have, such as 0.05. None takes
            0.05 for ``components`` and ``strengths``, and no bound for the other strategies.
        guards: text files, tasks or their names, or ``self`` for text that the model writes: what must not get worse. None
            takes ``self`` if the model writes text.
        metric: ``accuracy`` or ``loss``. None takes ``accuracy``, and ``loss`` for a perplexity.
        scorer: None takes the scorer of the task.
        mode: for ``compose``: ``joint`` tries the candidates that the screen ranks best, ``greedy`` goes from the last block
            to the first.
        candidates: number of candidates that the screen sends into the race.
        sizes_per_matrix: most sizes of one matrix among them. Neighbours of the leader are added later.
        random_candidates: number of further candidates, drawn at random. They measure what the screen misses.
        screen_examples: most examples over which the screen takes its gradient.
        first_rung: examples of the first rung. Each further rung has at least twice as many, and the last has all.
        keep: largest share of the candidates that stays after a rung. 1 drops only what is significantly worse.
        delta: largest probability that the test of significance drops the best candidate of the race, over all rungs and
            leaders, for independent facts. What ``keep`` drops has no such bound. For ``compose``: largest probability that
            a step is accepted if no candidate helps.
        steps: for ``components``: most steps that are tried.
        gradient_examples: for ``components`` and ``strengths``: most questions over which a gradient is taken, as far as
            ``memory`` has room for their derivatives; eight of each third in any case.
        budget: minutes after which the search measures the best candidate so far and ends. None sets no end.
        seed: of the order of the examples, of the random candidates and of ``:reference`` decompositions.
        batch_size: sequences in one forward pass.
        memory: bytes for cached activations and decompositions together.
    """

    strategy: Strategy | None = None
    grid: str | Grid = DEFAULT_GRID
    max_harm: float | None = None
    guards: tuple[str | Task, ...] | None = None
    metric: Metric | None = None
    scorer: Scorer | None = None
    mode: Mode = "joint"
    candidates: int = 48
    sizes_per_matrix: int = 3
    random_candidates: int = 4
    screen_examples: int = 100
    first_rung: int = 32
    keep: float = 0.34
    delta: float = 0.05
    steps: int = 12
    gradient_examples: int = 1000
    budget: float | None = None
    seed: int = 0
    batch_size: int = 32
    memory: float = 2**30

    def __post_init__(self) -> None:
        for name, value, allowed in (("strategy", self.strategy, Strategy), ("mode", self.mode, Mode)):
            if value is not None and value not in get_args(allowed):
                raise ScoringError(f"no {name} {value!r}; there are {', '.join(get_args(allowed))}")
        if self.metric is not None and self.metric not in get_args(Metric):
            raise ScoringError(f"no metric {self.metric!r}; there are {', '.join(get_args(Metric))}")
        for name in ("candidates", "sizes_per_matrix", "screen_examples", "first_rung", "steps", "gradient_examples"):
            if getattr(self, name) < 1:
                raise ScoringError(f"{name} {getattr(self, name)} leaves a search with nothing to do; write 1 or more")
        if self.max_harm is not None and not self.max_harm > 0:
            raise ScoringError(
                f"max_harm {self.max_harm} allows no change at all; write the largest relative rise of perplexity, such as 0.05"
            )
        if self.random_candidates < 0 or not (0 <= self.keep <= 1 and 0 <= self.delta <= 1):
            raise ScoringError(
                "random_candidates must be 0 or more, keep and delta from 0 to 1; "
                f"got {self.random_candidates}, {self.keep} and {self.delta}"
            )

    @classmethod
    def of(cls, effort: Effort = "normal", **settings: Any) -> SearchConfig:
        """Return the settings of an effort, changed by ``settings``.

        Raises:
            ScoringError: if there is no such effort or setting, if a value is out of range, or if a setting of another
                strategy is set.
        """
        if effort not in EFFORTS:
            raise ScoringError(f"no effort {effort!r}; there are {', '.join(EFFORTS)}")
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in settings if name not in names]:
            raise ScoringError(f"a search has no setting {unknown[0]!r}; it has {', '.join(names)}")
        if wrong := setting_of_another(settings):
            name, owner, chosen = wrong
            raise ScoringError(
                f"{name} {settings[name]} is a setting of the strategy {owner}, and {chosen} has none; leave it out, or choose "
                f"with --strategy {owner} (strategy={owner!r})"
            )
        return cls(**{**EFFORTS[effort], "strategy": asked_strategy(settings), **settings})

    @property
    def harm_bound(self) -> float:
        """Largest rise of the loss on a guard, in nats per token; infinite without a bound."""
        if self.max_harm is None:
            return math.log1p(DEFAULT_MAX_HARM) if self.is_of_components else math.inf
        return math.log1p(self.max_harm)

    @property
    def is_of_components(self) -> bool:
        """Whether single components are chosen, and no candidates of a grid."""
        return self.strategy in OF_COMPONENTS

    @property
    def screens(self) -> bool:
        """Whether a gradient ranks the candidates first."""
        return self.strategy in (None, "race") or (self.strategy == "compose" and self.mode == "joint")

    def for_task(self, task: Task, *, has_guard: bool, kind: Kind = "causal") -> SearchConfig:
        """Return the settings with the strategy, the scorer and the metric that they have on a task.

        Args:
            task: the task.
            has_guard: whether a guard measures harm (``guard.has_guard``). Without one, ``race`` is the default strategy.
            kind: of the model. A classifier or a reward model has a scorer of its own for questions.

        Raises:
            ScoringError: if a perplexity is to be chosen by accuracy.
        """
        scorer = self.scorer or scorer_for(kind, task.validation.scorer)
        metric = self.metric or ("accuracy" if SCORERS[scorer].has_accuracy else "loss")
        if scorer == "perplexity" and metric == "accuracy":
            raise ScoringError("a perplexity has no accuracy; choose by the loss: --metric loss (metric='loss')")
        chooses_components = has_guard and Grid.parse(self.grid) == Grid.parse(DEFAULT_GRID)
        strategy = self.strategy or ("strengths" if chooses_components else "race")
        return replace(self, strategy=strategy, scorer=scorer, metric=metric)

    def choice_settings(self) -> dict[str, Any]:
        """Return the settings on which the choice depends, in addition to the scores, as plain values for the database."""
        settings: dict[str, Any] = {
            "grid": str(Grid.parse(self.grid)),
            "metric": self.metric,
            "strategy": self.strategy,
            "budget": self.budget,
            "max_harm": self.max_harm,
        }
        if self.is_of_components:
            # How many questions choose a step depends on the memory.
            settings["options"] = {n: getattr(self, n) for n in ("delta", "memory", "gradient_examples")}
            if self.strategy == "components":
                settings["options"]["steps"] = self.steps
        elif self.strategy != "exhaustive":
            settings["options"] = {name: getattr(self, name) for name in RACE_SETTINGS}
        if self.strategy == "compose":
            settings["mode"] = self.mode
        return settings


def asked_strategy(settings: Mapping[str, Any]) -> Strategy | None:
    """Return the strategy that settings name, or that they belong to."""
    of_settings = (strategy for strategy, names in SETTINGS_OF.items() if any(name in settings for name in names))
    return settings.get("strategy") or next(of_settings, None)


def setting_of_another(settings: Mapping[str, Any]) -> tuple[str, Strategy, Strategy] | None:
    """Return a setting that the asked strategy does not have, the strategy that has it, and the one that is asked for."""
    chosen = asked_strategy(settings)
    if chosen is None:
        return None
    others = [owner for owner in SETTINGS_OF if owner != chosen and (owner == "components" or chosen in OF_COMPONENTS)]
    wrong = ((name, owner, chosen) for owner in others for name in SETTINGS_OF[owner] if name in settings)
    return next(wrong, None)
