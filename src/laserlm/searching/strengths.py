"""Choose strengths between 0 and 1 for all components of a step at once: what a natural gradient asks for, weakened to that.

With x_e the sum of c_ei times what is taken away from component i, the mean loss falls by ``mean(x) - var(x) / 2``, and the
guards are expected to lose ``sum(harm * taken**2)``. The largest difference of the two, with a price for harm, is the solution
of linear equations, of as many unknowns as there are questions. The price is such that the harm keeps within what is allowed.

Many small changes can add up in one direction, which a sum over components does not see. So the harm that is held against the
bound is half the mean squared change along the gradients of the guard's passages. The choice does not know these gradients, so
it cannot hide from them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEP = 0.05
"""To what strengths are rounded. Components that change less stay as they are."""
LEAST_HARM = 2e-6
"""Harm that a component counts with at least, in nats per token, so that the equations can be solved."""
LEAST_PRICE, MOST_PRICE, HALVINGS = 1e-2, 1e8, 16
"""Between what the price of harm is looked for, in nats per nat, and how often the interval is halved."""


def expected_harm(passages: Sequence[Tensor], taken: Tensor) -> float:
    """Return the largest harm that is expected on the guards, in nats per token.

    Args:
        passages: (P, K) of each guard: gradients of its passages, with a sum of squares that is the mean over tokens.
        taken: (K,) what is taken away from each component, from 0 to 1.
    """
    return max(float((rows @ taken).square().sum()) / 2 for rows in passages)


def choose_strengths(
    contributions: Tensor, mean: Tensor, harm: Tensor, passages: Sequence[Tensor], taken: Tensor, *, allowed: float
) -> Tensor:
    """Return what a step takes away from each component, (K,), from 0 to 1 in multiples of ``STEP``.

    Args:
        contributions: (E, K) derivatives of the loss of each question, where ``taken`` is taken away.
        mean: (K,) their means, shrunk.
        harm: (K,) of each component, in nats per token.
        passages: see ``expected_harm``.
        taken: (K,) what is taken away before the step.
        allowed: harm that may be added, in nats per token.
    """
    inverse = 1 / (2 * harm.clamp(min=LEAST_HARM))  # (K,)
    slopes = (contributions - contributions.mean(0)) / max(1, len(contributions) - 1) ** 0.5  # (E, K)
    gram = (slopes * inverse) @ slopes.T  # (E, E)
    towards = inverse * mean
    along, along_taken = slopes @ towards, slopes @ taken  # (E,)
    most = expected_harm(passages, taken) + allowed

    def at(price: float) -> Tensor:
        dual = torch.linalg.solve(torch.eye(len(gram)) + gram / price, along / price - along_taken)
        steps: Tensor = (towards - inverse * (slopes.T @ dual)).div(price * STEP).round()
        return (steps * STEP).clamp(0, 1)

    low, high = LEAST_PRICE, MOST_PRICE
    for _ in range(HALVINGS):
        price = (low * high) ** 0.5
        low, high = (price, high) if expected_harm(passages, at(price)) > most else (low, price)
    chosen = at(high)
    return chosen if expected_harm(passages, chosen) <= most else taken
