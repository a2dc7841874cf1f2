"""Simulate how often a search accepts strengths that help nobody, with questions that share facts.

``python scripts/acceptance_rate.py`` prints a table of docs/reading.md. The derivatives of all questions have the mean 0, so
no strengths help. Strengths are chosen on the other parts as in a search, and a question changes by its derivatives alone. The
curvature of the loss, which makes useless strengths do harm, is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from laserlm.reductions import Intervention
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.searching.components import parts_of, shrunk_mean
from laserlm.searching.config import Metric
from laserlm.searching.strengths import choose_strengths, passes_cross_fitting

DELTA = 0.05
COMPONENTS = 200
PER_FACT = 3
CORRELATIONS = (0.0, 0.6, 1.0)
SPREAD = 0.2
"""Standard deviation of a question's derivative by a component, in nats."""
HARM, ALLOWED = 0.01, 0.02
"""Harm of each component and of all together, in nats per token."""


def acceptance_rate(
    metric: Metric, facts: int, correlation: float, runs: int, seed: int = 0, *, is_shrunk: bool = True, by_fact: bool = True
) -> float:
    """Return the share of searches that accept useless strengths.

    Args:
        metric: ``accuracy`` or ``loss``.
        facts: number of facts; each has three questions.
        correlation: between the derivatives of two questions of a fact.
        runs: number of simulated searches.
        seed: of the draws.
        is_shrunk: whether the mean derivatives are shrunk, as a search does. Shrinking mostly leaves nothing to choose.
        by_fact: whether the search knows the facts.
    """
    generator = torch.Generator().manual_seed(seed)
    known = [str(i // PER_FACT if by_fact else i) for i in range(facts * PER_FACT)]
    parts = parts_of(known)
    harm = torch.full((COMPONENTS,), HARM)
    accepted = 0
    for _ in range(runs):
        own, common = (torch.randn(n, COMPONENTS, generator=generator) for n in (len(known), facts))
        c = SPREAD * (correlation**0.5 * common.repeat_interleave(PER_FACT, 0) + (1 - correlation) ** 0.5 * own)
        gaps = torch.randn(len(known), generator=generator)  # what the right choice is ahead by
        changes = torch.zeros(len(known))
        for part in parts:
            rows = [i for i in range(len(known)) if i not in part]
            others = c[rows]
            mean = shrunk_mean(others, [known[i] for i in rows]) if is_shrunk else others.mean(0)
            taken = choose_strengths(others, mean, harm, [(2 * harm).sqrt().diag()], allowed=ALLOWED)
            changes[list(part)] = -c[list(part)] @ taken
        accepted += _is_accepted(metric, parts, known, gaps, changes)
    return accepted / runs


def _is_accepted(metric: Metric, parts: Sequence[range], facts: Sequence[str], gaps: Tensor, changes: Tensor) -> bool:
    """Return what a search decides on changes of loss (E,)."""
    losses = {False: (-gaps).tolist(), True: (changes - gaps).tolist()}

    def first(intervention: Intervention, n: int) -> Evaluation:
        of = losses[bool(intervention)][:n]
        scores = [ExampleScore(str(i), x < 0, -x, 1, "", "", fact=facts[i]) for i, x in enumerate(of)]
        return Evaluation("simulated", "simulated", "validation", "choice", str(intervention), tuple(scores), 0.0)

    ledger = SimpleNamespace(
        split=range(len(facts)), first=first, extend=lambda _tried, _stop: None, fails=lambda _tried, _stop: False
    )
    session: Any = SimpleNamespace(
        on_validation=ledger,
        config=SimpleNamespace(delta=DELTA),
        between_choices=metric == "accuracy",
        begin=lambda _stage, _tried, _stop, **_: None,
    )
    return passes_cross_fitting(session, parts, [Intervention.parse("0.fc_in@drop0")] * len(parts))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--facts", type=int, nargs="+", default=[30, 100])
    options = parser.parse_args()
    runs = options.runs
    torch.set_num_threads(1)
    print("| facts of three questions | means | " + " | ".join(f"{c:g}" for c in CORRELATIONS) + " |")
    print("|---|---|" + "---|" * len(CORRELATIONS))
    rows = [(facts, *way) for facts in options.facts for way in ((False, True), (True, True), (False, False))]
    for facts, is_shrunk, by_fact in rows:
        cells = []
        for correlation in CORRELATIONS:
            of_search = {"is_shrunk": is_shrunk, "by_fact": by_fact}
            both = [acceptance_rate(m, facts, correlation, runs, **of_search) for m in ("accuracy", "loss")]
            cells.append(" / ".join(f"{100 * share:.1f}" for share in both))
        means = "shrunk, as in a search" if is_shrunk else "as they are"
        print(f"| {facts}{'' if by_fact else ', taken as independent'} | {means} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
