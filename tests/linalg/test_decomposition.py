"""One decomposition and all its truncations, against numpy's singular value decomposition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from laserlm.errors import LaserError, ModelError, WeightError
from laserlm.linalg import Decomposition, basis_of, decompose, reference_truncation
from laserlm.linalg.decomposition import component_losses, seeded, whitened
from laserlm.reductions import Keep

SEED = 20


def gaussian(m: int, n: int, seed: int = SEED) -> Tensor:
    """Return a (m, n) float64 matrix of independent normal values."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((m, n)))


def with_spectrum(m: int, n: int, sigma: list[float] | np.ndarray[Any, Any], seed: int = SEED) -> Tensor:
    """Return a (m, n) float64 matrix with these singular values and random singular vectors."""
    rng, k = np.random.default_rng(seed), min(m, n)
    U = np.linalg.qr(rng.standard_normal((m, k)))[0]
    V = np.linalg.qr(rng.standard_normal((n, k)))[0]
    return torch.from_numpy((U * np.asarray(sigma, dtype=np.float64)) @ V.T)


def numpy_truncation(weight: Tensor, rank: int, keep: Keep = "top") -> Tensor:
    """Return the truncation from numpy's U S Vh in float64."""
    U, S, Vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    components = slice(0, rank) if keep == "top" else slice(len(S) - rank, None)
    return torch.from_numpy((U[:, components] * S[components]) @ Vh[components])


def sigma_of(weight: Tensor) -> np.ndarray[Any, Any]:
    """Return numpy's singular values in float64."""
    return np.asarray(np.linalg.svd(weight.double().numpy(), compute_uv=False))


MATRICES: dict[str, Callable[[], Tensor]] = {
    "tall": lambda: gaussian(60, 24),
    "wide": lambda: gaussian(24, 60),
    "square": lambda: gaussian(32, 32),
    "one row": lambda: gaussian(1, 17),
    "one column": lambda: gaussian(17, 1),
    "one value": lambda: torch.tensor([[-3.0]], dtype=torch.float64),
    "tall of rank 5": lambda: gaussian(40, 5, 1) @ gaussian(5, 20, 2),
    "wide of rank 5": lambda: gaussian(20, 5, 1) @ gaussian(5, 40, 2),
    "zero": lambda: torch.zeros(6, 9, dtype=torch.float64),
    "repeated values": lambda: with_spectrum(12, 8, [3, 3, 3, 2, 1, 1, 1, 0.5]),
    "orthogonal": lambda: with_spectrum(10, 10, [1.0] * 10),
    "fast decay": lambda: with_spectrum(30, 20, np.logspace(0, -6, 20)),
    "with a zero column": lambda: torch.cat([gaussian(15, 6), torch.zeros(15, 1, dtype=torch.float64)], dim=1),
}


@pytest.fixture(params=MATRICES)
def weight(request: pytest.FixtureRequest) -> Tensor:
    return MATRICES[request.param]()


def test_the_singular_values_are_numpys_and_fall(weight: Tensor) -> None:
    S, expected = decompose(weight).S, sigma_of(weight)
    scale = expected[0]
    assert S.shape == (min(weight.shape),)
    assert np.abs(S.numpy() - expected).max() <= 1e-8 * scale  # tiny ones lose half the digits in the Gram matrix
    assert np.abs(S.numpy() - expected)[expected > 1e-3 * scale].max(initial=0) <= 1e-12 * scale
    assert S.diff().max().item() <= 1e-8 * scale if len(S) > 1 else S.item() >= 0


def test_the_error_of_every_rank_is_the_root_of_the_sum_of_squares_of_the_dropped_values(weight: Tensor) -> None:
    decomposition, sigma = decompose(weight), sigma_of(weight)
    for rank in range(decomposition.max_rank + 1):
        top_error = torch.linalg.matrix_norm(weight - decomposition.truncate(rank)).item()
        bottom_error = torch.linalg.matrix_norm(weight - decomposition.truncate(rank, "bottom")).item()
        dropped = math.sqrt((sigma[rank:] ** 2).sum())
        dropped_from_the_top = math.sqrt((sigma[: len(sigma) - rank] ** 2).sum())
        assert top_error == pytest.approx(dropped, abs=2e-12 * max(sigma[0], 1e-300))
        assert bottom_error == pytest.approx(dropped_from_the_top, abs=2e-12 * max(sigma[0], 1e-300))


