from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laserlm.linalg.pivots import PART_BYTES, Pivoted, parameters, pivot_rows, rank_within


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("m", "r"), [(40, 12), (40, 1), (12, 12), (7, 0)])
def test_the_other_rows_are_combinations_of_the_pivots(m: int, r: int) -> None:
    left = random(m, r)
    order, coefficients = pivot_rows(left)
    assert order.sort().values.tolist() == list(range(m))
    assert coefficients.shape == (m - r, r)
    torch.testing.assert_close(coefficients @ left[order[:r]], left[order[r:]])
    right = random(r, 9)  # what holds for the left factor holds for the product
    torch.testing.assert_close(coefficients @ (left @ right)[order[:r]], (left @ right)[order[r:]])


@pytest.mark.parametrize("seed", range(5))
def test_coefficients_stay_small_where_the_first_rows_are_nearly_dependent_and_columns_differ_in_scale(seed: int) -> None:
    left = random(120, 30, seed=seed)
    left[:30] = left[:1] + 1e-9 * left[:30]  # as pivots they would need coefficients of a thousand million
    _, coefficients = pivot_rows(left * torch.logspace(0, -12, 30, dtype=torch.float64))
    assert coefficients.abs().max() < 3


def test_left_factors_below_full_rank_need_no_more_rows_than_their_rank() -> None:
    left = random(20, 3) @ random(3, 6, seed=1)
    left[:, 5] = 0
    order, coefficients = pivot_rows(left)
    torch.testing.assert_close(coefficients @ left[order[:6]], left[order[6:]])
    assert coefficients.abs().max() < 5
    assert coefficients[:, 3:].abs().max() == 0
    assert pivot_rows(torch.zeros(5, 2))[1].tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12), (1, 4)])
def test_the_largest_rank_within_a_budget_is_the_one_that_counting_finds(shape: tuple[int, int]) -> None:
    m, n = shape
    for budget in range(m * n + 3):
        assert rank_within(shape, budget) == max(r for r in range(min(shape) + 1) if parameters(shape, r) <= budget)
    assert parameters(shape, min(shape)) == m * n


def test_a_model_with_every_matrix_at_a_share_of_its_rank_has_the_published_number_of_parameters() -> None:
    """SmolLM2-135M: 30 blocks; embeddings and norms have the rest of 134.5 million."""
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    rest = 134_515_008 - 30 * sum(m * n for m, n in shapes)
    for share, millions in ((0.5, 94.4), (0.75, 117.7)):
        factors = 30 * sum(parameters(shape, int(share * min(shape))) for shape in shapes)
        assert (rest + factors) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [PART_BYTES, 16 * 12 * 7, 1])
def test_a_product_in_parts_of_columns_is_rounded_once(part: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laserlm.linalg.pivots.PART_BYTES", part)
    left, right = random(40, 12).float(), random(12, 30, seed=1).float()
    found = Pivoted.of(left, right, dtype)
    order, coefficients = pivot_rows(left)
    assert torch.equal(found.order, order)
    assert torch.equal(found.coefficients, coefficients.to(dtype))
    exact = left.double()[order[:12]] @ right.double()
    assert found.rows.dtype == dtype
    torch.testing.assert_close(found.rows.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.001, atol=0)
    assert Pivoted.of(torch.zeros(5, 0), torch.zeros(0, 9), dtype).rows.shape == (0, 9)
