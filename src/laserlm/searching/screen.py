"""The first-order screen: from one gradient of the loss, how each candidate would change it.

Dropping components of a matrix changes the loss by minus the sum of their contributions to the gradient
(``gradients.py``), to first order: one sum for every rank of a matrix. It is a local approximation: it ranks candidates, it
decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from laserlm.edit.apply import Edit, decomposition_of
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.linalg.precision import full_precision
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix
from laserlm.scoring.forward import run_rows
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.scorers import SCORERS
from laserlm.searching.candidates import Candidate
from laserlm.searching.contributions import contributions_of_examples
from laserlm.searching.gradients import Coefficients, ComponentGradients, Decomposed
from laserlm.tasks import Example, Scorer

CURVATURE = 0.5
"""Weight of the variance: half of the Fisher information along the edit, which is how the log-loss bends to second order."""
HALF_PRECISION_SCALES = (1024.0, 32.0, 1.0, 2.0**-5, 2.0**-10)
"""Factors of the loss in float16, one after the other until the gradient is finite; the first keeps it from vanishing."""
NOT_RUN = "the model does not run its block on these questions"
OUT_OF_TIME = "the time was used up before the screen came to it"


@dataclass(frozen=True)
class Prediction:
    """What the screen says of a candidate.

    Args:
        change: mean over the examples of the change of loss to first order, in nats.
        deviation: its standard deviation over the examples; None for a single one.
        examples: number of them; those with a gradient that is not finite are left out.
    """

    change: float
    deviation: float | None
    examples: int

    @property
    def error(self) -> float | None:
        """Standard error of the change."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.examples)

    @property
    def expected(self) -> float:
        """The change that candidates are ranked by: first order and a share of its variance over the examples.

        Where single examples are predicted to change by several nats, the edit is too large for a first order, and what
        it does is worse: the log-loss bends upwards along an edit by the variance of its slope.
        """
        return self.change + CURVATURE * (self.deviation or 0.0) ** 2


@dataclass(frozen=True)
class Screening:
    """The candidates with a prediction, and those without one.

    Args:
        predictions: by the canonical text of the candidate.
        unranked: why a candidate has no prediction, by its canonical text.
    """

    predictions: dict[str, Prediction] = field(default_factory=dict)
    unranked: dict[str, str] = field(default_factory=dict)

    def __or__(self, other: Screening) -> Screening:
        return Screening(self.predictions | other.predictions, self.unranked | other.unranked)


@full_precision()
def screen(
    lm: LanguageModel,
    examples: Sequence[Example],
    rows: Sequence[TokenSequence],
    scorer: Scorer,
    candidates: Sequence[Candidate],
    *,
    cache: DecompositionCache,
    batch_size: int = 32,
    memory: float = math.inf,
    between_choices: bool = False,
    deadline: float = math.inf,
) -> Screening:
    """Predict the change of loss under each candidate, to first order.

    Examples whose gradient along a matrix is not finite are done again with a smaller factor of the loss, and without
    padding. Those that stay so are left out of that matrix. A matrix without any example has no prediction. Nor has one
    that cannot be decomposed: scoring tells the reason. Randomised decompositions are predicted by the exact ones, blocks
    of rows by the full matrix.

    Args:
        lm: the unchanged model.
        examples: those to take the gradient over.
        rows: what ``encode`` returns for them.
        scorer: as they were encoded for.
        candidates: single matrices at single ranks.
        cache: decompositions to use.
        batch_size: rows in one pass.
        memory: bytes for what goes into each block; rows are taken in chunks for which it is enough.
        between_choices: take the log-loss of the right choice among the choices, where the scorer is ``choice``, instead
            of its log-loss among all tokens.
        deadline: value of ``time.monotonic`` after which candidates that are not done have no prediction.

    Raises:
        ScoringError: if a single row does not fit into memory.
    """
    by_matrix: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_matrix.setdefault(candidate.matrix.id, []).append(candidate)
    gradients = ComponentGradients(
        lm,
        rows,
        loss_coefficients(lm, examples, rows, scorer, batch_size, between_choices),
        list({c.matrix.id: c.matrix for c in candidates}.values()),
        lambda m: decomposition_of(lm, m, cache),
        batch_size=batch_size,
        memory=memory,
        deadline=deadline,
        free=cache.clear,
    )
    changes = {name: _Changes.of(len(examples), len(some)) for name, some in by_matrix.items()}
    _take(gradients, rows, by_matrix, changes, gradient_scales(lm))
    return _screening(gradients, by_matrix, changes)