def test_top_and_bottom_add_up_to_the_matrix(weight: Tensor) -> None:
    decomposition = decompose(weight)
    scale = torch.linalg.matrix_norm(weight).item()
    for rank in range(decomposition.max_rank + 1):
        both = decomposition.truncate(rank) + decomposition.truncate(decomposition.max_rank - rank, "bottom")
        assert torch.linalg.matrix_norm(both - weight).item() <= 1e-13 * scale


def test_rank_zero_is_the_zero_matrix_and_full_rank_the_matrix(weight: Tensor) -> None:
    decomposition = decompose(weight)
    scale = torch.linalg.matrix_norm(weight).item()
    keeps: tuple[Keep, ...] = ("top", "bottom")
    for keep in keeps:
        assert torch.equal(decomposition.truncate(0, keep), torch.zeros_like(weight))
        full = decomposition.truncate(decomposition.max_rank, keep)
        assert torch.linalg.matrix_norm(full - weight).item() <= 1e-13 * scale


def test_a_truncation_has_no_more_than_its_rank(weight: Tensor) -> None:
    decomposition, true_rank = decompose(weight), int(np.linalg.matrix_rank(weight.numpy()))
    for rank in range(decomposition.max_rank + 1):
        assert np.linalg.matrix_rank(decomposition.truncate(rank).numpy()) == min(rank, true_rank)


def test_one_factor_is_orthonormal_and_the_other_orthogonal(weight: Tensor) -> None:
    m, n = weight.shape
    k, d = min(m, n), decompose(weight)
    assert (d.left.shape, d.right.shape, d.max_rank) == ((m, k), (k, n), k)
    orthonormal, projected = (d.right, d.left.T) if m >= n else (d.left.T, d.right)
    torch.testing.assert_close(orthonormal @ orthonormal.T, torch.eye(k, dtype=weight.dtype), rtol=0, atol=1e-12)
    products = projected @ projected.T
    off_diagonal = products - torch.diag(products.diagonal())
    assert off_diagonal.abs().max().item() <= 1e-12 * sigma_of(weight)[0] ** 2


@pytest.mark.parametrize("shape", [(60, 24), (24, 60), (32, 32)])
@pytest.mark.parametrize("keep", ["top", "bottom"])
def test_every_truncation_equals_numpys_in_float64(shape: tuple[int, int], keep: Keep) -> None:
    weight = gaussian(*shape)
    decomposition = decompose(weight)
    for rank in range(decomposition.max_rank + 1):
        difference = decomposition.truncate(rank, keep) - numpy_truncation(weight, rank, keep)
        assert torch.linalg.matrix_norm(difference).item() <= 1e-12 * torch.linalg.matrix_norm(weight).item()


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64)])
@pytest.mark.parametrize("decay", [0.0, 3.0], ids=["flat", "fast"])
def test_every_truncation_equals_numpys_to_float32_rounding(shape: tuple[int, int], decay: float) -> None:
    k = min(shape)
    weight = with_spectrum(*shape, np.linspace(2, 1, k) * np.logspace(0, -decay, k)).float()
    decomposition = decompose(weight)
    assert decomposition.left.dtype == decomposition.right.dtype == torch.float32
    for rank in range(0, k + 1, 5):
        difference = decomposition.truncate(rank).double() - numpy_truncation(weight, rank)
        assert torch.linalg.matrix_norm(difference).item() <= 1e-6 * torch.linalg.matrix_norm(weight).item()


def test_a_cut_at_the_edge_of_repeated_values_is_numpys_and_within_them_is_as_good() -> None:
    weight = with_spectrum(12, 8, [3, 3, 3, 2, 1, 1, 1, 0.5])
    decomposition = decompose(weight)
    for rank in (3, 4, 7):
        torch.testing.assert_close(decomposition.truncate(rank), numpy_truncation(weight, rank), rtol=0, atol=1e-12)
    error = torch.linalg.matrix_norm(weight - decomposition.truncate(2)).item()
    assert error == pytest.approx(math.sqrt(9 + 4 + 1 + 1 + 1 + 0.25), rel=1e-12)


