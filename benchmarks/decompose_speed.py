"""Time the decomposition beside ``torch.linalg.svd``, and hold the errors of both against one in float64.

Both run in turns in one process on the same matrices: weights of the bundled model, and Gaussian ones with a decaying
spectrum at the other shapes. The error is that of the rank-k/4 approximation, relative to the matrix, in Frobenius norm.
Run: python benchmarks/decompose_speed.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import laserlm as laser
from laserlm.linalg import decompose

SHAPES = [(576, 1536), (768, 3072), (1024, 4096), (2048, 2048)]


def matrix(m: int, n: int) -> Tensor:
    """Return a matrix (m, n) whose singular values fall by a factor of a hundred."""
    generator = torch.Generator().manual_seed(m)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=generator))[0]
    made: Tensor = (U * torch.logspace(0, -2, k)) @ V.T
    return made


def truncated(W: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    kept: Tensor = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return kept


def main() -> None:
    lm = laser.load("bundled")
    weight = lm.model.get_parameter("model.layers.15.mlp.down_proj.weight").detach().float()
    ways: dict[str, Callable[[Tensor], object]] = {
        "ours": decompose,
        "svd": torch.linalg.svd,
        "svd, thin": lambda W: torch.linalg.svd(W, full_matrices=False),
        "svd, thin, float64": lambda W: torch.linalg.svd(W.double(), full_matrices=False),
    }
    print(f"{'shape':>12}" + "".join(f"{name + ', ms':>24}" for name in ways) + f"{'error, ours':>13}{'error, svd thin':>17}")
    for m, n in SHAPES:
        W = weight if tuple(weight.shape) == (m, n) else matrix(m, n)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(5):
            for name, way in ways.items():
                start = time.perf_counter()
                way(W)
                times[name].append(1000 * (time.perf_counter() - start))
        rank = min(m, n) // 4
        exact = truncated(W.double(), rank)
        errors = [
            float((found.double() - exact).norm() / W.norm()) for found in (decompose(W).truncate(rank), truncated(W, rank))
        ]
        medians = {name: statistics.median(t) for name, t in times.items()}
        ratios = "".join(f"{v:10.0f} ({v / medians['ours']:9.1f} x)" for v in medians.values())
        print(f"{f'{m} x {n}':>12}{ratios}{errors[0]:13.1e}{errors[1]:17.1e}", flush=True)


if __name__ == "__main__":
    main()
