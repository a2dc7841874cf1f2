from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from laserlm.linalg.spectrum import (
    condition,
    edge,
    effective_rank,
    energy_share,
    gavish_donoho,
    noise,
    nuclear_share,
    numerical_rank,
    rank_beyond,
    signal_to_noise,
    stable_rank,
    subspace_share,
)

SHAPES = [(200, 200), (400, 150), (150, 400), (600, 60)]


def values(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(np.linalg.svd(matrix, compute_uv=False))


def gaussian(shape: tuple[int, int], seed: int, s: float = 1.0) -> np.ndarray:
    return s * np.random.default_rng(seed).standard_normal(shape)


def test_a_spectrum_worked_out_by_hand() -> None:
    S = torch.tensor([4.0, 2.0, 2.0, 0.0])
    p = [0.5, 0.25, 0.25]
    assert effective_rank(S) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert stable_rank(S) == pytest.approx(24 / 16)
    assert numerical_rank(S, (4, 5)) == 3
    assert condition(S) == math.inf
    assert condition(S[:3]) == 2
    assert nuclear_share(S, 1) == 0.5
    assert energy_share(S, 1) == pytest.approx(16 / 24)
    assert signal_to_noise(S, 1) == 2
    assert signal_to_noise(S, 3) == math.inf


def test_equal_values_use_every_direction_and_a_zero_matrix_none() -> None:
    assert effective_rank(torch.full((7,), 3.0)) == pytest.approx(7)
    assert stable_rank(torch.full((7,), 3.0)) == pytest.approx(7)
    zero = torch.zeros(5)
    assert (effective_rank(zero), stable_rank(zero), numerical_rank(zero, (5, 5)), nuclear_share(zero, 2)) == (0, 0, 0, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_noise_level_is_found_and_the_edge_is_where_noise_ends(shape: tuple[int, int]) -> None:
    S = values(gaussian(shape, 0, s=0.3))
    assert noise(S, shape) == pytest.approx(0.3, rel=0.02)
    assert edge(0.3, shape) == pytest.approx(float(S.max()), rel=0.04)


@pytest.mark.parametrize("shape", SHAPES)
def test_pure_noise_keeps_nothing(shape: tuple[int, int]) -> None:
    ranks = [rank_beyond(values(gaussian(shape, seed)), shape) for seed in range(40)]
    assert sum(ranks) <= 1
    assert sum(ranks[:3]) == 0
    assert sum(gavish_donoho(values(gaussian(shape, seed)), shape) for seed in range(10)) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spikes", [1, 5])
def test_planted_spikes_are_kept_and_nothing_else(shape: tuple[int, int], spikes: int) -> None:
    rng = np.random.default_rng(7)
    m, n = shape
    U, V = (np.linalg.qr(rng.standard_normal((side, spikes)))[0] for side in shape)
    strength = np.linspace(2.0, 3.0, spikes) * (math.sqrt(m) + math.sqrt(n))
    S = values(gaussian(shape, 8) + (U * strength) @ V.T)
    assert rank_beyond(S, shape) == spikes
    assert gavish_donoho(S, shape) == spikes


@pytest.mark.parametrize(("beta", "published"), [(1.0, 2.858), (0.5, 2.1711), (0.1, 1.6089)])
def test_the_threshold_is_that_of_the_published_table(beta: float, published: float) -> None:
    # Gavish and Donoho, table IV: the threshold in units of the median singular value.
    large = 1000
    shape = (int(beta * large), large)
    S = torch.tensor([2.0, 1.0, 0.5])  # median 1
    for factor, ranks in ((0.999, 1), (1.001, 0)):
        S[0] = published / factor
        assert gavish_donoho(S, shape) == ranks


def test_layers_that_share_directions_span_fewer() -> None:
    V = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]
    assert subspace_share(V[:, :6], V[:, :6], 0.0) == 0.5
    assert subspace_share(V[:, :6], V[:, 6:], 0.0) == 1
    assert subspace_share(V[:, :6], V[:, :6], 2.0) == 0