def test_a_diagonal_matrix_worked_out_by_hand() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, -5.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    decomposition = decompose(weight)
    top, bottom = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    top[1, 1], top[3, 2], bottom[2, 0] = -5, 4, 3
    torch.testing.assert_close(decomposition.S, torch.tensor([5.0, 4.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(decomposition.truncate(2), top)
    torch.testing.assert_close(decomposition.truncate(1, "bottom"), bottom)


def test_the_values_of_a_matrix_far_from_one_in_scale_keep_their_relative_error() -> None:
    for scale in (1e-18, 1e15):
        weight = (gaussian(20, 12) * scale).float()
        np.testing.assert_allclose(decompose(weight).S.numpy(), sigma_of(weight), rtol=1e-5)


def test_a_transposed_and_a_sliced_matrix_decompose_as_their_copies_do() -> None:
    weight = gaussian(40, 30)
    for view in (weight.T, weight[::2, 3:20]):
        assert not view.is_contiguous()
        torch.testing.assert_close(decompose(view).truncate(4), numpy_truncation(view, 4), rtol=0, atol=1e-12)


def test_the_matrix_is_left_as_it_was() -> None:
    weight = gaussian(9, 7)
    before = weight.clone()
    decompose(weight).truncate(3).zero_()
    reference_truncation(weight, 3).zero_()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("rank", [-1, 7])
def test_a_rank_that_the_matrix_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is not within 0 to 6"):
        decompose(gaussian(6, 8)).truncate(rank)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_the_bytes_are_those_of_both_factors(shape: tuple[int, int]) -> None:
    assert decompose(gaussian(*shape)).bytes == (50 * 8 + 8 * 8) * 8
    assert decompose(gaussian(*shape).float()).bytes == (50 * 8 + 8 * 8) * 4


@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_a_stored_basis_gives_the_same_decomposition_again(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    basis, fresh = basis_of(weight), decompose(weight)
    again = Decomposition.from_basis(weight, basis)
    assert basis.shape == (8, 8)
    assert basis.is_contiguous()
    assert torch.equal(again.left, fresh.left)
    assert torch.equal(again.right, fresh.right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_matrix_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    weight = gaussian(24, 40).to(dtype)
    decomposition = decompose(weight)
    assert decomposition.left.dtype == torch.float32
    difference = decomposition.truncate(7).double() - numpy_truncation(weight, 7)
    assert torch.linalg.matrix_norm(difference).item() <= 1e-6 * torch.linalg.matrix_norm(weight.double()).item()


@pytest.mark.parametrize("decomposed", [decompose, lambda w: reference_truncation(w, 1)], ids=["exact", "reference"])
@pytest.mark.parametrize(
    ("values", "count"),
    [([[math.nan, 1.0], [2.0, 3.0]], 1), ([[math.inf, 1.0], [-math.inf, math.nan]], 3)],
    ids=["nan", "inf"],
)
def test_nan_and_inf_are_refused_with_their_number_and_the_next_step(
    decomposed: Callable[[Tensor], object], values: list[list[float]], count: int
) -> None:
    with pytest.raises(WeightError) as caught:
        decomposed(torch.tensor(values))
    assert f"shape (2, 2) holds {count} values that are NaN or inf" in str(caught.value)
    assert "load it again" in str(caught.value)
    assert isinstance(caught.value, ModelError)
    assert isinstance(caught.value, LaserError)


@pytest.mark.parametrize("decomposed", [decompose, lambda w: reference_truncation(w, 1)], ids=["exact", "reference"])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int8), "shape (2, 3) of torch.int8"),
        (torch.ones(2, 3, dtype=torch.complex64), "shape (2, 3) of torch.complex64"),
        (torch.ones(2, 3, 4), "shape (2, 3, 4) of torch.float32"),
        (torch.ones(5), "shape (5,) of torch.float32"),
    ],
    ids=["integers", "complex", "three axes", "one axis"],
)
def test_what_is_no_matrix_of_floats_is_refused_with_its_shape_and_dtype(
    decomposed: Callable[[Tensor], object], weight: Tensor, message: str
) -> None:
    with pytest.raises(WeightError) as caught:
        decomposed(weight)
    assert message in str(caught.value)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (12, 12)])
def test_where_the_eigensolver_fails_the_singular_value_decomposition_stands_in(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0

    def failing(_: Tensor) -> None:
        nonlocal failures
        failures += 1
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            "the algorithm failed to converge"
        )

    weight = gaussian(*shape)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    decomposition = decompose(weight)
    assert failures == 1
    np.testing.assert_allclose(decomposition.S.numpy(), sigma_of(weight), rtol=1e-12)
    keeps: tuple[Keep, ...] = ("top", "bottom")
    for keep in keeps:
        truncated = decomposition.truncate(5, keep)
        torch.testing.assert_close(truncated, numpy_truncation(weight, 5, keep), rtol=0, atol=1e-12)


