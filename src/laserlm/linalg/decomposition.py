"""Decompose a matrix once; every truncation is then a slice of the factors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor

from laserlm.errors import WeightError
from laserlm.linalg.precision import full_precision
from laserlm.reductions import Keep, Size

ALGORITHM = "gram64-1"
"""Version of the algorithm of ``basis_of``, a part of the cache key of a basis."""
DAMPING = 1e-6
"""Share of the mean second moment of the inputs that is added in every direction, before an inversion."""
OUTPUT_DAMPING = 0.1
"""The same for the gradients by the outputs, whose moments are known from fewer and noisier values."""


def rank_at(rho: Decimal, max_rank: int) -> int:
    """Return floor(rho * max_rank), computed exactly.

    Binary floats are off by one at some widths: ``(1 - 0.99) * 1600`` is 15.99..., not 16.
    """
    return int(Fraction(rho) * max_rank)


def rank_of(size: Size, max_rank: int) -> int:
    """Return the rank of a size for a matrix with ``max_rank`` singular values, at most ``max_rank``."""
    if size.rho is not None:
        return rank_at(size.rho, max_rank)
    if size.strengths is not None:
        return max(0, max_rank - list(size.strengths.values()).count(0.0))
    if size.rank is None:
        raise AssertionError("a size is a fraction, a rank or the components to drop or to scale")
    return min(size.rank, max_rank)


@dataclass(frozen=True)
class Decomposition:
    """A matrix W (m, n) as ``left @ right``, in order of decreasing singular value; k = min(m, n).

    One factor is orthonormal and the other is W projected on it, so that no truncation divides by a singular value:
    for m >= n, right = V^T (k, n) and left = W V (m, k); for m < n, left = U (m, k) and right = U^T W (k, n).

    Args:
        left: (m, k).
        right: (k, n).
    """

    left: Tensor
    right: Tensor

    @classmethod
    @full_precision()
    def from_basis(cls, weight: Tensor, basis: Tensor) -> Decomposition:
        """Project ``weight`` (m, n) on its singular basis (k, k): columns of V for m >= n, columns of U for m < n."""
        m, n = weight.shape
        if m >= n:
            return cls(left=weight @ basis, right=basis.T)
        return cls(left=basis, right=basis.T @ weight)

    @property
    def max_rank(self) -> int:
        """k = min(m, n)."""
        return self.left.shape[1]

    @property
    def S(self) -> Tensor:
        """Singular values (k,), as norms of the projected factor."""
        m, n = self.left.shape[0], self.right.shape[1]
        norms: Tensor = torch.linalg.vector_norm(self.left, dim=0) if m >= n else torch.linalg.vector_norm(self.right, dim=1)
        return norms

    @property
    def bytes(self) -> int:
        """Size of both factors in bytes."""
        return self.left.nbytes + self.right.nbytes

    @full_precision()
    def truncate(self, rank: int, keep: Keep = "top") -> Tensor:
        """Return the (m, n) matrix of the ``rank`` largest (or, with ``bottom``, smallest) singular values."""
        left, right = self.factors(rank, keep)
        return left @ right

    def factors(self, rank: int, keep: Keep = "top") -> tuple[Tensor, Tensor]:
        """Return the two factors, (m, r) and (r, n), of the ``rank`` largest (or smallest) singular values."""
        if not 0 <= rank <= self.max_rank:
            raise ValueError(f"rank {rank} is not within 0 to {self.max_rank}")
        components = slice(0, rank) if keep == "top" else slice(self.max_rank - rank, None)
        return self.left[:, components], self.right[components]


def basis_of(weight: Tensor) -> Tensor:
    """Return the singular vectors (k, k) of the shorter side of ``weight`` (m, n), by decreasing singular value.

    They are the eigenvectors of the smaller Gram matrix. In float64, the squared condition number costs no accuracy that
    float32 could represent. If the eigensolver fails, the singular value decomposition is used.

    Args:
        weight: (m, n), float32 or float64.

    Returns:
        Tensor: columns of V for m >= n, columns of U for m < n, in the dtype of ``weight``.
    """
    wide = as_float64(weight)
    m, n = wide.shape
    gram = wide.T @ wide if m >= n else wide @ wide.T  # (k, k)
    try:
        _, vectors = torch.linalg.eigh(gram)
        vectors = vectors.flip(1)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        U, _, Vh = torch.linalg.svd(wide, full_matrices=False)
        vectors = Vh.T if m >= n else U
    return _as_before(vectors, weight)


def decompose(weight: Tensor) -> Decomposition:
    """Decompose a matrix (m, n) in float32, or in float64 for a float64 matrix.

    Raises:
        WeightError: if the matrix holds NaN or inf.
    """
    weight = as_float_matrix(weight)
    return Decomposition.from_basis(weight, basis_of(weight))


def decompose_product(up: Tensor, down: Tensor) -> Decomposition:
    """Decompose a product of two factors, (m, r) and (r, n), without the product; k = min(m, n, r). The left factor has the
    singular values."""
    Q, R = torch.linalg.qr(as_float64(up))
    P, T = torch.linalg.qr(as_float64(down).T)
    U, S, Vh = torch.linalg.svd(R @ T.T, full_matrices=False)  # (min(m, r), min(n, r))
    like = up if up.dtype == torch.float64 else up.float()
    return Decomposition(_as_before(Q @ U * S, like), _as_before(Vh @ P.T, like))


def whitened(weight: Tensor, moments: Tensor, output_moments: Tensor | None = None) -> Decomposition:
    """Decompose a matrix W (m, n) so that each truncation minimises the mean squared change of the outputs W x.

    With M the mean of x x^T and M = L L^T, the singular value decomposition of W L gives the truncation W_r that minimises the
    mean of |W x - W_r x|^2. With G the mean of g g^T over the gradients of a loss by the outputs and G = P P, that of P W L
    minimises the mean of (g^T (W - W_r) x)^2 if inputs and gradients are independent. That is twice the expected change of the
    loss, to second order.

    For m <= n, W_r is P^-1 U_r U_r^T P W. For m > n, W_r is W L V_r V_r^T L^-1. L and P are computed from eigenvectors, because
    a Cholesky factorisation fails if some direction has no input. The norms of the factors are not singular values of W.

    Args:
        weight: (m, n).
        moments: M (n, n), mean over tokens of x x^T.
        output_moments: G (m, m), mean over tokens of g g^T; None weighs all outputs alike.

    Raises:
        WeightError: if the weight or the moments hold NaN or inf.

    Source: Wang et al., SVD-LLM, arXiv 2403.07378, section 3.1; Martens and Grosse, arXiv 1503.05671, for the two sides.
    """
    weight = as_float_matrix(weight)
    if not bool(moments.isfinite().all()):
        raise WeightError("the layer's inputs overflow its dtype; load the model in bfloat16 or float32")
    W = as_float64(weight)
    M = as_float64(moments).to(W.device)
    G = torch.eye(len(W), dtype=W.dtype, device=W.device) if output_moments is None else as_float64(output_moments).to(W.device)
    m, n = W.shape
    if m <= n:
        P, P_inverse = _square_root(G, OUTPUT_DAMPING)
        PW = P @ W
        U = torch.linalg.eigh(PW @ M @ PW.T)[1].flip(1)  # (m, m)
        return Decomposition(left=_as_before(P_inverse @ U, weight), right=_as_before(U.T @ PW, weight))
    L, L_inverse = _square_root(M, DAMPING)
    WL = W @ L
    V = torch.linalg.eigh(WL.T @ G @ WL)[1].flip(1)  # (n, n)
    return Decomposition(left=_as_before(WL @ V, weight), right=_as_before(V.T @ L_inverse, weight))


def _square_root(moments: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the symmetric square root of second moments and its inverse, with a share of their mean added."""
    variances, Q = torch.linalg.eigh(moments)
    roots = (variances.clamp_min(0) + damping * float(moments.diagonal().mean())).sqrt()
    return (Q * roots) @ Q.T, (Q / roots) @ Q.T


