"""What several tests of a search share: families, a task, what is searched, and what was scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import SCORED

from laserlm.edit import applied
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import compare, evaluate_rows
from laserlm.scoring.forward import run_rows
from laserlm.searching import SearchResult
from laserlm.searching import search as search_
from laserlm.searching.guard import Guard, Harm
from laserlm.searching.scorer import EncodedSplit
from laserlm.store import Store
from laserlm.tasks import Example, Task

CORE = ("llama", "gpt2", "gpt_neox", "mixtral", "bert", "t5")
"""One family of each kind: plain, transposed and fused, interleaved, stacked experts, masked, and two stacks."""
EVERY = [pytest.param(family, marks=[] if family in CORE else [pytest.mark.slow]) for family in SCORED]
"""All that can be scored; those that are like one of the few are left to the full tier."""

Scores = dict[tuple[str, str], Any]
"""Evaluations by split and intervention."""
Scored = tuple[SearchResult, Scores]
GIVEN: dict[str, dict[str, Any]] = {
    "exhaustive": {"strategy": "exhaustive", "grid": "0-1.mlp@0.5,0.3"},
    "race": {"strategy": "race", "grid": "all.all@0.5,0.3", "candidates": 8, "first_rung": 2, "random_candidates": 2},
    # Of seven questions none is accepted at a usual error probability.
    "components": {"strategy": "components", "grid": "all.mlp@0.5", "max_harm": 1.0, "delta": 1.0, "steps": 3},
    "strengths": {"strategy": "strengths", "grid": "all.mlp@0.5", "max_harm": 1.0, "delta": 1.0},
}
"""Searches that are made on a cluster and in one process."""


def build_task() -> Task:
    """Return a task whose prompts have one length and whose answers are one of five."""
    cities = ["Paris", "Rome", "Oslo", "Lisbon", "Madrid"]
    pairs = [(x, y) for x in "abcdef" for y in "uvwxyz"]
    rows = [Example(f"{i}", f"The capital of {a} and {b} is", cities[i * 7 % 5], fact=f"{i}") for i, (a, b) in enumerate(pairs)]
    return Task.of("example", rows, scorer="first_token")


def harm_on(lm: LanguageModel, guard: Guard, part: EncodedSplit, intervention: str) -> Harm:
    """Return the harm of an intervention on a part of a guard, in whole passes of its own."""
    evaluations = []
    for text in ("", intervention):
        with applied(lm, text):
            evaluations.append(
                evaluate_rows(lm, part.split, part.scorer, part.sequences, lambda: run_rows(lm, part.sequences, 9))
            )
    return Harm(guard.name, guard.kind, compare(*evaluations))


def search(lm: LanguageModel, task: Task, store: Path, **options: Any) -> Scored:
    """Search by the loss, and return what was found and all that was scored."""
    result = search_(lm, task, metric="loss", store=store, **options)
    return result, scores(store, result)


def scores(store: Path, outcome: SearchResult) -> Scores:
    """Return what a store holds of a search."""
    with Store.open(store) as results:
        return {
            (split, text): evaluation
            for split in ("validation", "test")
            for text, evaluation in results.evaluations(outcome.run, split).items()
        }


def same(ours: Scores, theirs: Scores) -> None:
    """See that the same was scored with the same result, up to the order of sums."""
    assert ours.keys() == theirs.keys()
    for key, evaluation in ours.items():
        other = theirs[key]
        assert [s.id for s in evaluation.scores] == [s.id for s in other.scores]
        assert [s.correct for s in evaluation.scores] == [s.correct for s in other.scores]
        assert [s.logprob for s in evaluation.scores] == pytest.approx([s.logprob for s in other.scores], rel=1e-5, abs=1e-5)
