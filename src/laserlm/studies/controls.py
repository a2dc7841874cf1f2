"""Changes of the same matrices and of the same size: does low rank help because it is low rank?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from laserlm.edit.apply import Edit, default_cache, label_as_edited, replaced_weights, resolve, truncation
from laserlm.errors import AnalysisError
from laserlm.linalg.decomposition import as_float_matrix
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import read_matrix
from laserlm.scoring.evaluate import compare
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import Interval, paired_mean
from laserlm.studies.scores import CachedScorer

__all__ = ["CONTROLS", "Control", "changed", "controls", "key_of"]


@dataclass(frozen=True)
class Control:
    """One way of changing the matrices, against the unchanged model.

    Args:
        control: its name.
        draws: number of times that it was drawn; 1 for what is not random.
        n: number of examples.
        size: Frobenius norm of the change over that of the matrices, mean over the draws.
        accuracy: mean over the draws.
        gain: mean over the draws of the gain in accuracy over the unchanged model.
        interval: its 95 % interval: Tango's of each draw, the mean of their ends.
        least: gain of the worst draw.
        most: gain of the best draw.
        behind: accuracy of the reduction minus that of the control, mean over the draws.
        behind_interval: its 95 % interval, likewise.
        loss: mean log-loss in nats per answer token, over the draws.
        loss_change: its change.
        loss_interval: 95 % Student interval over the examples of the change, each the mean over the draws.
    """

    control: str
    draws: int
    n: int
    size: float
    accuracy: float
    gain: float
    interval: Interval
    least: float
    most: float
    behind: float
    behind_interval: Interval
    loss: float
    loss_change: float
    loss_interval: Interval

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        ends = {name: list(getattr(self, name)) for name in ("interval", "behind_interval", "loss_interval")}
        return asdict(self) | {name: None if math.isinf(both[0]) else both for name, both in ends.items()}


Make = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]
"""Given W (m, n), its truncation, the rank and a source of randomness, returns what takes W's place."""


def _pruned(W: Tensor, size: float, order: Tensor) -> Tensor:
    """Return W without the first entries of an order, as many as have together this Frobenius norm."""
    flat = W.flatten().clone()
    energy = flat[order].cpu().double().square().cumsum(0)
    gone = int(torch.searchsorted(energy, torch.tensor(size**2, dtype=energy.dtype)))
    flat[order[:gone]] = 0
    pruned: Tensor = flat.view_as(W)
    return pruned