def published_truncation(weight: Tensor, rank: int, niter: int, seed: int) -> Tensor:
    """Return what the published code computes once torch's global generator has this seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(weight.float(), q=rank, niter=niter)
    return U @ torch.diag(S) @ V.T


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
@pytest.mark.parametrize(("rank", "niter", "seed"), [(1, 2, 0), (4, 2, 0), (4, 2, 5), (4, 20, 0), (40, 2, 0)])
def test_the_reference_truncation_is_the_published_one_under_its_seed(
    shape: tuple[int, int], rank: int, niter: int, seed: int
) -> None:
    weight = gaussian(*shape).float()
    ours = reference_truncation(weight, rank, niter=niter, seed=seed)
    torch.testing.assert_close(ours, published_truncation(weight, rank, niter, seed), rtol=0, atol=2e-5)
    assert torch.equal(ours, reference_truncation(weight, rank, niter=niter, seed=seed))


def test_the_reference_defaults_are_two_power_iterations_and_seed_zero() -> None:
    weight = gaussian(64, 40).float()
    torch.testing.assert_close(reference_truncation(weight, 4), published_truncation(weight, 4, 2, 0), rtol=0, atol=2e-5)


def test_on_a_slow_spectrum_the_reference_keeps_another_subspace_and_on_a_fast_one_the_same() -> None:
    slow, fast = gaussian(64, 40).float(), with_spectrum(64, 40, np.logspace(0, -39, 40)).float()
    for weight, low, high in ((slow, 0.1, 1.0), (fast, 0.0, 1e-5)):
        difference = torch.linalg.matrix_norm(reference_truncation(weight, 4) - decompose(weight).truncate(4))
        assert low <= (difference / torch.linalg.matrix_norm(weight)).item() <= high


def test_another_seed_and_more_iterations_give_another_reference_truncation() -> None:
    weight = gaussian(64, 40).float()
    best = math.sqrt((sigma_of(weight)[4:] ** 2).sum())
    errors = [
        torch.linalg.matrix_norm(weight - reference_truncation(weight, 4, niter=niter, seed=seed)).item()
        for niter, seed in ((2, 0), (2, 1), (20, 0))
    ]
    assert len(set(errors)) == 3
    assert all(error >= best * (1 - 1e-6) for error in errors)
    assert errors[2] - best < errors[0] - best


def test_the_reference_truncation_leaves_the_global_random_state_alone() -> None:
    weight = gaussian(20, 12)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = reference_truncation(weight, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(reference_truncation(weight, 3), first)


def test_the_reference_truncation_takes_a_bfloat16_matrix_in_float32() -> None:
    weight = gaussian(24, 40).bfloat16()
    ours = reference_truncation(weight, 6)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, published_truncation(weight, 6, 2, 0), rtol=0, atol=2e-5)


def test_reference_rank_zero_is_the_zero_matrix() -> None:
    assert torch.equal(reference_truncation(gaussian(5, 4), 0), torch.zeros(5, 4, dtype=torch.float64))


def test_a_negative_reference_rank_is_refused_as_for_the_exact_decomposition() -> None:
    with pytest.raises(ValueError, match="rank -1 is not within 0 to 6"):
        reference_truncation(gaussian(6, 8), -1)


def inputs(n: int, tokens: int = 400) -> Tensor:
    """Inputs (tokens, n) that lie mostly in a few directions."""
    generator = torch.Generator().manual_seed(3)
    scales = torch.logspace(1, -2, n)
    return torch.randn(tokens, n, generator=generator) * scales @ torch.linalg.qr(torch.randn(n, n, generator=generator))[0]


@pytest.mark.parametrize("shape", [(12, 20), (20, 20), (30, 20)])
def test_whitened_truncation_has_the_least_error_of_its_outputs(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    X = inputs(shape[1])
    d = whitened(weight, X.T @ X / len(X))
    torch.testing.assert_close(d.truncate(d.max_rank), weight, atol=1e-4, rtol=1e-3)
    # Independently: no W_r puts out anything nearer to Y = X W^T than the truncation of Y itself, which W_r reaches.
    Y = (X @ weight.T).double().numpy()
    S = np.linalg.svd(Y, compute_uv=False)
    for rank in (0, 1, 4, 9):
        error = np.linalg.norm(Y - (X @ d.truncate(rank).T).double().numpy())
        assert error == pytest.approx(np.linalg.norm(S[rank:]), rel=1e-3)
        plain = np.linalg.norm(Y - (X @ decompose(weight).truncate(rank).T).double().numpy())
        assert error <= plain * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_a_decomposition_whitened_on_both_sides_loses_what_its_components_lose(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    X, D = inputs(shape[1]), inputs(shape[0]) * torch.linspace(0.1, 2, shape[0])
    M, G = X.T @ X / len(X), D.T @ D / len(D)
    d = whitened(weight, M, G)
    torch.testing.assert_close(d.truncate(d.max_rank), weight, atol=1e-4, rtol=1e-3)

    def loss(difference: Tensor) -> float:
        return float((G @ difference @ M @ difference.T).trace() / 2)

    losses = component_losses(d, M, G)
    for i in (0, 3, 9):
        assert loss(torch.outer(d.left[:, i], d.right[i])) == pytest.approx(float(losses[i]), rel=1e-2)
    for rank in (0, 1, 4, 9):
        assert loss(weight - d.truncate(rank)) == pytest.approx(float(losses[rank:].sum()), rel=2e-2)  # damped
        assert loss(weight - d.truncate(rank)) <= 1.02 * loss(weight - whitened(weight, M).truncate(rank))


def test_whitening_by_inputs_alike_in_all_directions_is_the_plain_decomposition() -> None:
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        whitened(weight, 3 * torch.eye(6)).truncate(3), decompose(weight).truncate(3), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_whitening_survives_inputs_that_never_use_a_direction(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    moments = torch.diag(torch.tensor([1.0] * 3 + [0.0] * (shape[1] - 3)))
    approximation = whitened(weight, moments).truncate(3)
    assert approximation.isfinite().all()
    torch.testing.assert_close(approximation[:, :3], weight[:, :3], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("tokens", [5, 40])
def test_whitening_survives_fewer_tokens_than_inputs_and_rounded_moments(tokens: int) -> None:
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    X = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)) * 10
    approximation = whitened(weight, (X.T @ X / tokens).float()).truncate(tokens)  # float32: its least eigenvalue is below zero
    assert approximation.isfinite().all()
    Y = X @ weight.T
    assert float((X @ approximation.T - Y).norm() / Y.norm()) < 1e-2


def test_inputs_that_overflowed_are_an_error_that_tells_the_next_step() -> None:
    with pytest.raises(WeightError, match="bfloat16"):
        whitened(torch.ones(3, 2), torch.tensor([[1.0, float("inf")], [0.0, 1.0]]))


class OnApple(Tensor):
    """Plays a tensor on an Apple GPU: it says so, and refuses float64 until it is moved to the CPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("mps")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, OnApple) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return result


