"""Compress the bundled model at several ratios in every way, and print the perplexity of each on held-out text.

The text is cut as by ``laser compress``: calibration from its first four fifths, perplexity on its last. Another text can be
named for the calibration, or ``self`` for text that the model writes. A perplexity stands with its ratio to that of the
unchanged model, and the standard error of the ratio's logarithm over passages.
Run: python benchmarks/compression.py --text FILE [--calibration FILE] [--ratios .9,.8,.6,.4] [--held-out CHARACTERS]
     [--refine STEPS,STEPS] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np

import laserlm as laser
from laserlm.export.calibration_text import own_calibration_text, read_calibration_text
from laserlm.export.fitting import Allocation, Method, fit_ranks
from laserlm.export.products import fastest_products
from laserlm.scoring.evaluate import text_perplexity
from laserlm.scoring.identity import digest
from laserlm.scoring.records import Evaluation

WAYS: list[tuple[Method, Allocation]] = [
    ("plain", "uniform"),
    ("plain", "curvature"),
    ("whitened", "uniform"),
    ("whitened", "sensitivity"),
    ("whitened", "curvature"),
    ("two-sided", "sensitivity"),
    ("two-sided", "curvature"),
    ("scaled", "uniform"),
    ("scaled", "curvature"),
]


def compared(base: Evaluation, small: Evaluation) -> str:
    """Return a perplexity, its ratio to the unchanged model's, and the standard error of the ratio's logarithm."""
    tokens = np.array([score.tokens for score in base.scores])
    lost = np.array([b.logprob - s.logprob for b, s in zip(base.scores, small.scores, strict=True)])
    ratio = math.exp(lost.sum() / tokens.sum())
    residuals = lost - tokens * lost.sum() / tokens.sum()
    error = math.sqrt((residuals**2).sum() * len(lost) / (len(lost) - 1)) / tokens.sum() if len(lost) > 1 else math.nan
    perplexity = f"{small.perplexity:.2f}" if small.perplexity < 1000 else f"{small.perplexity:.1e}"
    return f"{perplexity}, x{ratio:.3f} ({error:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ratios", default=".9,.8,.6,.4")
    parser.add_argument("--calibration", help="a text file or self; default: the text")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--held-out", type=int, help="characters to measure perplexity on; default: as laser compress")
    parser.add_argument("--ways", default=",".join(map(str, range(len(WAYS)))), help="numbers of the rows to measure")
    parser.add_argument("--refine", default="0", help="numbers of steps that train the factors, a row each")
    parser.add_argument("--dense-above", type=float, default=1)
    parser.add_argument("--rank-multiple", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder where decompositions and trained factors stay for the next run")
    arguments = parser.parse_args()
    lm = laser.load("bundled")
    ratios = [float(r) for r in arguments.ratios.split(",")]
    all_steps = [int(steps) for steps in arguments.refine.split(",")]
    cut = {"tokens": arguments.tokens, "refine": max(all_steps)}
    text = read_calibration_text(lm, arguments.text, **cut)
    held_out = text.held_out[: arguments.held_out]
    if arguments.calibration == "self":
        text = own_calibration_text(lm, **cut)
    elif arguments.calibration:
        text = read_calibration_text(lm, arguments.calibration, **cut)
    products = fastest_products(lm, text.calibration[0])
    base = text_perplexity(lm, held_out)
    n_tokens = sum(len(row.targets) for row in text.calibration)
    print(f"{n_tokens} tokens to calibrate on, {base.tokens} held out; products in {products}")
    print("|".join(["decomposition, ranks, steps", *(f"{r:g}" for r in ratios), "calibration, s", "training at each ratio, s"]))
    print("|".join(["unchanged model", *[f"{base.perplexity:.2f}"] * len(ratios), "", ""]), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for way in arguments.ways.split(","):
            method, allocation = WAYS[int(way)]
            kept_for = digest([text.as_dict(), arguments.tokens, products])[:16]
            folder = (arguments.keep or Path(temporary)) / f"{method}-{allocation}-{kept_for}"
            folder.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            fitted = fit_ranks(
                lm,
                text.calibration,
                method=method,
                allocation=allocation,
                dense_above=None if allocation == "uniform" else arguments.dense_above,
                rank_multiple=None if allocation == "uniform" else arguments.rank_multiple,
                products=products,
                folder=folder,
            )
            seconds = time.perf_counter() - start
            for steps in all_steps:
                row, training = [], []
                for ratio in ratios:
                    start = time.perf_counter()
                    rows = text.refinement[:steps]
                    small = fitted.refine(lm, ratio, rows, folder, steps=steps, products=products) if steps else fitted
                    training.append(f"{time.perf_counter() - start:.0f}")
                    with small.applied(lm, ratio):
                        row.append(compared(base, text_perplexity(lm, held_out)))
                print("|".join([f"{method}, {allocation}, {steps}", *row, f"{seconds:.0f}", " ".join(training)]), flush=True)


if __name__ == "__main__":
    main()