@dataclass
class _Changes:
    """Predicted changes of loss (E, C) for E examples under the C candidates of a matrix; NaN where they are not known."""

    values: Tensor
    is_tried: bool = False

    @classmethod
    def of(cls, examples: int, candidates: int) -> _Changes:
        return cls(torch.full((examples, candidates), math.nan, dtype=torch.float64))

    @property
    def is_known(self) -> Tensor:
        """(E,)"""
        return self.values.isfinite().all(1)


def _take(
    gradients: ComponentGradients,
    rows: Sequence[TokenSequence],
    by_matrix: dict[str, list[Candidate]],
    changes: dict[str, _Changes],
    scales: Sequence[float],
) -> None:
    """Fill in the changes; examples whose gradient along some matrix is not finite are done again at the next scale."""
    of_rows = torch.tensor([row.example for row in rows])
    n_rows = of_rows.bincount(minlength=len(next(iter(changes.values())).values))  # (E,)
    pending = list(range(len(rows)))
    for number, scale in enumerate(scales):
        if number:
            gradients.batch_size = 1  # padding may be what is not finite
        sums = {name: torch.zeros_like(c.values) for name, c in changes.items()}
        done = {name: torch.zeros_like(n_rows) for name in changes}
        for chunk, reduced in gradients.chunks(pending, lambda m, sums: _dropped(by_matrix[m.id], sums), scale=scale):
            for name, of_matrix in reduced.items():
                sums[name].index_add_(0, of_rows[chunk], of_matrix)
                done[name].index_add_(0, of_rows[chunk], torch.ones(len(chunk), dtype=done[name].dtype))
        overflown = torch.zeros(len(n_rows), dtype=torch.bool)
        for name, c in changes.items():
            is_done = done[name] == n_rows
            is_new = is_done & sums[name].isfinite().all(1) & ~c.is_known
            c.values[is_new] = sums[name][is_new]
            c.is_tried |= bool(is_done.any())
            overflown |= is_done & ~c.is_known
        pending = overflown[of_rows].nonzero()[:, 0].tolist()
        if not pending:
            return


def _screening(gradients: ComponentGradients, by_matrix: dict[str, list[Candidate]], changes: dict[str, _Changes]) -> Screening:
    """Return the predictions of all candidates with some known change, and the reason for each of the others."""
    screening = Screening()
    for name, candidates in by_matrix.items():
        known = changes[name].values[changes[name].is_known]  # (examples that are known, candidates)
        deviations = known.std(0).tolist() if len(known) > 1 else [None] * len(candidates)
        if changes[name].is_tried:
            reason = f"its gradient is not finite in {str(gradients.lm.dtype).removeprefix('torch.')}"
        else:
            reason = gradients.failed.get(name) or (OUT_OF_TIME if gradients.is_late else NOT_RUN)
        for candidate, mean, deviation in zip(candidates, known.mean(0).tolist(), deviations, strict=True):
            text = str(candidate.intervention)
            if len(known):
                screening.predictions[text] = Prediction(mean, deviation, len(known))
            else:
                screening.unranked[text] = reason
    return screening


def gradient_scales(lm: LanguageModel) -> Sequence[float]:
    """Return factors of the loss to take its gradient with, the best first."""
    return HALF_PRECISION_SCALES if lm.dtype == torch.float16 else (1.0, 1.0)


def _dropped(candidates: Sequence[Candidate], contributions: Tensor) -> Tensor:
    """Return the changes of loss (R, C) when each candidate drops its components; contributions are (R, k)."""
    contributions = contributions.cpu().double()
    changes = torch.stack([_change(c, contributions) for c in candidates], 1)
    changes[~contributions.isfinite().all(1)] = math.nan
    return changes


