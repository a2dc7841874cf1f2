"""What the figures of docs/how-it-works.md are computed from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from laserlm.scoring.records import Evaluation, ExampleScore

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    """The script, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("make_figures", ROOT / "scripts" / "make_figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_figures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def evaluation(losses: list[float], correct: list[bool] | None = None) -> Evaluation:
    hits = correct or [False] * len(losses)
    scores = tuple(
        ExampleScore(id=str(i), correct=hit, logprob=-loss, tokens=1, predicted="", answer="a")
        for i, (loss, hit) in enumerate(zip(losses, hits, strict=True))
    )
    return Evaluation("m", "t", "validation", "answer", "", scores, 0.0)


def pool(figures: ModuleType, gains: list[list[int]], changes: list[list[float]], facts: list[str] | None = None) -> object:
    texts = [str(i) for i in range(len(gains))]
    return figures.Pool(texts, np.array(gains), np.array(changes), facts or [str(i) for i in range(len(gains[0]))])


def test_a_candidate_has_a_mean_at_every_rung_that_it_was_in(figures: ModuleType) -> None:
    base = evaluation([1.0, 1.0, 1.0, 1.0])
    lines = figures.leavings(base, {"left": evaluation([0.0, 2.0]), "stayed": evaluation([0.0, 1.0, 0.0, 1.0])}, [2, 4])
    assert [(line.intervention, line.questions, line.changes) for line in lines] == [
        ("left", [2], [0.0]),
        ("stayed", [2, 4], [-0.5, -0.5]),
    ]


def test_questions_of_one_fact_are_never_on_both_sides(figures: ModuleType) -> None:
    facts = [str(i // 3) for i in range(60)]
    for seed in range(20):
        chosen, others = figures.draw(facts, 10, np.random.default_rng(seed))
        assert len(chosen) == 10
        assert len(others) == 48  # 16 facts of 20: the fourth is cut, and its other two questions serve nobody
        assert not {facts[i] for i in chosen} & {facts[i] for i in others}


def test_a_winner_is_chosen_as_a_search_chooses(figures: ModuleType) -> None:
    pooled = pool(figures, [[1, 0], [1, 0], [0, 0]], [[-1.0, 0.0], [-2.0, 0.0], [-9.0, 0.0]])
    assert figures.winner(pooled, [0, 1, 2], [0, 1], "accuracy") == 1  # of two equals the one of lower loss
    assert figures.winner(pooled, [0, 2], [0, 1], "accuracy") == 0
    assert figures.winner(pooled, [0, 1, 2], [0, 1], "loss") == 2


def test_the_unchanged_model_may_win(figures: ModuleType) -> None:
    pooled = pool(figures, [[-1, 0], [0, 0]], [[-1.0, -1.0], [1.0, 1.0]])
    assert figures.winner(pooled, [0, 1], [0, 1], "accuracy") is None
    assert figures.winner(pooled, [1], [0, 1], "loss") is None
    assert figures.winner(pooled, [0, 1], [0, 1], "loss") == 0


def test_luck_alone_gains_where_it_was_chosen_and_nothing_elsewhere(figures: ModuleType) -> None:
    rng = np.random.default_rng(1)
    gains = rng.choice([-1, 0, 1], size=(200, 120), p=[0.1, 0.8, 0.1]).tolist()
    one, many = figures.curse(pool(figures, gains, np.zeros((200, 120)).tolist()), [1, 200], 60, 200)
    assert many.validation > 0.12  # 200 candidates without any merit
    assert abs(many.test) < 0.03
    assert one.validation < many.validation / 3


def test_a_pool_is_held_against_the_unchanged_model(figures: ModuleType) -> None:
    base = evaluation([1.0, 2.0], [True, False])
    pooled = figures.Pool.of(base, {"x": evaluation([0.5, 3.0], [False, True])}, ["a", "b"])
    assert pooled.gains.tolist() == [[-1, 1]]
    assert pooled.changes.tolist() == [[-0.5, 1.0]]


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "images").glob("how-*.svg")), ids=lambda f: f.name)
def test_a_figure_is_small_and_loads_nothing(file: Path) -> None:
    text = file.read_text()
    assert len(text) < 100_000
    assert "<script" not in text
    assert "@import" not in text
    assert 'href="http' not in text
