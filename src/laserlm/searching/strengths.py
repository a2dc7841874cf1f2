"""Choose strengths between 0 and 1 for all components at once: what a natural gradient asks for, weakened to that range.

With x_e the sum of c_ei times what is taken away from component i, the mean loss falls by ``mean(x) - var(x) / 2``, and the
guards are expected to lose ``sum(harm * taken**2)``. The largest difference of the two, with a price for harm, is the solution
of linear equations, of as many unknowns as there are questions.

Many small changes can add up in one direction, which a sum over components does not see. So the price follows from another
estimate: half the mean squared change along the gradients of the guard's passages. The strengths do not depend on these
gradients but through the price. The harm is then measured, and the price corrected, a few times.

Whether such a choice helps is tested by cross-fitting. For each part of the validation questions the strengths are chosen on
the other parts, for the same expected harm, and scored on it. If the first part alone or all parts together are significantly
better, all questions choose the strengths. The scores of the questions have no part in the choice of the harm. Strengths for
less harm are scored too, for the list of gain against harm.

The change of a question is about the sum of its products with the questions that chose. Each pair of questions of two parts is
in two such sums, so the sum of all changes has up to twice the variance that independent changes would have. The test of all
parts allows for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor

from laserlm.errors import ScoringError
from laserlm.reductions import Intervention
from laserlm.scoring.records import ExampleScore
from laserlm.searching.components import (
    ComponentPool,
    cost_of_step,
    derivatives_of,
    parts_of,
    questions_with_room,
    separate_matrices,
    shrunk_mean,
)
from laserlm.searching.config import Metric
from laserlm.searching.ledger import BASE
from laserlm.searching.race import is_significantly_worse
from laserlm.searching.session import SearchSession

STEP = 0.05
"""To what strengths are rounded. Components that change less stay as they are."""
LEAST_HARM = 2e-6
"""Harm that a component counts with at least, in nats per token, so that the equations can be solved."""
LEAST_PRICE, MOST_PRICE, HALVINGS = 1e-2, 1e8, 16
"""Between what the price of harm is looked for, in nats per nat, and how often the interval is halved."""
CORRECTIONS, CLOSE, MOST_FACTOR = 8, 0.8, 4.0
"""Measurements of the harm at most, the share of the bound that is near enough, and the largest factor between two of them."""
EARLY = 0.2
"""Share of the error probability for a look at the first part alone, which saves the passes on the others."""
SMALLER = (0.25, 0.5)
"""Shares of the expected harm for which strengths are listed too."""
BACK = 1.5
"""Power of the ratio of bound to harm by which less is allowed: the harm falls more slowly than what is allowed."""
NOTE = "cross-fitted strengths"


def weaken_components(session: SearchSession) -> None:
    """Choose strengths of all components, and keep them if they help questions that had no part in choosing them.

    Questions of too few facts choose nothing.

    Raises:
        WeightError: if derivatives are not finite.
        OutOfTimeError: if the time is used up.
    """
    ledger = session.on_validation
    n = len(ledger.split)
    session.begin("strengths", [BASE], n, later=cost_of_step(n, session.config) + n)
    ledger.extend([BASE], n)
    facts = [e.fact or e.id for e in ledger.split]
    parts = parts_of(facts)
    if not parts:
        return
    noted = session.run.notes.get(NOTE)
    if noted is None:
        noted = [str(i) for i in _choose(session, facts, parts)]
        session.run.note(NOTE, noted)
    chosen, *others = map(Intervention.parse, noted)
    cross_fitted, smaller = others[: len(parts)], others[len(parts) :]
    if chosen and passes_cross_fitting(session, parts, cross_fitted):
        # The chosen ones come last: of equal points the last one is the best.
        for tried in dict.fromkeys([*filter(None, smaller), chosen]):
            session.begin("strengths", [tried], n, later=n if tried != chosen else 0)
            ledger.extend([tried], n)
            if ledger.fails(tried, n):
                continue
            used = _measured(session, tried)
            if math.isfinite(used) and used <= session.config.harm_bound:
                session.best = tried
                # In the same order in a search that resumes, which measures no correction.
                session.harms[str(tried)] = session.harms.pop(str(tried))


def _choose(session: SearchSession, facts: Sequence[str], parts: Sequence[range]) -> list[Intervention]:
    """Return strengths: what all questions choose, for each part what the others choose, and what all choose for less harm."""
    ledger, pool = session.on_validation, ComponentPool(separate_matrices(session.candidates))
    harm, passages = pool.harm_and_passages(session)
    asked = questions_with_room(session.config, len(pool), parts)
    session.begin("gradient", [BASE], 0, later=cost_of_step(len(facts), session.config))
    session.report_progress(BASE)
    derivatives = derivatives_of(ledger, asked, BASE, pool.matrices, between_choices=session.between_choices)

    def choose(rows: Sequence[int], allowed: float) -> Intervention:
        of_rows = derivatives[list(rows)]
        mean = shrunk_mean(of_rows, [facts[asked[row]] for row in rows])
        return pool.intervention(choose_strengths(of_rows, mean, harm, passages, allowed=allowed))

    rows = range(len(asked))
    allowed = _allowed(session, lambda allowed: choose(rows, allowed))
    others = [[row for row in rows if asked[row] not in part] for part in parts]
    return [choose(rows, allowed), *(choose(o, allowed) for o in others), *(choose(rows, s * allowed) for s in SMALLER)]


def _allowed(session: SearchSession, choose: Callable[[float], Intervention]) -> float:
    """Return the harm to allow for, in nats per token, such that the measured harm is within the bound, and near it."""
    bound, within = session.config.harm_bound, 0.0
    if math.isinf(bound):
        return bound
    allowed, last = bound, BASE
    for _ in range(CORRECTIONS):
        tried = choose(allowed)
        if not tried or (tried == last and within):  # nothing, or all that there is to take
            break
        last, used = tried, _measured(session, tried)
        if used <= bound:
            within = max(within, allowed)
            if used >= CLOSE * bound:
                break
            factor = (1 + CLOSE) / 2 * bound / used if used > 0 else MOST_FACTOR
        else:
            factor = max(1 / MOST_FACTOR**2, ((1 + CLOSE) / 2 * bound / used) ** BACK)
        allowed *= min(MOST_FACTOR, factor)
    return within


def _measured(session: SearchSession, tried: Intervention) -> float:
    """Return the measured harm and one standard error more; infinite where the strengths break the model."""
    try:
        return session.harm_used(tried)
    except ScoringError:
        if any(str(tried) in guard.choosing.failed for guard in session.guards):
            return math.inf
        raise


def passes_cross_fitting(session: SearchSession, parts: Sequence[range], cross_fitted: Sequence[Intervention]) -> bool:
    """Return whether the first part, or all parts, are better under the strengths that the other parts chose."""
    ledger, delta = session.on_validation, session.config.delta
    n = len(ledger.split)
    levels = {parts[0].stop: EARLY * delta, n: cross_fitted_level((1 - EARLY) * delta)}
    metric: Metric = "accuracy" if session.between_choices else "loss"
    after: list[ExampleScore] = []
    for number, (part, tried) in enumerate(zip(parts, cross_fitted, strict=True), start=1):
        session.begin(f"part {number}", [tried], part.stop, later=n)
        ledger.extend([tried], part.stop)
        if ledger.fails(tried, part.stop):
            return False
        after += ledger.first(tried, part.stop).scores[part.start :]
        before, level = ledger.first(BASE, part.stop), levels.get(part.stop)
        if level and is_significantly_worse(replace(before, scores=tuple(after)), before, metric, level):
            return True
    return False


def cross_fitted_level(delta: float) -> float:
    """Return the level of a test for independent changes that has an error of ``delta`` on changes of twice the variance."""
    normal = NormalDist()
    return normal.cdf(2**0.5 * normal.inv_cdf(delta)) if 0 < delta < 1 else delta


def expected_harm(passages: Sequence[Tensor], taken: Tensor) -> float:
    """Return the largest harm that is expected on the guards, in nats per token.

    Args:
        passages: (P, K) of each guard: gradients of its passages, with a sum of squares that is the mean over tokens.
        taken: (K,) what is taken away from each component, from 0 to 1.
    """
    return max(float((rows @ taken).square().sum()) / 2 for rows in passages)


def choose_strengths(
    contributions: Tensor, mean: Tensor, harm: Tensor, passages: Sequence[Tensor], *, allowed: float
) -> Tensor:
    """Return what is taken away from each component, (K,), from 0 to 1 in multiples of ``STEP``.

    Args:
        contributions: (E, K) derivatives of the loss of each question.
        mean: (K,) their means, shrunk.
        harm: (K,) of each component, in nats per token.
        passages: see ``expected_harm``.
        allowed: largest expected harm, in nats per token.
    """
    inverse = 1 / (2 * harm.clamp(min=LEAST_HARM))  # (K,)
    slopes = (contributions - contributions.mean(0)) / max(1, len(contributions) - 1) ** 0.5  # (E, K)
    gram = (slopes * inverse) @ slopes.T  # (E, E)
    towards = inverse * mean
    along = slopes @ towards  # (E,)

    def at(price: float) -> Tensor:
        dual = torch.linalg.solve(torch.eye(len(gram)) + gram / price, along / price)
        steps: Tensor = (towards - inverse * (slopes.T @ dual)).div(price * STEP).round()
        return (steps * STEP).clamp(0, 1)

    low, high = LEAST_PRICE, MOST_PRICE
    for _ in range(HALVINGS):
        price = (low * high) ** 0.5
        low, high = (price, high) if expected_harm(passages, at(price)) > allowed else (low, price)
    chosen = at(high)
    return chosen if expected_harm(passages, chosen) <= allowed else torch.zeros_like(mean)
