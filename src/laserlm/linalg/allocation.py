"""Allocate ranks to many matrices under one budget of parameters."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from laserlm.linalg.decomposition import as_float64
from laserlm.linalg.pivots import parameters, rank_within


@dataclass(frozen=True)
class Spectrum:
    """The loss of dropping each component of a matrix (m, n).

    Args:
        shape: (m, n).
        losses: (k,) non-negative loss of each component, largest singular value first.
        most: largest share of the dense parameters that pivots and coefficients may take.
        step: ranks are multiples of it.
    """

    shape: tuple[int, int]
    losses: Tensor
    most: float = 1.0
    step: int = 1

    @property
    def dense_parameters(self) -> int:
        """Number of parameters of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def max_rank(self) -> int:
        """Largest rank at which pivots and coefficients take fewer parameters than the dense matrix, and the share at most."""
        return self.rank_within(int(self.most * self.dense_parameters))

    def rank_within(self, budget: int) -> int:
        """Return the largest possible rank whose pivots and coefficients take at most ``budget`` parameters."""
        return min(min(self.shape) - 1, len(self.losses), rank_within(self.shape, budget)) // self.step * self.step


def uniform(shapes: Sequence[tuple[int, int]], ratio: float) -> list[int | None]:
    """Return the rank at which factors take this share of each matrix's parameters; None keeps the matrix dense."""
    return [None if ratio >= 1 else rank_within((m, n), int(ratio * m * n)) for m, n in shapes]


def allocate(spectra: Sequence[Spectrum], budget: int) -> list[int | None]:
    """Return ranks with a small total loss for a budget of parameters; None keeps a matrix dense, without loss.

    Each matrix may have any rank at which its factors are smaller than the dense matrix, or stay dense. Its options form a
    lower convex hull of (parameters, loss). Steps along all hulls are taken in order of loss reduction per parameter until
    the budget is spent. A step that does not fit is taken in part. This is the optimum of the relaxed knapsack problem,
    rounded down.

    Args:
        spectra: losses of the matrices.
        budget: number of parameters of all matrices together.
    """
    positions = [0] * len(spectra)  # index on each hull
    hulls = [_hull(s) for s in spectra]
    remaining = budget
    steps = [(-_gain(h, 0), j) for j, h in enumerate(hulls) if len(h) > 1]
    heapq.heapify(steps)
    while steps:
        _, j = heapq.heappop(steps)
        hull, i = hulls[j], positions[j]
        price = hull[i + 1][0] - hull[i][0]
        if price > remaining:
            # Take the step in part: add as many components as fit.
            if hull[i][2] is not None:
                spectrum, spent = spectra[j], hull[i][0]
                rank = min(spectrum.rank_within(spent + remaining), spectrum.max_rank)
                hull[i] = (parameters(spectrum.shape, rank), hull[i][1], rank)
                remaining -= hull[i][0] - spent
            continue
        remaining -= price
        positions[j] = i + 1
        if i + 2 < len(hull):
            heapq.heappush(steps, (-_gain(hull, i + 1), j))
    return [hull[i][2] for hull, i in zip(hulls, positions, strict=True)]


Point = tuple[int, float, int | None]
"""Parameters, loss and rank (None for the dense matrix)."""


def _gain(hull: Sequence[Point], i: int) -> float:
    """Return the loss reduction per parameter of the step from point i to point i + 1."""
    (price, loss, _), (next_price, next_loss, _) = hull[i], hull[i + 1]
    return (loss - next_loss) / (next_price - price)


def _hull(spectrum: Spectrum) -> list[Point]:
    """Return the lower convex hull of a matrix's options, from rank 0 to the dense matrix."""
    tail_losses = as_float64(spectrum.losses).flip(0).cumsum(0).flip(0).tolist()  # loss of each rank
    ranks = range(0, spectrum.max_rank + 1, spectrum.step)
    points: list[Point] = [(parameters(spectrum.shape, r), tail_losses[r] if r < len(tail_losses) else 0.0, r) for r in ranks]
    points.append((spectrum.dense_parameters, 0.0, None))
    hull: list[Point] = []
    for p in points:
        while len(hull) > 1 and _is_above_line(hull[-2], hull[-1], p):
            hull.pop()
        hull.append(p)
    return hull


def _is_above_line(a: Point, b: Point, c: Point) -> bool:
    """Return whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
