from __future__ import annotations

import itertools

import pytest
import torch

from laserlm.linalg.allocation import Spectrum, allocate, uniform
from laserlm.linalg.pivots import parameters


def price(spectrum: Spectrum, rank: int | None) -> int:
    m, n = spectrum.shape
    return m * n if rank is None else rank * (m + n - rank)


def loss(spectrum: Spectrum, rank: int | None) -> float:
    return 0.0 if rank is None else float(spectrum.losses[rank:].sum())


def best_by_enumeration(spectra: list[Spectrum], budget: int) -> float:
    choices = [[*range(s.max_rank + 1), None] for s in spectra]
    losses = [
        sum(loss(s, r) for s, r in zip(spectra, ranks, strict=True))
        for ranks in itertools.product(*choices)
        if sum(price(s, r) for s, r in zip(spectra, ranks, strict=True)) <= budget
    ]
    return min(losses)


def some(seed: int) -> list[Spectrum]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 6), (12, 6), (8, 4)]
    return [Spectrum(s, (torch.rand(min(s), generator=generator) ** 3).sort(descending=True).values) for s in shapes]


def test_the_largest_rank_is_the_last_at_which_factors_are_smaller() -> None:
    assert Spectrum((6, 6), torch.ones(6)).max_rank == 5  # 5 x 7 = 35 < 36
    assert Spectrum((48, 32), torch.ones(32)).max_rank == 31  # 31 x 49 = 1519 < 1536


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_the_budget_holds_and_the_loss_is_near_the_least_there_is(seed: int, share: float) -> None:
    spectra = some(seed)
    budget = int(share * sum(s.dense_parameters for s in spectra))
    ranks = allocate(spectra, budget)
    spent = sum(price(s, r) for s, r in zip(spectra, ranks, strict=True))
    assert spent <= budget
    total = sum(loss(s, r) for s, r in zip(spectra, ranks, strict=True))
    # What is not spent would not pay for more than it costs by the relaxed optimum: one step of a hull.
    best = best_by_enumeration(spectra, budget)
    assert best - 1e-6 <= total <= best + float(max(s.losses[:-1].max() for s in spectra))
    even = uniform([s.shape for s in spectra], share)
    assert total <= sum(loss(s, r) for s, r in zip(spectra, even, strict=True)) + 1e-6


@pytest.mark.parametrize("budget", [500, 1000, 1500, 1750])
def test_ranks_are_multiples_of_a_step_within_the_budget(budget: int) -> None:
    spectra = [Spectrum((20, 30), torch.linspace(2, 1, 20) * scale, 0.9, step=4) for scale in (1.0, 1.1, 1.2)]
    assert [s.max_rank for s in spectra] == [12] * 3  # rank 15 would take 525 of 540, rank 16 544
    ranks = allocate(spectra, budget)
    assert all(rank is None or rank % 4 == 0 for rank in ranks)
    assert budget - sum(price(s, r) for s, r in zip(spectra, ranks, strict=True)) in range(parameters((20, 30), 4))


def test_all_the_budget_keeps_all_matrices_whole() -> None:
    spectra = some(0)
    assert allocate(spectra, sum(s.dense_parameters for s in spectra)) == [None, None, None]
    assert allocate(spectra, 0) == [0, 0, 0]


def test_a_matrix_whose_components_matter_more_gets_more() -> None:
    flat = torch.full((16,), 1.0)
    low, high = Spectrum((16, 16), flat), Spectrum((16, 16), 10 * flat)
    first, second = allocate([low, high], 256)
    assert (first, second) == (0, None)


def test_a_matrix_that_is_of_low_rank_costs_its_rank() -> None:
    losses = torch.tensor([5.0, 4.0] + [0.0] * 14)
    assert allocate([Spectrum((16, 16), losses), Spectrum((16, 16), torch.ones(16))], 2 * 30 + 256) == [2, None]


def test_uniform_ranks_take_the_same_share_of_each() -> None:
    assert uniform([(48, 32), (32, 32)], 0.5) == [11, 9]  # 11 x 69 = 759 < 768 < 12 x 68, 9 x 55 = 495 < 512 < 10 x 54
    assert uniform([(48, 32)], 1.0) == [None]


def test_factors_that_take_nearly_all_of_a_matrix_are_not_made() -> None:
    """Of 20 x 30, rank 12 takes 456 of 600 parameters (76 %) and rank 13 takes 481 (80.2 %)."""
    spectra = [Spectrum((20, 30), torch.linspace(2, 1, 20) * scale, most=0.8) for scale in (1.0, 1.1, 1.2)]
    assert [s.max_rank for s in spectra] == [12] * 3
    for budget in (1200, 1500, 1700):
        ranks = allocate(spectra, budget)
        assert all(rank is None or rank <= 12 for rank in ranks)
        assert sum(600 if rank is None else parameters((20, 30), rank) for rank in ranks) <= budget
    assert allocate(spectra, 1799).count(None) == 2
