"""Test points of a list of gain against harm on held-out questions, with intervals that hold for all of them together.

The search tests the point that it chose, once. Whoever tests others and keeps the best one has chosen again. With k points, the
chosen one counted, each interval has the level 1 - 0.05 / k and each p-value is multiplied by k (Bonferroni). So the chance
that any of the k intervals of the gain misses is 5 % at most, and so it is for the change of loss and for each guard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from laserlm.errors import AnalysisError, TaskError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.evaluate import Comparison, compare
from laserlm.scoring.records import Evaluation
from laserlm.searching.guard import Guard, Harm, guards_of, measure_harm
from laserlm.searching.result import SearchResult

ERROR = 0.05
"""Chance that any of the intervals of one figure misses."""


@dataclass(frozen=True)
class MeasuredPoint:
    """A point on questions and text that no search chose on.

    Args:
        number: of the point, as ``laser save --point`` takes it; 0 if the chosen one is not in the list.
        intervention: canonical text.
        is_chosen: whether the search chose it.
        comparison: with the unchanged model on the test split, at the level of all points.
        confidence: of each interval.
        p: exact p-value of the gain, for all points.
        harms: of each guard, at the level of all points.
    """

    number: int
    intervention: str
    is_chosen: bool
    comparison: Comparison
    confidence: float
    p: float
    harms: tuple[Harm, ...]


def numbered_points(result: SearchResult, asked: Sequence[int]) -> dict[str, int]:
    """Return the asked points, all if none is asked, and the chosen one if there is one: number by canonical text.

    Raises:
        AnalysisError: if there is no such point.
    """
    listed = [point.intervention for point in result.pareto]
    if wrong := [number for number in asked if not 1 <= number <= len(listed)]:
        has = f"has the points 1 to {len(listed)}" if listed else "has no list of gain against harm"
        raise AnalysisError(f"there is no point {wrong[0]}: run {result.run} {has}; 'laser runs show {result.run}' prints it")
    if not listed:
        raise AnalysisError(f"run {result.run} has no list of gain against harm to test")
    numbers = {text: i for i, text in enumerate(listed, start=1)}
    wanted = [*(listed[i - 1] for i in asked or numbers.values()), *([str(result.best)] if result.best else [])]
    return {text: numbers.get(text, 0) for text in dict.fromkeys(wanted)}


def guards_of_run(
    lm: LanguageModel, noted: Sequence[Mapping[str, str]], seed: int, sources: Sequence[str] | None = None
) -> list[Guard]:
    """Return the guards of a search, as its run noted them.

    Args:
        lm: the unchanged model.
        noted: name and hash of each.
        seed: of the search.
        sources: what they are read from; None takes the names.

    Raises:
        AnalysisError: if a guard is not what it was.
    """
    names = [guard["name"] for guard in noted]
    try:
        guards = guards_of(lm, sources or names, seed=seed)
    except TaskError as error:
        raise AnalysisError(f"cannot read the guards of the search ({error}); name their files again with --guard") from None
    if [guard.identity for guard in guards] != list(noted):
        raise AnalysisError(
            f"the guards are not those of the search, which were {', '.join(names)}; name the same files with --guard, in the "
            "same order and with the same content"
        )
    return guards


def measure_points(
    lm: LanguageModel,
    points: Mapping[str, int],
    best: str,
    score: Callable[[str], Evaluation],
    guards: Sequence[Guard],
    *,
    batch_size: int = 32,
    on_point: Callable[[int, int], None] = lambda done, total: None,
) -> list[MeasuredPoint]:
    """Score points on the test split and on the parts of guards that no choice looked at.

    Args:
        lm: the unchanged model.
        points: number by canonical text.
        best: the one that the search chose; empty if it kept the unchanged model.
        score: returns the scores of an intervention on the test split.
        guards: of the search.
        batch_size: sequences in one forward pass.
        on_point: called with the number of points done and their total.
    """
    confidence, measured = 1 - ERROR / len(points), []
    for text, number in points.items():
        comparison = compare(score(""), score(text), confidence=confidence)
        harms = tuple(measure_harm(lm, guard, text, batch_size, confidence) for guard in guards)
        p = min(1.0, len(points) * comparison.mcnemar_p)
        measured.append(MeasuredPoint(number, text, text == best, comparison, confidence, p, harms))
        on_point(len(measured), len(points))
    return measured