def on_apple(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnApple)


def test_float64_is_computed_on_the_cpu_for_a_matrix_on_an_apple_gpu() -> None:
    weight, moments = gaussian(20, 12).float(), torch.eye(12)
    with pytest.raises(TypeError, match="float64"):
        on_apple(weight).double()
    with results_left_on_the_cpu():
        assert torch.equal(basis_of(on_apple(weight)), basis_of(weight))
        for W, M in ((weight, moments), (weight.T.contiguous(), torch.eye(20))):
            expected, actual = whitened(W, M), whitened(on_apple(W), on_apple(M))
            assert torch.equal(actual.left, expected.left)
            assert torch.equal(actual.right, expected.right)


@contextmanager
def results_left_on_the_cpu() -> Iterator[None]:
    """Let results that are moved back to the Apple GPU, which is not here, stay on the CPU."""
    to = Tensor.to

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if args == (torch.device("mps"),) else to(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", moved)
        yield


def test_the_random_state_of_an_apple_gpu_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.tensor([7])
    written: list[Tensor] = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", written.append)
    before = torch.random.get_rng_state()
    reference_truncation(gaussian(20, 12).float(), 3)
    assert [id(x) for x in written] == [id(state)]
    assert torch.equal(torch.random.get_rng_state(), before)
    monkeypatch.setattr(torch, "svd_lowrank", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reference_truncation(gaussian(20, 12).float(), 3)
    assert len(written) == 2


def test_a_seed_leaves_the_random_state_of_every_device_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator of Apple's GPUs, which ``fork_rng`` does not restore, too."""
    restored: list[str] = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "state of the GPU")
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    with seeded(3):
        assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert restored == ["state of the GPU"] * 2
