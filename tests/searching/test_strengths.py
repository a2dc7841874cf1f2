"""The choice of strengths on known derivatives, and a whole search on a tiny model."""

from __future__ import annotations

import itertools

import pytest
import torch
from searching.test_components import SETTINGS, drawn, questions
from torch import Tensor

from laserlm.edit import applied
from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import evaluate
from laserlm.searching import search
from laserlm.searching.strengths import STEP, choose_strengths, expected_harm


def gain(c: Tensor, taken: Tensor) -> float:
    """Return how much the mean loss is expected to fall: by the mean of the sum, less half its variance."""
    x = c @ taken
    return float(x.mean() - x.var() / 2)


def separate(harm: Tensor) -> list[Tensor]:
    """Return gradients of passages of which each sees one component."""
    return [(2 * harm).sqrt().diag()]


def chosen(
    c: Tensor, harm: Tensor, allowed: float, taken: Tensor | None = None, passages: list[Tensor] | None = None
) -> Tensor:
    before = torch.zeros(len(harm)) if taken is None else taken
    return choose_strengths(c, c.mean(0), harm, passages or separate(harm), before, allowed=allowed)


@pytest.mark.parametrize("seed", range(4))
def test_strengths_are_about_as_good_as_the_best_of_a_fine_grid(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c = drawn(300, 4, seed, (0.3 * torch.rand(4, generator=generator)).tolist(), 0.2)
    harm, allowed = 0.01 + 0.05 * torch.rand(4, generator=generator), 0.02
    taken = chosen(c, harm, allowed)
    assert bool(((taken >= 0) & (taken <= 1)).all())
    torch.testing.assert_close(taken / STEP, (taken / STEP).round())
    assert expected_harm(separate(harm), taken) <= allowed + 1e-6
    grid = [torch.tensor(d) for d in itertools.product([i / 10 for i in range(11)], repeat=4)]
    best = max(gain(c, d) for d in grid if expected_harm(separate(harm), d) <= allowed)
    assert gain(c, taken) >= 0.85 * best > 0.01


def test_what_is_taken_comes_back_where_the_loss_falls_with_it() -> None:
    c, harm = drawn(200, 3, 0, [-0.2, 0.2, 0.0], 0.01), torch.full((3,), 0.01)
    taken = chosen(c, harm, 0.5, taken=torch.tensor([1.0, 0.0, 0.0]))
    assert (taken[0], taken[1]) == (0, 1)


def test_without_a_gain_or_without_room_nothing_is_taken() -> None:
    c, harm = drawn(200, 5, 0, 0.1, 0.01), torch.full((5,), 0.01)
    assert bool(chosen(c, harm, 0.1).any())
    assert not bool(chosen(c, harm, 0.0).any())
    nothing = choose_strengths(c, torch.zeros(5), harm, separate(harm), torch.zeros(5), allowed=0.1)
    assert not bool(nothing.any())


def test_small_changes_that_add_up_for_a_passage_count_together() -> None:
    """Each of 100 components costs little, and a passage feels the sum of all."""
    c, harm = drawn(300, 100, 0, 0.05, 0.01), torch.full((100,), 0.001)
    together = [(2 * harm).sqrt()[None]]
    apart, summed = chosen(c, harm, 0.02), chosen(c, harm, 0.02, passages=together)
    assert expected_harm(together, apart) > 0.1
    assert expected_harm(together, summed) <= 0.02 + 1e-6
    assert 0 < float(summed.sum()) < float(apart.sum())


def test_a_search_weakens_components_within_the_bound(llama: LanguageModel) -> None:
    task = questions()
    result = search(llama, task, **SETTINGS | {"strategy": "strengths", "steps": 2})
    assert (result.strategy, result.unit, result.failed) == ("strengths", "components", {})
    strengths = [s for r in result.best.reductions for s in (r.size.strengths or {}).values()]
    assert any(0 < s < 1 for s in strengths)
    assert all(0 <= s < 1 for s in strengths)
    with applied(llama, Intervention.parse(str(result.best))):
        edited = evaluate(llama, task.validation)
    assert result.validation.edited_loss == pytest.approx(edited.loss, abs=1e-4)
    assert result.validation.edited_loss < result.validation.base_loss
    (point,) = [p for p in result.points if p.intervention == str(result.best)]
    assert point.harms[0].ratio <= 2
