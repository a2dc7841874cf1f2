"""What single components contribute to a loss: the derivatives of the loss by their strengths, over questions or tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laserlm.errors import WeightError
from laserlm.models.finite import overflow
from laserlm.searching.gradients import ComponentGradients


def contributions_of_examples(
    gradients: ComponentGradients, examples: Sequence[int], n: int, scales: Sequence[float]
) -> dict[str, Tensor]:
    """Return the derivatives (n, k) by the matrix's id; at the deadline not of all matrices.

    Args:
        gradients: of the losses of rows. If it sums squares too, their sum over all rows follows, which makes (n + 1, k).
        examples: for each row the index of its example.
        n: number of examples.
        scales: factors of the loss, one after the other until all gradients are finite.

    Raises:
        WeightError: if a gradient is not finite at any of them.
    """
    # In a second part of what is returned for a chunk are squares.
    of_parts, totals = torch.stack([torch.tensor(examples), torch.full((len(examples),), n)]), dict[str, Tensor]()
    for scale in scales:
        totals = {}
        for chunk, reduced in gradients.chunks(range(len(examples)), lambda _, sums: sums.cpu(), scale=scale):
            for name, of_chunk in reduced.items():
                parts = len(of_chunk) // len(chunk)
                total = totals.setdefault(name, torch.zeros(n + parts - 1, of_chunk.shape[1], dtype=of_chunk.dtype))
                total.index_add_(0, of_parts[:parts, chunk].flatten(), of_chunk)
        if all(bool(total.isfinite().all()) for total in totals.values()):
            return totals
    wrong = next(name for name, total in totals.items() if not bool(total.isfinite().all()))
    lm = gradients.lm
    raise WeightError(f"the gradient of {wrong} is not finite: {overflow(lm.model, lm.dtype)}")