def component_losses(decomposition: Decomposition, moments: Tensor, output_moments: Tensor) -> Tensor:
    """Return the expected change of the loss (k,) when each component of a matrix is dropped, to second order.

    Args:
        decomposition: of the matrix (m, n).
        moments: (n, n), mean over tokens of x x^T.
        output_moments: (m, m), mean over tokens of g g^T, with g the gradient of the loss by the outputs.
    """
    left, right = as_float64(decomposition.left), as_float64(decomposition.right)
    G, M = as_float64(output_moments).to(left.device), as_float64(moments).to(left.device)
    losses: Tensor = torch.linalg.vecdot(left, G @ left, dim=0) * torch.linalg.vecdot(right, right @ M) / 2
    return losses


def as_float_matrix(weight: Tensor) -> Tensor:
    """Return the matrix in float32 or float64; raise a WeightError unless it is a finite matrix of floats."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise WeightError(f"a matrix of floats is needed, got shape {tuple(weight.shape)} of {weight.dtype}")
    # A sum with NaN or inf is not finite, and one pass finds it; a finite matrix may have a sum that overflows.
    if not (torch.isfinite(weight.sum()) or torch.isfinite(weight).all()):
        raise WeightError(
            f"the matrix of shape {tuple(weight.shape)} holds {int((~torch.isfinite(weight)).sum())} values that are "
            "NaN or inf; the checkpoint is damaged or overflowed its dtype: load it again, or with another dtype"
        )
    weight = weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()


def as_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its device, or on the CPU if it is on an Apple GPU, which has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _as_before(wide: Tensor, weight: Tensor) -> Tensor:
    """Return a float64 result in the dtype of a weight and on its device."""
    return wide.to(weight.dtype).to(weight.device).contiguous()


def reference_truncation(weight: Tensor, rank: int, *, niter: int = 2, seed: int = 0) -> Tensor:
    """Return the rank-``rank`` approximation (m, n) as the published code computes it, with a seed.

    Args:
        weight: (m, n).
        rank: as for ``reference_decomposition``.
        niter: as for ``reference_decomposition``.
        seed: as for ``reference_decomposition``.
    """
    return reference_decomposition(weight, rank, niter=niter, seed=seed).truncate(rank)


@full_precision()
def reference_decomposition(weight: Tensor, rank: int, *, niter: int = 2, seed: int = 0) -> Decomposition:
    """Decompose a matrix (m, n) for one rank as the published code does, with a seed.

    If the spectrum decays slowly, the randomised range finder keeps a clearly different subspace than the exact truncation.

    Args:
        weight: (m, n).
        rank: number of singular values kept, all that the decomposition has.
        niter: power iterations; the published code takes 2, and 20 for RoBERTa and the Decision Transformer.
        seed: seed of the random projection; the caller's random state does not change.

    Source: arXiv 2312.13558, released code; Halko, Martinsson and Tropp, arXiv 0909.4061.
    """
    weight = as_float_matrix(weight)
    if not 0 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} is not within 0 to {min(weight.shape)}")
    if rank == 0:
        return Decomposition(left=weight.new_zeros(len(weight), 0), right=weight.new_zeros(0, weight.shape[1]))
    with seeded(seed):
        U, S, V = torch.svd_lowrank(weight, q=rank, niter=niter)
    return Decomposition(left=U * S, right=V.T)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of every device inside a ``with`` block, and restore them at its end."""
    apple = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None  # fork_rng knows one kind of device
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            yield
    finally:
        if apple is not None:
            torch.mps.set_rng_state(apple)
