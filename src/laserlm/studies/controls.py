"""Controls: change the same matrices by the same amount in other ways. Does low rank help because it is low rank?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from laserlm.edit.apply import Edit, default_cache, label_as_edited, replaced_weights, resolve, truncation
from laserlm.errors import AnalysisError
from laserlm.linalg.decomposition import as_float_matrix
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import read_matrix
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import compare
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import Interval, paired_mean
from laserlm.studies.scores import CachedScorer


@dataclass(frozen=True)
class Control:
    """One way of changing the matrices, against the unchanged model.

    Args:
        control: name of the control; of the reduction itself what it is, as ``kind_of`` says.
        draws: number of random draws; 1 for a control that is not random.
        n: number of examples.
        size: Frobenius norm of the change over the norm of the matrices, mean over the draws.
        accuracy: mean over the draws.
        gain: mean over the draws of the gain in accuracy over the unchanged model.
        interval: 95 % interval of the gain: the mean of the ends of each draw's Tango interval.
        min_gain: gain of the worst draw.
        max_gain: gain of the best draw.
        deficit: accuracy of the reduction minus that of the control, mean over the draws.
        deficit_interval: 95 % interval of the deficit, like ``interval``.
        loss: mean log-loss in nats per answer token, over the draws.
        loss_change: change of that loss.
        loss_interval: 95 % Student interval of the change over examples; each example counts with its mean over the draws.
    """

    control: str
    draws: int
    n: int
    size: float
    accuracy: float
    gain: float
    interval: Interval
    min_gain: float = field(metadata={"json": "least"})
    max_gain: float = field(metadata={"json": "most"})
    deficit: float = field(metadata={"json": "behind"})
    deficit_interval: Interval = field(metadata={"json": "behind_interval"})
    loss: float
    loss_change: float
    loss_interval: Interval


Make = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]
"""Takes W (m, n), its truncation, the rank and a random generator; returns the matrix that replaces W."""


def _pruned(W: Tensor, size: float, order: Tensor) -> Tensor:
    """Return W with its first entries in an order set to zero, until their Frobenius norm reaches ``size``."""
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
    """Return W projected on ``rank`` random directions of its shorter side."""
    m, n = W.shape
    Q = torch.linalg.qr(torch.randn(min(m, n), rank, generator=generator, dtype=torch.float64))[0].to(W.dtype).to(W.device)
    projected: Tensor = (W @ Q) @ Q.T if n <= m else Q @ (Q.T @ W)
    return projected


def _size(W: Tensor, kept: Tensor) -> float:
    return float((W - kept).norm())


REDUCTION, SUBSPACE = "the reduction", "random subspace"
CONTROLS: dict[str, tuple[bool, Make]] = {
    REDUCTION: (False, lambda W, kept, rank, g: kept),
    "removed part alone": (False, lambda W, kept, rank, g: W - kept),
    "smallest entries zero": (False, lambda W, kept, rank, g: _pruned(W, _size(W, kept), W.abs().flatten().argsort())),
    "random entries zero": (True, lambda W, kept, rank, g: _pruned(W, _size(W, kept), _random(W, g))),
    SUBSPACE: (True, lambda W, kept, rank, g: _projected(W, rank, g)),
    "Gaussian noise": (True, lambda W, kept, rank, g: _noise(W, _size(W, kept), g)),
    "all zero": (False, lambda W, kept, rank, g: torch.zeros_like(W)),
}
"""By name, whether the control is random, and the function that makes it. Zeroed entries and noise have the Frobenius norm
of the part that the reduction removes. A random subspace has the rank of the reduction, so its change is larger; where no
matrix loses rank, as under strengths above zero, there is none.

