"""Exact rank arithmetic."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest

from laserlm.linalg.decomposition import rank_at, rank_of
from laserlm.reductions import Grid, Size

WIDTHS = range(64, 4097)
RHOS = [str(reduction.size) for name in ("paper", "fine") for part in Grid.parse(name).parts for reduction in part]


@pytest.mark.parametrize("rho", [*dict.fromkeys(RHOS), "0", "0.33", "0.999", "1"])
def test_the_rank_is_the_floor_of_the_exact_product_at_every_width(rho: str) -> None:
    integer, _, decimals = rho.partition(".")
    numerator, denominator = int(integer + decimals), 10 ** len(decimals)
    ranks = [rank_at(Decimal(rho), width) for width in WIDTHS]
    assert ranks == [numerator * width // denominator for width in WIDTHS]
    assert ranks == [Fraction(rho) * width // 1 for width in WIDTHS]


@pytest.mark.parametrize(
    ("width", "rho", "rank"),
    [
        (1600, "0.01", 16),
        (4096, "0.01", 40),
        (4096, "0.9", 3686),
        (4096, "0.0025", 10),
        (768, "0.05", 38),
        (1000, "0.1", 100),
        (99, "0.01", 0),
        (100, "0.01", 1),
        (576, "0", 0),
        (576, "1", 576),
        (0, "0.5", 0),
    ],
)
def test_ranks_worked_out_by_hand(width: int, rho: str, rank: int) -> None:
    assert rank_at(Decimal(rho), width) == rank


def test_binary_floats_lose_a_rank_where_exact_arithmetic_does_not() -> None:
    assert int((1 - 0.1 * 9.9) * 1600) == 15
    assert rank_at(Decimal("0.01"), 1600) == 16


def test_a_fraction_just_below_a_whole_rank_rounds_down() -> None:
    assert rank_at(Decimal("0.3333333333333333333333333333333333333333"), 3) == 0
    assert rank_at(Decimal("0.99999999999999999999999999999999999999999999"), 4096) == 4095


@pytest.mark.parametrize(
    ("text", "rank"), [("r40", 40), ("r64", 64), ("r65", 64), ("r4000", 64), ("r0", 0), ("0.5", 32), ("1", 64)]
)
def test_a_size_never_means_more_than_the_full_rank(text: str, rank: int) -> None:
    assert rank_of(Size.parse(text), 64) == rank
