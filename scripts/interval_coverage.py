"""Simulate how often the 95 % intervals of a comparison hold the true difference when questions share facts.

``python scripts/interval_coverage.py`` prints the table of docs/reading.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from laserlm.scoring.statistics import clustering_of, paired_difference, paired_mean

CORRECTED, BROKEN = 0.10, 0.05
"""Probabilities with which an edit corrects and breaks a question."""
CORRELATIONS = (0.0, 0.3, 0.6, 1.0)
SIZES: dict[str, Callable[[int], list[int]]] = {
    "three": lambda facts: [3] * facts,
    "1 to 8": lambda facts: [1, 1, 2, 3, 8] * (facts // 5),
}
"""Questions of each fact."""


def coverage(metric: str, sizes: Sequence[int], correlation: float, runs: int, seed: int = 0, *, by_fact: bool = True) -> float:
    """Return the share of runs whose interval holds the true difference.

    Args:
        metric: ``accuracy`` or ``loss``.
        sizes: number of questions of each fact.
        correlation: between two questions of a fact.
        runs: number of simulated comparisons.
        seed: of the draws.
        by_fact: whether the intervals know the facts.
    """
    generator = np.random.default_rng(seed)
    facts = np.repeat(np.arange(len(sizes)), sizes)
    names = facts.tolist() if by_fact else list(range(len(facts)))
    probabilities = [CORRECTED, BROKEN, 1 - CORRECTED - BROKEN]
    truth = CORRECTED - BROKEN if metric == "accuracy" else 0.0
    held = 0
    for _ in range(runs):
        own, common = (
            generator.standard_normal(n) if metric == "loss" else generator.choice([1.0, -1.0, 0.0], n, p=probabilities)
            for n in (len(facts), len(sizes))
        )
        is_common = generator.random(len(facts)) < correlation**0.5  # so that two questions share it by the correlation
        x: list[float] = np.where(is_common, common[facts], own).tolist()
        if metric == "loss":
            low, high = paired_mean(x, facts=names)
        else:
            low, high = paired_difference(x.count(1), x.count(-1), len(x), clustering=clustering_of(x, names))
        held += low <= truth <= high
    return held / runs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=4000)
    runs = parser.parse_args().runs
    print("| facts | questions of each | " + " | ".join(f"{c:g}" for c in CORRELATIONS) + " |")
    print("|---|---|" + "---|" * len(CORRELATIONS))
    rows = [(facts, name, True) for facts in (10, 30, 100, 400) for name in SIZES]
    for facts, name, by_fact in [*rows, (100, "three", False)]:
        cells = []
        for correlation in CORRELATIONS:
            both = [coverage(m, SIZES[name](facts), correlation, runs, by_fact=by_fact) for m in ("accuracy", "loss")]
            cells.append(" / ".join(f"{100 * share:.1f}" for share in both))
        print(f"| {facts} | {name}{'' if by_fact else ', taken as independent'} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
