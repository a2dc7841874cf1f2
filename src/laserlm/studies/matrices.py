"""Spectral metrics of every matrix of a model, and their correlation with the gain of a reduction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from laserlm.errors import AnalysisError, WeightError
from laserlm.linalg.decomposition import Decomposition, decompose, rank_at
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
from laserlm.models.matrices import Matrix
from laserlm.reductions import Intervention, Size
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import bootstrap, dense_ranks, percentile_interval, spearman

SHARES = ("0.01", "0.05", "0.1", "0.25", "0.5")
MIN_MATRICES = 5
RESAMPLES = 2000


class Source(Protocol):
    """A model or checkpoint that reads its matrices one at a time."""

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All matrices."""

    def read(self, matrix: Matrix) -> Tensor:
        """Return a matrix as an (out, in) tensor."""


@dataclass(frozen=True)
class MatrixMetrics:
    """Spectral metrics of a matrix (m, n).

    Args:
        matrix: id of the matrix.
        stack: its stack of blocks, empty if the model has one stack.
        layer: 0-based block.
        name: name of the matrix within the block.
        type: type, such as ``fc_in``.
        shape: (m, n).
        effective_rank: exponential of the entropy of the singular values.
        stable_rank: squared Frobenius norm over the squared largest singular value.
        numerical_rank: number of singular values that are not zero in float32.
        condition: largest over smallest singular value.
        norm: Frobenius norm.
        noise: standard deviation of the entries of a noise matrix with the same median singular value.
        edge: Marchenko-Pastur edge of that noise.
        rank_beyond: number of singular values beyond the edge.
        gavish_donoho: rank after the optimal hard threshold.
        signal_to_noise: energy beyond the edge over the energy below it.
        nuclear: shares of the sum of the singular values, by kept fraction rho.
        energy: shares of the sum of their squares, by rho.
        shared: by threshold, the rank of the singular vectors of this and the previous layer together, over the rank if
            they shared nothing. Empty in the first layer.
    """

    matrix: str
    stack: str
    layer: int
    name: str
    type: str
    shape: tuple[int, int]
    effective_rank: float
    stable_rank: float
    numerical_rank: int
    condition: float
    norm: float
    noise: float
    edge: float
    rank_beyond: int
    gavish_donoho: int
    signal_to_noise: float
    nuclear: dict[str, float]
    energy: dict[str, float]
    shared: dict[str, float]


def matrix_metrics(
    source: Source,
    *,
    types: Sequence[str] = (),
    thresholds: Sequence[float] = (0.06,),
    side: Literal["left", "right"] = "right",
    on_skip: Callable[[Matrix, str], None] | None = None,
) -> Iterator[MatrixMetrics]:
    """Yield the metrics of every matrix, one type after another; one is decomposed at a time.

    Args:
        source: a checkpoint or a model.
        types: types or names of matrices. Empty takes all; of a fused matrix it takes the parts.
        thresholds: magnitudes below which an entry of a singular vector counts as zero in ``shared``.
        side: singular vectors compared between layers: ``right`` (of the inputs) or ``left`` (of the outputs).
        on_skip: called with a matrix that cannot be read or decomposed, and the reason. None raises the error.

    Raises:
        AnalysisError: if there is no matrix of these types.
        WeightError: if a matrix cannot be read or decomposed, and ``on_skip`` is None.
    """
    if side not in ("left", "right"):
        raise AnalysisError(f"no side {side!r} of a matrix; there are left (outputs) and right (inputs)")
    matrices = [m for m in source.matrices if (m.type in types or m.name in types if types else not m.parts)]
    if not matrices:
        known = ", ".join(dict.fromkeys(m.type for m in source.matrices))
        raise AnalysisError(f"no matrix of the types {', '.join(types)}; this model has {known}")
    for key in dict.fromkeys((m.stack, m.name) for m in matrices):
        previous: tuple[int, Tensor] | None = None
        for m in sorted((m for m in matrices if (m.stack, m.name) == key), key=lambda m: m.layer):
            try:
                d = decompose(source.read(m))
            except WeightError as error:
                if on_skip is None:
                    raise
                on_skip(m, str(error))
                continue
            vectors, S = _vectors(d, side), d.S
            del d
            follows = previous is not None and previous[0] == m.layer - 1 and previous[1].shape == vectors.shape
            shared = {f"{t:g}": subspace_share(previous[1], vectors, t) for t in thresholds} if follows and previous else {}
            previous = (m.layer, vectors)
            yield _metrics(m, S, shared)


def gains(base: Evaluation, trials: Mapping[str, Evaluation]) -> dict[str, float]:
    """Return the largest fall of the loss, in nats, that a search measured for a reduction of each matrix alone.

    All falls are over the first examples that every trial has.

    Args:
        base: the unchanged model on the validation split.
        trials: by canonical text.
    """
    n = min([base.n, *(t.n for t in trials.values())])
    before = math.fsum(s.loss for s in base.scores[:n]) / n
    return best_of_each({text: before - math.fsum(s.loss for s in trial.scores[:n]) / n for text, trial in trials.items()})


