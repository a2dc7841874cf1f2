"""Time a singular basis from an eigensolver in float32, alone and with one refinement in float64, beside the one in use.

The refinement is one step of Ogita and Aishima (Japan J. Indust. Appl. Math. 35, 2018): from products in float64, the
first-order correction of every pair of vectors whose eigenvalues lie apart, and of their lengths and angles.
Run: python benchmarks/float32_basis.py 1024 1024
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from laserlm.linalg import basis_of


def in_float32(weight: Tensor) -> Tensor:
    """Return the basis (k, k) of a weight (m, k) from a Gram matrix and an eigensolver in float32."""
    basis: Tensor = torch.linalg.eigh(weight.T @ weight)[1].flip(1)
    return basis


def refined(weight: Tensor) -> Tensor:
    """Return the basis (k, k) of a weight (m, k) from an eigensolver in float32 and one step in float64."""
    wide = weight.double()
    gram = wide.T @ wide
    V = torch.linalg.eigh(gram.float())[1].double()
    R = torch.eye(len(gram), dtype=gram.dtype) - V.T @ V
    S = V.T @ (gram @ V)
    values = S.diagonal() / (1 - R.diagonal())
    gaps = values[None, :] - values[:, None]
    off_diagonal = (S - torch.diag(S.diagonal())).norm() / len(gram) ** 0.5
    is_apart = gaps.abs() > 2 * (2 * off_diagonal + 1e-7 * gram.diagonal().max())
    V = V + V @ torch.where(is_apart, (S + values[None, :] * R) / torch.where(gaps == 0, 1, gaps), R / 2)
    basis: Tensor = V[:, values.argsort(descending=True)].to(weight)
    return basis


WAYS: dict[str, Callable[[Tensor], Tensor]] = {"float64": basis_of, "float32": in_float32, "float32, refined": refined}


def matrices(m: int, k: int) -> dict[str, Tensor]:
    """Return a Gaussian matrix (m, k), one whose singular values fall to 1e-4, and one with a cluster of them."""
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0]
    cluster = 1 + 1e-4 * torch.rand(k, generator=generator, dtype=torch.float64)
    spectra = {"decay to 1e-4": torch.logspace(0, -4, k, dtype=torch.float64), "cluster": cluster}
    drawn = {"Gaussian": torch.randn(m, k, generator=generator)}
    return drawn | {name: ((U * S) @ V.T).float() for name, S in spectra.items()}


def errors(weight: Tensor, basis: Tensor) -> tuple[float, float, float]:
    """Return how much worse the worst truncation is than the best of its rank, the error of values, and of angles."""
    W, B = weight.double(), basis.double()
    S = torch.linalg.svdvals(W)
    k = len(S)
    excess = 0.0
    for rank in (1, k // 100 + 1, k // 10, k // 2, k * 9 // 10):
        error = (W - (W @ B[:, :rank]) @ B[:, :rank].T).norm()
        excess = max(excess, float(error / S[rank:].norm()) - 1)
    values = float(((W @ B).norm(dim=0) - S).abs().max() / S[0])
    return excess, values, float((B.T @ B - torch.eye(k, dtype=B.dtype)).abs().max())


def main() -> None:
    """Print the seconds of each way, and its errors for small matrices."""
    k, m = int(sys.argv[1]), int(sys.argv[2])
    weight = torch.randn(m, k, generator=torch.Generator().manual_seed(3))
    for name, way in WAYS.items():
        seconds = []
        for _ in range(3 if k <= 1024 else 1):
            start = time.perf_counter()
            way(weight)
            seconds.append(time.perf_counter() - start)
        print(f"{m} x {k}, {name}: {statistics.median(seconds):.2f} s")
    for label, matrix in matrices(m, k).items() if k <= 1024 else ():
        for name, way in WAYS.items():
            excess, values, angles = errors(matrix, way(matrix))
            print(f"{label}, {name}: truncation worse by {excess:.1e}, values {values:.1e}, orthonormality {angles:.1e}")


if __name__ == "__main__":
    main()
