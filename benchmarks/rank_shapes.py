"""Time the bundled model with the ranks of a compression, by multiples of ranks and shares above which matrices stay dense.

The ranks are chosen from moments that ``compression_moments.py sum`` has written. The factors are random numbers, because
values do not change the time. The models take turns in one process; figures are medians over rounds of the speed relative to
the dense model in the same round, with the least and the largest. The loss is the expected one, by curvature.

Run: python benchmarks/rank_shapes.py SUMS [--ratios .8,.6] [--dense-above 1,.9] [--rank-multiple 1,16,32] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from compression_moments import fitted
from inference import READ_TOKENS, WRITTEN_TOKENS, speeds
from torch import nn

import laserlm as laser
from laserlm.edit.factors import replaced_modules
from laserlm.low_rank import LowRankLinear, Part
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import dtype_named


def with_ranks(lm: LanguageModel, ranks: Mapping[str, int | None]) -> nn.Module:
    """Return a copy of the model with random factors of these ranks."""
    layers = {m.path.rpartition(".")[0]: low_rank(m.shape, rank) for m in lm.matrices if (rank := ranks[m.id]) is not None}
    with replaced_modules(lm.model, layers):
        return deepcopy(lm.model)


def low_rank(shape: tuple[int, int], rank: int) -> LowRankLinear:
    """Return a low-rank layer of random numbers."""
    m, n = shape
    layer = LowRankLinear(n, m, [Part(m, rank, pivoted=True)]).requires_grad_(False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.01)
    layer.order = torch.randperm(m, dtype=torch.int32)
    return layer


def spread(dense: list[float], other: list[float]) -> str:
    """Return how many times as fast the other is: the median over the rounds, the least and the largest."""
    ratios = [a / b for a, b in zip(dense, other, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def numbers(words: str) -> list[float]:
    return [float(word) for word in words.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sums", type=Path, help="file of moments")
    parser.add_argument("--ratios", type=numbers, default=[0.8, 0.6])
    parser.add_argument("--dense-above", type=numbers, default=[1, 0.9])
    parser.add_argument("--rank-multiple", type=numbers, default=[1, 16, 32])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    lm, dtype = laser.load("bundled"), dtype_named(given.dtype)
    models: dict[str, Any] = {"dense": with_ranks(lm, {m.id: None for m in lm.matrices}).to(dtype)}
    rows: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        compression = fitted(lm, given.sums, "two-sided", Path(folder))
        for ratio, share, multiple in product(given.ratios, given.dense_above, given.rank_multiple):
            ranks = replace(compression, dense_above=share, rank_multiple=int(multiple)).ranks(ratio)
            lost = sum(float(compression.losses[name][rank:].sum()) for name, rank in ranks.items() if rank is not None)
            shapes = {(m.shape, ranks[m.id]) for m in compression.matrices}
            name = f"{ratio:g}|{share:g}|{multiple:g}"
            rows[name] = [f"{lost:.4f}", str([*ranks.values()].count(None)), str(len(shapes))]
            models[name] = with_ranks(lm, ranks).to(dtype)
    times = speeds(models, given.rounds)
    read, written = (statistics.median(seconds) for seconds in times["dense"])
    print(f"{given.dtype}: dense reads {READ_TOKENS / read:.0f} and writes {WRITTEN_TOKENS / written:.1f} tokens a second")
    print("ratio|dense above|multiples of|expected loss|dense matrices|shapes|reading|writing")
    for name, row in rows.items():
        print("|".join([name, *row, *(spread(times["dense"][i], times[name][i]) for i in (0, 1))]))


if __name__ == "__main__":
    main()
