"""Spectral metrics of every matrix of a model, and which of them tell where a reduction helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from laserlm.errors import AnalysisError, WeightError
from laserlm.linalg.decomposition import Decomposition, decompose
from laserlm.linalg.ranks import rank_at
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

__all__ = ["Correlation", "MatrixMetrics", "Source", "best_of_each", "correlations", "gains", "matrix_metrics"]

SHARES = ("0.01", "0.05", "0.1", "0.25", "0.5")
FEWEST = 5
RESAMPLES = 2000


class Source(Protocol):
    """Something that has matrices and reads them one at a time."""

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All of them."""

    def read(self, matrix: Matrix) -> Tensor:
        """Return one as an (out, in) tensor."""


@dataclass(frozen=True)
class MatrixMetrics:
    """What the singular values of a matrix (m, n) say; k = min(m, n).

    Args:
        matrix: its id.
        stack: its stack of blocks, empty where the model has one.
        layer: 0-based block.
        name: its name within the block.
        type: its type, such as ``fc_in``.
        shape: (m, n).
        effective_rank: exponential of the entropy of the singular values.
        stable_rank: squared Frobenius norm over the squared largest singular value.
        numerical_rank: singular values that float32 tells from zero.
        condition: largest over smallest singular value.
        norm: Frobenius norm.
        noise: standard deviation of entries of noise with this median singular value.
        edge: Marchenko-Pastur edge of that noise.
        rank_beyond: singular values beyond what noise explains.
        gavish_donoho: rank that the optimal hard threshold keeps.
        signal_to_noise: energy beyond the edge over the energy below it.
        nuclear: shares of the sum of the singular values, by kept fraction rho.
        energy: shares of the sum of their squares, by rho.
        shared: rank of the singular vectors of this and the previous layer side by side over what it would be if they
            shared nothing, by threshold; empty in the first layer.
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

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values; what is infinite is None."""
        values = asdict(self) | {"shape": list(self.shape)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


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
        source: a stored checkpoint, or anything else that reads its matrices.
        types: types or names of matrices to look at; empty takes all but fused ones whose parts are looked at.
        thresholds: magnitudes below which an entry of a singular vector counts as zero in ``shared``.
        side: singular vectors compared between layers: ``right`` (of the inputs) or ``left`` (of the outputs).
        on_skip: called with a matrix that cannot be read or decomposed, and why; None lets that be an error.

    Raises:
        AnalysisError: if there is no matrix of these types.
        WeightError: if a matrix cannot be read or decomposed, and ``on_skip`` is not given.
    """
    if side not in ("left", "right"):
        raise AnalysisError(f"no side {side!r} of a matrix; there are left (outputs) and right (inputs)")
    wanted = [m for m in source.matrices if (m.type in types or m.name in types if types else not m.parts)]
    if not wanted:
        known = ", ".join(dict.fromkeys(m.type for m in source.matrices))
        raise AnalysisError(f"no matrix of the types {', '.join(types)}; this model has {known}")
    for key in dict.fromkeys((m.stack, m.name) for m in wanted):
        previous: tuple[int, Tensor] | None = None
        for m in sorted((m for m in wanted if (m.stack, m.name) == key), key=lambda m: m.layer):
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
    """Return for each matrix the largest fall of the loss that a search measured for a reduction of it alone, in nats.

    All are over the first examples that every trial has.

    Args:
        base: the unchanged model on the validation split.
        trials: by canonical text.
    """
    n = min([base.n, *(t.n for t in trials.values())])
    before = math.fsum(s.loss for s in base.scores[:n]) / n
    return best_of_each({text: before - math.fsum(s.loss for s in trial.scores[:n]) / n for text, trial in trials.items()})


def best_of_each(values: Mapping[str, float]) -> dict[str, float]:
    """Return for each matrix the largest value among the reductions of it alone, by the matrix's id."""
    found: dict[str, float] = {}
    for text, value in values.items():
        reductions = Intervention.parse(text).reductions
        if len(reductions) == 1:
            (r,) = reductions
            name = f"{r.stack}.{r.layers}.{r.matrix}" if r.stack else f"{r.layers}.{r.matrix}"
            found[name] = max(value, found.get(name, -math.inf))
    return found


@dataclass(frozen=True)
class Correlation:
    """How a metric goes with the measured gain, over matrices.

    Args:
        metric: its name.
        rho: Spearman's rank correlation.
        low: lower end of its 95 % bootstrap interval over matrices.
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
        metrics: of all matrices.
        gain: by the matrix's id, as ``gains`` returns them.
        screen: the gain that a first-order screen expected, by the matrix's id.
        seed: of the bootstrap.

    Raises:
        AnalysisError: if fewer than five matrices have a gain.
    """
    both = [m for m in metrics if m.matrix in gain]
    if len(both) < FEWEST:
        raise AnalysisError(f"{len(both)} matrices have both metrics and a measured gain; a correlation needs {FEWEST}")
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
    draws = np.random.default_rng(seed).integers(len(both), size=(RESAMPLES, len(both)))
    found = []
    for name, column in columns.items():
        x = np.array(column)
        finite = np.isfinite(x)
        if finite.sum() < FEWEST or len(set(x[finite])) < 2:
            continue
        rho = float(stats.spearmanr(x[finite], y[finite]).statistic)
        again = [_spearman(x[d][finite[d]], y[d][finite[d]]) for d in draws]
        low, high = np.nanquantile(again, [0.025, 0.975])
        found.append(Correlation(name, rho, float(low), float(high), int(finite.sum())))
    return sorted(found, key=lambda c: -abs(c.rho))


def _spearman(x: Any, y: Any) -> float:
    """Return the rank correlation, NaN where one side is constant."""
    a, b = stats.rankdata(x), stats.rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan


def _metrics(m: Matrix, S: Tensor, shared: dict[str, float]) -> MatrixMetrics:
    S = S.double().cpu().sort(descending=True).values
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
    """Return singular vectors as columns, (n, k) of the inputs or (m, k) of the outputs."""
    factor = d.right.T if side == "right" else d.left
    vectors: Tensor = factor / torch.linalg.vector_norm(factor, dim=0).clamp_min(1e-30)
    return vectors
