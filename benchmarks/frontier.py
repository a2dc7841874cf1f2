"""Time one candidate from the frontier beside a whole pass, at several blocks of the bundled model.

Both run in turns on the same rows in the same batches, and must give the same scores. Run: python benchmarks/frontier.py
"""

from __future__ import annotations

import statistics
import time

import laserlm as laser
from laserlm.scoring.evaluate import evaluate_rows
from laserlm.scoring.forward import run_rows
from laserlm.scoring.prefix_cache import PrefixCache
from laserlm.scoring.tokenize import encode

QUESTIONS = 100
REPEATS = 3
BATCH = 32


def main() -> None:
    lm = laser.load("bundled")
    split = laser.task("worldfacts").validation.limit(QUESTIONS)
    rows = encode(lm, split.examples, "answer")
    start = time.perf_counter()
    frontier = PrefixCache(lm, rows, BATCH)
    print(f"setting up the frontier, its checks included: {time.perf_counter() - start:.2f} s")
    blocks = 1 + max(m.layer for m in lm.matrices)
    print(f"{'block':>5} {'whole pass, s':>14} {'from the frontier, s':>21} {'ratio':>6} {'boundary, MB':>13}  same scores")
    for layer in (0, blocks // 3, 2 * blocks // 3, blocks - 5, blocks - 1):
        frontier.move_to("", layer)
        with laser.applied(lm, f"{layer}.fc_in@0.1"):
            whole, short, same = [], [], True
            for _ in range(REPEATS):
                a = evaluate_rows(lm, split, "answer", rows, lambda: run_rows(lm, rows, BATCH))
                b = evaluate_rows(lm, split, "answer", rows, frontier.run)
                whole.append(a.seconds)
                short.append(b.seconds)
                same &= a.scores == b.scores
        slow, fast = statistics.median(whole), statistics.median(short)
        print(f"{layer:5} {slow:14.3f} {fast:21.3f} {slow / fast:6.1f} {frontier.bytes / 1e6:13.2f}  {same}")


if __name__ == "__main__":
    main()
