"""Changes of the same matrices and of the same size: does low rank help because it is low rank?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from laserlm.analysis.scorebook import Scored
from laserlm.editing.applied import Edit, kept_under, resolve, truncation, written
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import read
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import Interval, paired_mean

__all__ = ["CONTROLS", "Control", "changed", "controls"]


@dataclass(frozen=True)
class Control:
    """One way of changing the matrices, against the unchanged model.

    Args:
        control: its name.
        seeds: number of times that it was drawn; 1 for what is not random.
        n: number of examples.
        size: Frobenius norm of the change over that of the matrices, mean over the seeds.
        accuracy: mean over the seeds.
        gain: mean over examples and seeds of the change of correctness.
        interval: 95 % Student interval of the gain over the examples, each the mean over the seeds.
        least: gain of the worst seed.
        most: gain of the best seed.
        loss: mean log-loss in nats per answer token, over the seeds.
        loss_change: its change.
        loss_interval: 95 % Student interval over the examples of the change.
    """

    control: str
    seeds: int
    n: int
    size: float
    accuracy: float
    gain: float
    interval: Interval
    least: float
    most: float
    loss: float
    loss_change: float
    loss_interval: Interval

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        ends = {name: list(getattr(self, name)) for name in ("interval", "loss_interval")}
        return asdict(self) | {name: None if math.isinf(both[0]) else both for name, both in ends.items()}


Make = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]
"""Given W (m, n), its truncation, the rank and a source of randomness, returns what takes W's place."""


def _pruned(W: Tensor, size: float, order: Tensor) -> Tensor:
    """Return W without the first entries of an order, as many as have together this Frobenius norm."""
    flat = W.flatten().clone()
    energy = flat[order].double().square().cumsum(0)
    gone = int(torch.searchsorted(energy, torch.tensor(size**2, dtype=energy.dtype, device=energy.device)))
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
    Q = torch.linalg.qr(torch.randn(W.shape[1], rank, generator=generator, dtype=torch.float64))[0].to(W)  # (n, r)
    projected: Tensor = (W @ Q) @ Q.T
    return projected


def _size(W: Tensor, kept: Tensor) -> float:
    return float((W - kept).double().norm())


CONTROLS: dict[str, tuple[bool, Make]] = {
    "low rank": (False, lambda W, kept, rank, g: kept),
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
def changed(lm: LanguageModel, intervention: str, control: str, seed: int, sizes: list[float] | None = None) -> Iterator[None]:
    """Let the matrices of an intervention be changed by a control until the end of the block.

    Args:
        lm: the unchanged model.
        intervention: text of the reduction whose matrices, ranks and size of change are taken.
        control: a name of ``CONTROLS``.
        seed: of what is random.
        sizes: where the relative Frobenius norm of the whole change is appended.
    """
    edits = [e for e in resolve(lm.matrices, intervention) if not e.is_identity]
    cache = kept_under(lm.cache)
    generator = torch.Generator().manual_seed(seed)
    squares = [0.0, 0.0]

    def make(edit: Edit) -> Tensor:
        W = read(lm.model, edit.matrix).float()
        new = CONTROLS[control][1](W, truncation(lm, edit, cache).to(W), edit.rank, generator)
        squares[0] += _size(W, new) ** 2
        squares[1] += float(W.double().norm()) ** 2
        return new

    with torch.no_grad(), written(lm, edits, make):
        if sizes is not None:
            sizes.append(math.sqrt(squares[0] / squares[1]))
        yield


def controls(
    lm: LanguageModel,
    intervention: str,
    score: Scored,
    *,
    seeds: int = 3,
    on_model: Callable[[int, int, str], None] | None = None,
) -> list[Control]:
    """Score the reduction beside every control of the same matrices and size, each random one several times.

    Args:
        lm: the unchanged model.
        intervention: text of the reduction.
        score: see ``laserlm.analysis.scored``.
        seeds: draws of what is random.
        on_model: called with the number of models done, their total and the name of the next.
    """
    base = score("")
    wanted = [(name, seed) for name, (random, _) in CONTROLS.items() for seed in range(seeds if random else 1)]
    evaluations: dict[str, list[Evaluation]] = {}
    sizes: dict[str, list[float]] = {}
    for done, (name, seed) in enumerate(wanted):
        if on_model is not None:
            on_model(done, len(wanted), name)
        size = sizes.setdefault(name, [])
        with changed(lm, intervention, name, seed, size):
            pass  # for its size alone, which no store keeps
        key = f"control: {name}, seed {seed}, {intervention}"
        evaluations.setdefault(name, []).append(score(key, changed(lm, intervention, name, seed)))
    return [_control(name, base, found, sizes[name]) for name, found in evaluations.items()]


def _control(name: str, base: Evaluation, found: Sequence[Evaluation], sizes: Sequence[float]) -> Control:
    gains = [sum(e.scores[i].correct for e in found) / len(found) - b.correct for i, b in enumerate(base.scores)]
    changes = [sum(e.scores[i].loss for e in found) / len(found) - b.loss for i, b in enumerate(base.scores)]
    by_seed = [e.accuracy - base.accuracy for e in found]
    return Control(
        control=name,
        seeds=len(found),
        n=base.n,
        size=sum(sizes) / len(sizes),
        accuracy=sum(e.accuracy for e in found) / len(found),
        gain=sum(gains) / base.n,
        interval=paired_mean(gains),
        least=min(by_seed),
        most=max(by_seed),
        loss=sum(e.loss for e in found) / len(found),
        loss_change=sum(changes) / base.n,
        loss_interval=paired_mean(changes),
    )