def best_of_each(values: Mapping[str, float]) -> dict[str, float]:
    """Return the largest value of the reductions of each matrix alone, by the id of the matrix."""
    rows: dict[str, float] = {}
    for text, value in values.items():
        reductions = Intervention.parse(text).reductions
        if len(reductions) == 1:
            (r,) = reductions
            name = f"{r.stack}.{r.layers}.{r.matrix}" if r.stack else f"{r.layers}.{r.matrix}"
            rows[name] = max(value, rows.get(name, -math.inf))
    return rows


@dataclass(frozen=True)
class Correlation:
    """Correlation of a metric with the measured gain over matrices.

    Args:
        metric: name of the metric.
        rho: Spearman's rank correlation.
        low: lower end of the 95 % bootstrap interval over matrices.
        high: upper end.
        n: number of matrices.
    """

    metric: str
    rho: float
    low: float
    high: float
    n: int


def correlations(
    metrics: Sequence[MatrixMetrics], gain: Mapping[str, float], *, screen: Mapping[str, float] | None = None, seed: int = 0
) -> list[Correlation]:
    """Return the rank correlation of every metric with the gain, the strongest first.

    Args:
        metrics: metrics of all matrices.
        gain: gain by the id of the matrix, as ``gains`` returns it.
        screen: gain that a first-order screen expected, by the id of the matrix.
        seed: of the bootstrap.

    Raises:
        AnalysisError: if fewer than five matrices have a gain.
    """
    both = [m for m in metrics if m.matrix in gain]
    if len(both) < MIN_MATRICES:
        raise AnalysisError(f"{len(both)} matrices have both metrics and a measured gain; a correlation needs {MIN_MATRICES}")
    y = np.array([gain[m.matrix] for m in both])
    columns: dict[str, list[float]] = {
        f.name: [float(getattr(m, f.name)) for m in both] for f in fields(MatrixMetrics) if f.type in ("float", "int")
    }
    columns |= {f"nuclear@{rho}": [m.nuclear[rho] for m in both] for rho in SHARES}
    columns |= {f"energy@{rho}": [m.energy[rho] for m in both] for rho in SHARES}
    for t in dict.fromkeys(t for m in both for t in m.shared):
        columns[f"shared@{t}"] = [m.shared.get(t, math.nan) for m in both]
    if screen:
        columns["screen"] = [screen.get(m.matrix, math.nan) for m in both]
    weights = [np.bincount(drawn[0], minlength=len(both)) for drawn in bootstrap(len(both), RESAMPLES, seed)]
    rows = []
    for name, column in columns.items():
        x = np.array(column)
        finite = np.isfinite(x)
        if finite.sum() < MIN_MATRICES or len(set(x[finite])) < 2:
            continue
        ranks = dense_ranks(x[finite]), dense_ranks(y[finite])
        interval = percentile_interval([spearman(*ranks, w[finite]) for w in weights])
        rows.append(Correlation(name, spearman(*ranks), *interval, int(finite.sum())))
    return sorted(rows, key=lambda c: -abs(c.rho))


def _metrics(m: Matrix, S: Tensor, shared: dict[str, float]) -> MatrixMetrics:
    S = S.cpu().double().sort(descending=True).values
    beyond = rank_beyond(S, m.shape)
    ranks = {rho: rank_at(size.rho, m.max_rank) for rho in SHARES if (size := Size.parse(rho)).rho is not None}
    s = noise(S, m.shape)
    return MatrixMetrics(
        matrix=m.id,
        stack=m.stack,
        layer=m.layer,
        name=m.name,
        type=m.type,
        shape=m.shape,
        effective_rank=effective_rank(S),
        stable_rank=stable_rank(S),
        numerical_rank=numerical_rank(S, m.shape),
        condition=condition(S),
        norm=float(S.square().sum().sqrt()),
        noise=s,
        edge=edge(s, m.shape),
        rank_beyond=beyond,
        gavish_donoho=gavish_donoho(S, m.shape),
        signal_to_noise=signal_to_noise(S, beyond),
        nuclear={rho: nuclear_share(S, rank) for rho, rank in ranks.items()},
        energy={rho: energy_share(S, rank) for rho, rank in ranks.items()},
        shared=shared,
    )


def _vectors(d: Decomposition, side: str) -> Tensor:
    """Return the singular vectors as columns: (n, k) of the inputs or (m, k) of the outputs."""
    factor = d.right.T if side == "right" else d.left
    vectors: Tensor = factor / torch.linalg.vector_norm(factor, dim=0).clamp_min(1e-30)
    return vectors