Source: arXiv 2312.13558, appendix; the released code calls the zeroing of the smallest entries dropout.
"""


@contextmanager
def changed(
    lm: LanguageModel, intervention: str, control: str, draw: int, sizes: list[float] | None = None, *, seed: int = 0
) -> Iterator[None]:
    """Change the matrices of an intervention by a control inside the ``with`` block.

    Args:
        lm: the unchanged model.
        intervention: text of the reduction that gives the matrices, the ranks and the size of the change.
        control: a name of ``CONTROLS``.
        draw: seed of the control.
        sizes: list to which the relative Frobenius norm of the full change is appended.
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
    """Return the name under which the scores of a control are stored."""
    return f"control: {control}, draw {draw}, {intervention}"


def kind_of(intervention: Intervention) -> str:
    """Return what an intervention is: low rank, components removed, strengths, or the reduction if it is mixed."""
    kinds = set()
    for r in intervention.reductions:
        named = r.size.strengths
        kinds.add("low rank" if named is None else "strengths" if any(named.values()) else "components removed")
    if kinds == {"strengths", "components removed"}:
        return "strengths"
    return kinds.pop() if len(kinds) == 1 else REDUCTION


def controls(
    lm: LanguageModel,
    intervention: str,
    scorer: CachedScorer,
    *,
    draws: int = 3,
    seed: int = 0,
    on_model: Callable[[int, int, str], None] | None = None,
) -> list[Control]:
    """Score the reduction and every control of the same matrices and size. Draw each random control several times.

    Args:
        lm: the unchanged model.
        intervention: text of the reduction.
        scorer: scores of the model.
        draws: number of draws of each random control.
        seed: of ``:reference`` decompositions.
        on_model: called with the number of models done, their total and the name of the next.

    Raises:
        AnalysisError: if the reduction changes nothing.
    """
    parsed = Intervention.parse(intervention)
    loses_rank = any(e.rank < e.max_rank for e in resolve(lm.matrices, parsed))
    wanted = {name: random for name, (random, _) in CONTROLS.items() if loses_rank or name != SUBSPACE}
    models = [(name, draw) for name, random in wanted.items() for draw in range(draws if random else 1)]
    evaluations: dict[str, list[Evaluation]] = {}
    sizes: dict[str, list[float]] = {}
    base = scorer("")
    for done, (name, draw) in enumerate(models):
        if on_model is not None:
            on_model(done, len(models), name)
        with changed(lm, intervention, name, draw, sizes.setdefault(name, []), seed=seed):
            pass  # measures the size, which the store does not keep
        evaluation = (
            scorer(intervention)
            if name == REDUCTION
            else scorer(
                key_of(name, draw, intervention), changed(lm, intervention, name, draw, seed=seed), matrices_of=intervention
            )
        )
        evaluations.setdefault(name, []).append(evaluation)
    reduced, titles = evaluations[REDUCTION][0], {REDUCTION: kind_of(parsed)}
    return [_control(titles.get(name, name), base, reduced, scored, sizes[name]) for name, scored in evaluations.items()]


def _control(name: str, base: Evaluation, reduced: Evaluation, scored: Sequence[Evaluation], sizes: Sequence[float]) -> Control:
    against = [compare(base, e) for e in scored]
    comparisons = [compare(e, reduced) for e in scored]
    changes = [sum(e.scores[i].loss for e in scored) / len(scored) - b.loss for i, b in enumerate(base.scores)]
    return Control(
        control=name,
        draws=len(scored),
        n=base.n,
        size=_mean(sizes),
        accuracy=_mean([e.accuracy for e in scored]),
        gain=_mean([c.gain for c in against]),
        interval=_mean_interval([c.interval for c in against]),
        min_gain=min(c.gain for c in against),
        max_gain=max(c.gain for c in against),
        deficit=_mean([c.gain for c in comparisons]),
        deficit_interval=_mean_interval([c.interval for c in comparisons]),
        loss=_mean([e.loss for e in scored]),
        loss_change=_mean(changes),
        loss_interval=paired_mean(changes, facts=base.facts),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_interval(intervals: Sequence[Interval]) -> Interval:
    """Return the mean of the ends. It is wider than an interval of the mean, and does not collapse on few examples."""
    return Interval(_mean([i.low for i in intervals]), _mean([i.high for i in intervals]))
