"""The threshold-layer study: reduce every matrix of the last 1, 2, ... blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from laserlm.edit import factored, resolve
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import Intervention, Layers, Reduction, Size
from laserlm.scoring.evaluate import Comparison, compare, evaluate
from laserlm.scoring.records import Evaluation
from laserlm.tasks import Split


@dataclass(frozen=True)
class SweepPoint:
    """One model of the sweep and its scores.

    Args:
        top: number of last blocks whose matrices are all reduced; 0 is the unchanged model.
        rho: kept fraction of their singular values, None for the unchanged model.
        evaluation: the scores.
        comparison: comparison with the unchanged model.
        parameters: kept share of the parameters; a matrix is stored as two factors if that takes fewer.
    """

    top: int
    rho: str | None
    evaluation: Evaluation
    comparison: Comparison
    parameters: float

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values."""
        e, c = self.evaluation, self.comparison
        return {
            "top": self.top,
            "rho": self.rho,
            "intervention": e.intervention,
            "n": e.n,
            "accuracy": e.accuracy,
            "accuracy_interval": list(e.accuracy_interval),
            "gain": c.gain,
            "gain_interval": list(c.interval),
            "mcnemar_p": c.mcnemar_p,
            "loss": e.loss,
            "parameters": self.parameters,
        }


def sweep_layers(
    lm: LanguageModel,
    split: Split,
    *,
    ratios: Sequence[str],
    from_top: int,
    stack: str = "",
    batch_size: int = 32,
    on_model: Callable[[int, int, str], None] | None = None,
) -> list[SweepPoint]:
    """Score the model with every matrix of the last 1, 2, ... blocks reduced to each ratio.

    Args:
        lm: the unchanged model.
        split: the examples.
        ratios: kept fractions of the singular values, as text.
        from_top: largest number of last blocks.
        stack: name of the stack of blocks, if the model has several.
        batch_size: sequences in one forward pass.
        on_model: called with the number of models done, their total and the next intervention.

    Raises:
        LaserError: as ``applied`` and ``evaluate``.
    """
    sizes = [Size.parse(ratio) for ratio in ratios]
    sweep = [(0, None, Intervention())] + [
        (top, str(size), Intervention((Reduction(Layers(top=top), "all", size, stack=stack),)))
        for top in range(1, from_top + 1)
        for size in sizes
    ]
    for _, _, intervention in sweep:
        resolve(lm.matrices, intervention)  # before hours of scoring
    total = sum(p.numel() for p in lm.model.parameters())
    points: list[SweepPoint] = []
    for done, (top, rho, intervention) in enumerate(sweep):
        if on_model is not None:
            on_model(done, len(sweep), str(intervention))
        with factored(lm, intervention):
            evaluation = evaluate(lm, split, batch_size=batch_size)
            kept = sum(p.numel() for p in lm.model.parameters())
        base = points[0].evaluation if points else evaluation
        points.append(SweepPoint(top, rho, evaluation, compare(base, evaluation), kept / total))
    return points
