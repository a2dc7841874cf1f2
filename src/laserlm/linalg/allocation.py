"""Ranks for many matrices under one budget of parameters."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Spectrum", "allocate", "uniform"]


@dataclass(frozen=True)
class Spectrum:
    """What a matrix (m, n) loses with each component of its decomposition.

    Args:
        shape: (m, n).
        losses: (k,), not negative: what dropping each component costs, the largest singular value first.
    """

    shape: tuple[int, int]
    losses: Tensor

    @property
    def whole(self) -> int:
        """Parameters of the matrix as it is."""
        return self.shape[0] * self.shape[1]

    @property
    def each(self) -> int:
        """Parameters of one component."""
        return sum(self.shape)

    @property
    def most(self) -> int:
        """Largest rank at which two factors take fewer parameters than the matrix."""
        return min((self.whole - 1) // self.each, len(self.losses))


def uniform(shapes: Sequence[tuple[int, int]], ratio: float) -> list[int | None]:
    """Return for every matrix the rank at which two factors take this share of its parameters; None keeps it whole."""
    return [None if ratio >= 1 else int(ratio * m * n / (m + n)) for m, n in shapes]


def allocate(spectra: Sequence[Spectrum], budget: int) -> list[int | None]:
    """Return ranks that lose little for a budget of parameters; None keeps a matrix whole, which loses nothing.

    A matrix is a choice among the ranks at which factors are smaller than it, and itself. On the lower convex hull of
    (parameters, loss) the steps are taken by loss per parameter, over all matrices alike, while the budget lasts; the
    last step that does not fit is taken in part. That is the optimum of the relaxed knapsack, rounded down.

    Args:
        spectra: of the matrices.
        budget: parameters for all of them together.
    """
    chosen = [0] * len(spectra)  # index on each hull
    hulls = [_hull(s) for s in spectra]
    left = budget
    steps = [(-_gain(h, 0), j) for j, h in enumerate(hulls) if len(h) > 1]
    heapq.heapify(steps)
    while steps:
        _, j = heapq.heappop(steps)
        hull, at = hulls[j], chosen[j]
        price = hull[at + 1][0] - hull[at][0]
        if price > left:
            # In part: as many components more as still fit.
            rank = hull[at][2]
            if rank is not None:
                more = min(left // spectra[j].each, spectra[j].most - rank)
                left -= more * spectra[j].each
                hull[at] = (hull[at][0] + more * spectra[j].each, hull[at][1], rank + more)
            continue
        left -= price
        chosen[j] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_gain(hull, at + 1), j))
    return [hull[at][2] for hull, at in zip(hulls, chosen, strict=True)]


Point = tuple[int, float, int | None]
"""Parameters, loss and rank (None for the matrix whole)."""


def _gain(hull: Sequence[Point], at: int) -> float:
    (price, loss, _), (next_price, next_loss, _) = hull[at], hull[at + 1]
    return (loss - next_loss) / (next_price - price)


def _hull(spectrum: Spectrum) -> list[Point]:
    """Return the lower convex hull of a matrix's choices, from rank 0 to the whole matrix."""
    dropped = spectrum.losses.double().flip(0).cumsum(0).flip(0).tolist()  # loss when the components from here on go
    points: list[Point] = [(r * spectrum.each, dropped[r] if r < len(dropped) else 0.0, r) for r in range(spectrum.most + 1)]
    points.append((spectrum.whole, 0.0, None))
    hull: list[Point] = []
    for p in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], p):
            hull.pop()
        hull.append(p)
    return hull


def _above(a: Point, b: Point, c: Point) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
