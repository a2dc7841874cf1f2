"""One decomposition of a matrix, from which every rank is a column mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laserlm.errors import WeightError
from laserlm.reductions import Keep

__all__ = ["ALGORITHM", "Decomposition", "basis_of", "decompose", "reference_truncation", "whitened"]

ALGORITHM = "gram64-1"
"""Version of the algorithm behind ``basis_of``; part of the key under which a basis is cached."""
DAMPING = 1e-6
"""Least second moment of the inputs in any direction, as a share of the mean, where moments must be inverted."""


@dataclass(frozen=True)
class Decomposition:
    """A matrix W (m, n) as ``left @ right``, ordered by falling singular value; k = min(m, n).

    One factor is orthonormal, the other is W projected on it, so truncation never divides by a singular value:
    for m >= n, right = V^T (k, n) and left = W V (m, k); for m < n, left = U (m, k) and right = U^T W (k, n).

    Args:
        left: (m, k).
        right: (k, n).
    """

    left: Tensor
    right: Tensor

    @classmethod
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
        """Memory of both factors in bytes."""
        return self.left.nbytes + self.right.nbytes

    def truncate(self, rank: int, keep: Keep = "top") -> Tensor:
        """Return the (m, n) matrix of the ``rank`` largest (or, with ``bottom``, smallest) singular values."""
        left, right = self.factors(rank, keep)
        return left @ right

    def factors(self, rank: int, keep: Keep = "top") -> tuple[Tensor, Tensor]:
        """Return the two factors, (m, r) and (r, n), of the ``rank`` largest (or smallest) singular values."""
        if not 0 <= rank <= self.max_rank:
            raise ValueError(f"rank {rank} is not within 0 to {self.max_rank}")
        kept = slice(0, rank) if keep == "top" else slice(self.max_rank - rank, None)
        return self.left[:, kept], self.right[kept]


def basis_of(weight: Tensor) -> Tensor:
    """Return the singular vectors (k, k) of the shorter side of ``weight`` (m, n), by falling singular value.

    They are the eigenvectors of the smaller Gram matrix, computed in float64, where squaring the condition number
    costs nothing that float32 could show. Falls back to the singular value decomposition where the eigensolver fails.

    Args:
        weight: (m, n), float32 or float64.

    Returns:
        Tensor: columns of V for m >= n, columns of U for m < n, in the dtype of ``weight``.
    """
    # Apple's GPUs have no float64.
    wide = (weight.cpu() if weight.device.type == "mps" else weight).double()
    m, n = wide.shape
    gram = wide.T @ wide if m >= n else wide @ wide.T  # (k, k)
    try:
        _, vectors = torch.linalg.eigh(gram)
        vectors = vectors.flip(1)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        U, _, Vh = torch.linalg.svd(wide, full_matrices=False)
        vectors = Vh.T if m >= n else U
    basis: Tensor = vectors.to(weight).contiguous()
    return basis


def decompose(weight: Tensor) -> Decomposition:
    """Decompose a matrix (m, n) of finite values; computed in float32, or in float64 for a float64 matrix.

    Raises:
        WeightError: if the matrix holds NaN or inf.
    """
    weight = as_float_matrix(weight)
    return Decomposition.from_basis(weight, basis_of(weight))


def whitened(weight: Tensor, moments: Tensor) -> Decomposition:
    """Decompose a matrix W (m, n) so that its truncations change what it puts out least, over the inputs it meets.

    With X the inputs (n, tokens), M = X X^T / tokens and M = L L^T, the singular value decomposition of W L gives the
    truncation W_r that minimises the mean of |W x - W_r x|^2. For m <= n that is W projected on the first columns of U,
    without an inverse; for m > n it is W L V_r V_r^T L^-1. The square root L comes from the eigenvectors of M, for a
    Cholesky factor fails where some direction has no input. The norms of the factors are not singular values of W.

    Args:
        weight: (m, n).
        moments: M (n, n), mean over tokens of x x^T.

    Raises:
        WeightError: if the weight or the moments hold NaN or inf.

    Source: Wang et al., SVD-LLM, arXiv 2403.07378, section 3.1.
    """
    weight = as_float_matrix(weight)
    if not bool(moments.isfinite().all()):
        raise WeightError("the inputs of the layer overflow its dtype; load the model in bfloat16 or float32")
    place = "cpu" if weight.device.type == "mps" else weight.device  # Apple's GPUs have no float64
    W, M = (t.to(place, torch.float64) for t in (weight, moments))
    m, n = W.shape
    if m <= n:
        U = torch.linalg.eigh(W @ M @ W.T)[1].flip(1)  # (m, m)
        return Decomposition(left=U.to(weight).contiguous(), right=(U.T @ W).to(weight))
    variances, Q = torch.linalg.eigh(M)
    roots = variances.clamp_min(DAMPING * float(M.diagonal().mean())).sqrt()  # (n,)
    WL = W @ (Q * roots)
    V = torch.linalg.eigh(WL.T @ WL)[1].flip(1)  # (n, n)
    right = V.T @ (Q / roots).T  # V^T L^-1
    return Decomposition(left=(WL @ V).to(weight), right=right.to(weight))


def as_float_matrix(weight: Tensor) -> Tensor:
    """Return the matrix in the dtype it is decomposed in, checked to be a finite matrix of floats."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise WeightError(f"a matrix of floats is needed, got shape {tuple(weight.shape)} of {weight.dtype}")
    if not torch.isfinite(weight).all():
        raise WeightError(
            f"the matrix of shape {tuple(weight.shape)} holds {int((~torch.isfinite(weight)).sum())} values that are "
            "NaN or inf; the checkpoint is damaged or overflowed its dtype: load it again, or with another dtype"
        )
    weight = weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()


def reference_truncation(weight: Tensor, rank: int, *, niter: int = 2, seed: int = 0) -> Tensor:
    """Return the rank-``rank`` approximation (m, n) as the published code computes it, with a seed.

    The randomised range finder keeps a visibly different subspace where the spectrum decays slowly.

    Args:
        weight: (m, n).
        rank: number of singular values kept.
        niter: power iterations; the published code takes 2, and 20 for RoBERTa and the Decision Transformer.
        seed: seed of the random projection; the caller's random state is untouched.

    Source: arXiv 2312.13558, released code; Halko, Martinsson and Tropp, arXiv 0909.4061.
    """
    weight = as_float_matrix(weight)
    if not 0 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} is not within 0 to {min(weight.shape)}")
    if rank == 0:
        return torch.zeros_like(weight)
    # A seed set here is set on every device.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(weight, q=rank, niter=niter)
    return (U * S) @ V.T