def _change(candidate: Candidate, contributions: Tensor) -> Tensor:
    (reduction,) = candidate.intervention.reductions
    k = contributions.shape[1]
    edit = Edit.of(candidate.matrix, reduction)
    rank = edit.rank * k // edit.max_rank
    if (strengths := reduction.size.strengths) is not None:
        lost = 1 - torch.tensor(list(strengths.values()), dtype=contributions.dtype)
        return -contributions[:, list(strengths)] @ lost  # (R,)
    dropped = contributions[:, rank:] if reduction.keep == "top" else contributions[:, : k - rank]
    changes: Tensor = -dropped.sum(1)  # (R,)
    return changes


@full_precision()
def sensitivities(
    lm: LanguageModel,
    rows: Sequence[TokenSequence],
    matrices: Sequence[Matrix],
    decomposed: Decomposed,
    *,
    batch_size: int = 4,
    memory: float = math.inf,
) -> dict[str, Tensor]:
    """Return what dropping each component of each matrix costs, (k,), by the matrix's id: half the Fisher information.

    Of a component, that is half the sum over tokens of the squared contribution to the gradient, as if tokens were
    independent; with the gradient of the mean loss of a row. It is never negative, and the costs of several components
    add up, cross terms aside.

    Args:
        lm: the unchanged model.
        rows: texts, one example each.
        matrices: weights of linear layers.
        decomposed: returns the decomposition of a matrix.
        batch_size: rows in one pass.
        memory: bytes for what goes into the blocks. Rows are taken in chunks that keep it; one row is always taken.

    Raises:
        WeightError: if a gradient overflows.
        ScoringError: if a single row does not fit into memory.
    """
    coefficients: list[Coefficients] = [(-1 / len(row.targets), []) for row in rows]
    gradients = ComponentGradients(
        lm, rows, coefficients, matrices, decomposed, batch_size=batch_size, memory=memory, squared=True
    )
    totals = contributions_of_examples(gradients, [0] * len(rows), 1, gradient_scales(lm))
    return {name: total[0] / len(rows) / 2 for name, total in totals.items()}


def loss_coefficients(
    lm: LanguageModel,
    examples: Sequence[Example],
    rows: Sequence[TokenSequence],
    scorer: Scorer,
    batch_size: int,
    between: bool,
    *,
    squared: bool = False,
) -> list[Coefficients]:
    """Return by what each row's log-probabilities, of its targets and of its options, enter the sum of losses.

    With ``squared``, the squares of the derivatives are summed, and their sum is the Fisher information.
    """
    tokens = Counter[int]()
    for row in rows:
        tokens[row.example] += len(row.targets)
    gold_index, slopes_of = SCORERS[scorer].gold_index, SCORERS[scorer].slopes
    coefficients: list[Coefficients] = []
    if slopes_of is not None:
        outcomes = run_rows(lm, rows, batch_size)
        for i, of in groupby(range(len(rows)), key=lambda i: rows[i].example):
            coefficients += slopes_of(examples[i], [outcomes[place] for place in of], squared)
        return coefficients
    if squared:
        return [(-1.0, []) for _ in rows]
    if gold_index is None:
        return [(-1 / tokens[row.example], []) for row in rows]
    totals = [o.choice_logprobs or math.fsum(o.logprobs) for o in run_rows(lm, rows, batch_size)] if between else []
    for i, of in groupby(range(len(rows)), key=lambda i: rows[i].example):
        places = list(of)
        right = gold_index(examples[i])
        if not between:
            # Of several rows only the right choice's has a loss; a single row's target is the right choice.
            coefficients += [
                (-1 / len(rows[p].targets) if n == right or len(places) == 1 else 0.0, []) for n, p in enumerate(places)
            ]
            continue
        flat: list[Any] = totals[places[0]] if len(places) == 1 else [totals[p] for p in places]  # type: ignore[assignment]
        shares = torch.tensor(flat, dtype=torch.float64).softmax(0).tolist()
        slopes = [share - (n == right) for n, share in enumerate(shares)]
        coefficients += [(0.0, slopes)] if len(places) == 1 else [(s, []) for s in slopes]
    return coefficients