def _random(W: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randperm(W.numel(), generator=generator).to(W.device)


def _noise(W: Tensor, size: float, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(W.shape, generator=generator).to(W)
    noisy: Tensor = W + drawn * (size / drawn.norm())
    return noisy


def _projected(W: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return W projected on random directions of its shorter side, as many as the rank."""
    m, n = W.shape
    Q = torch.linalg.qr(torch.randn(min(m, n), rank, generator=generator, dtype=torch.float64))[0].to(W)
    projected: Tensor = (W @ Q) @ Q.T if n <= m else Q @ (Q.T @ W)
    return projected


def _size(W: Tensor, kept: Tensor) -> float:
    return float((W - kept).norm())


LOW_RANK = "low rank"
CONTROLS: dict[str, tuple[bool, Make]] = {
    LOW_RANK: (False, lambda W, kept, rank, g: kept),
    "removed part alone": (False, lambda W, kept, rank, g: W - kept),
    "smallest entries zero": (False, lambda W, kept, rank, g: _pruned(W, _size(W, kept), W.abs().flatten().argsort())),
    "random entries zero": (True, lambda W, kept, rank, g: _pruned(W, _size(W, kept), _random(W, g))),
    "random subspace": (True, lambda W, kept, rank, g: _projected(W, rank, g)),
    "Gaussian noise": (True, lambda W, kept, rank, g: _noise(W, _size(W, kept), g)),
    "all zero": (False, lambda W, kept, rank, g: torch.zeros_like(W)),
}
"""Whether each is random, and how it is made. Zeroed entries and noise are of the Frobenius norm of what the reduction
removes; a random subspace is of the reduction's rank, and so its change is larger.

Source: arXiv 2312.13558, appendix; the released code calls the zeroing of the smallest entries dropout.
"""


@contextmanager
def changed(
    lm: LanguageModel, intervention: str, control: str, draw: int, sizes: list[float] | None = None, *, seed: int = 0
) -> Iterator[None]:
    """Let the matrices of an intervention be changed by a control until the end of the block.

    Args:
        lm: the unchanged model.
        intervention: text of the reduction whose matrices, ranks and size of change are taken.
        control: a name of ``CONTROLS``.
        draw: seed of what is random in the control.
        sizes: where the relative Frobenius norm of the whole change is appended.
        seed: of ``:reference`` decompositions.

    Raises:
        AnalysisError: if the reduction changes nothing.
    """
    edits = [e for e in resolve(lm.matrices, intervention) if not e.is_identity]
    if not edits:
        raise AnalysisError(f"{intervention or 'an empty reduction'} changes nothing; there is no change of its size")
    cache = default_cache(lm.cache)
    generator = torch.Generator().manual_seed(draw)
    squares = [0.0, 0.0]

    def make(edit: Edit) -> Tensor:
        W = as_float_matrix(read_matrix(lm.model, edit.matrix))
        kept = truncation(lm, edit, cache, seed).to(W)
        rank = min(edit.rank * edit.reduction.split, min(W.shape))
        new = CONTROLS[control][1](W, kept, rank, generator)
        squares[0] += _size(W, new) ** 2
        squares[1] += float(W.norm()) ** 2
        return new

    with torch.no_grad(), replaced_weights(lm, edits, make), label_as_edited(lm, key_of(control, draw, intervention)):
        if sizes is not None:
            sizes.append(math.sqrt(squares[0] / max(squares[1], 1e-300)))
        yield


def key_of(control: str, draw: int, intervention: str) -> str:
    """Return the name under which a control's scores are kept."""
    return f"control: {control}, draw {draw}, {intervention}"


def controls(
    lm: LanguageModel,
    intervention: str,
    score: CachedScorer,
    *,
    draws: int = 3,
    seed: int = 0,
    on_model: Callable[[int, int, str], None] | None = None,
) -> list[Control]:
    """Score the reduction beside every control of the same matrices and size, each random one several times.

    Args:
        lm: the unchanged model.
        intervention: text of the reduction.
        score: see ``laserlm.studies.scored``.
        draws: number of times that what is random is drawn.
        seed: of ``:reference`` decompositions.
        on_model: called with the number of models done, their total and the name of the next.

    Raises:
        AnalysisError: if the reduction changes nothing.
    """
    wanted = [(name, draw) for name, (random, _) in CONTROLS.items() for draw in range(draws if random else 1)]
    evaluations: dict[str, list[Evaluation]] = {}
    sizes: dict[str, list[float]] = {}
    base = score("")
    for done, (name, draw) in enumerate(wanted):
        if on_model is not None:
            on_model(done, len(wanted), name)
        with changed(lm, intervention, name, draw, sizes.setdefault(name, []), seed=seed):
            pass  # for its size alone, which no store keeps
        found = (
            score(intervention)
            if name == LOW_RANK
            else score(key_of(name, draw, intervention), changed(lm, intervention, name, draw, seed=seed), at=intervention)
        )
        evaluations.setdefault(name, []).append(found)
    reduced = evaluations[LOW_RANK][0]
    return [_control(name, base, reduced, found, sizes[name]) for name, found in evaluations.items()]


def _control(name: str, base: Evaluation, reduced: Evaluation, found: Sequence[Evaluation], sizes: Sequence[float]) -> Control:
    against = [compare(base, e) for e in found]
    beside = [compare(e, reduced) for e in found]
    changes = [sum(e.scores[i].loss for e in found) / len(found) - b.loss for i, b in enumerate(base.scores)]
    return Control(
        control=name,
        draws=len(found),
        n=base.n,
        size=_mean(sizes),
        accuracy=_mean([e.accuracy for e in found]),
        gain=_mean([c.gain for c in against]),
        interval=_mean_interval([c.interval for c in against]),
        least=min(c.gain for c in against),
        most=max(c.gain for c in against),
        behind=_mean([c.gain for c in beside]),
        behind_interval=_mean_interval([c.interval for c in beside]),
        loss=_mean([e.loss for e in found]),
        loss_change=_mean(changes),
        loss_interval=paired_mean(changes),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_interval(intervals: Sequence[Interval]) -> Interval:
    """Return the mean of the ends: wider than an interval of the mean over draws, and it does not collapse on few examples."""
    return Interval(_mean([i.low for i in intervals]), _mean([i.high for i in intervals]))
