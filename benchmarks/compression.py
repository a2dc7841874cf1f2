"""Compress the bundled model at several ratios in every way, and print the perplexity of each on held-out text.

The text is cut as by ``laser compress``: calibration from its first four fifths, perplexity on its last. Another text can be
named for the calibration, or ``self`` for text that the model writes.
Run: python benchmarks/compression.py --text FILE [--calibration FILE] [--ratios .9,.8,.6,.4] [--held-out CHARACTERS]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import laserlm as laser
from laserlm.export.calibration_text import own_calibration_text, read_calibration_text
from laserlm.export.fitting import Allocation, Method, fit_ranks
from laserlm.scoring.evaluate import text_perplexity

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ratios", default=".9,.8,.6,.4")
    parser.add_argument("--calibration", help="a text file or self; default: the text")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--held-out", type=int, help="characters to measure perplexity on; default: as laser compress")
    parser.add_argument("--ways", default=",".join(map(str, range(len(WAYS)))), help="numbers of the rows to measure")
    arguments = parser.parse_args()
    lm = laser.load("bundled")
    ratios = [float(r) for r in arguments.ratios.split(",")]
    text = read_calibration_text(lm, arguments.text, tokens=arguments.tokens)
    held_out = text.held_out[: arguments.held_out]
    if arguments.calibration == "self":
        text = own_calibration_text(lm, tokens=arguments.tokens)
    elif arguments.calibration:
        text = read_calibration_text(lm, arguments.calibration, tokens=arguments.tokens)
    base = text_perplexity(lm, held_out)
    print(f"{sum(len(row.targets) for row in text.calibration)} tokens to calibrate on, {base.tokens} held out")
    print("|".join(["decomposition, ranks", *(f"{r:g}" for r in ratios), "calibration, s"]))
    print("|".join(["unchanged model", *[f"{base.perplexity:.2f}"] * len(ratios), ""]), flush=True)
    for way in arguments.ways.split(","):
        method, allocation = WAYS[int(way)]
        start = time.perf_counter()
        compression = fit_ranks(lm, text.calibration, method=method, allocation=allocation)
        seconds = time.perf_counter() - start
        row = []
        for ratio in ratios:
            with compression.applied(lm, ratio):
                row.append(text_perplexity(lm, held_out).perplexity)
        shown = [f"{p:.2f}" if p < 1000 else f"{p:.1e}" for p in row]
        print("|".join([f"{method}, {allocation}", *shown, f"{seconds:.0f}"]), flush=True)


if __name__ == "__main__":
    main()
