"""Time passes from the prefix cache next to complete ones, at several blocks of the bundled model.

The first table has one candidate with its activations cached already. The second one has what the test split takes: the
unchanged and the edited model, with nothing cached before. Both ways run in turns on the same rows in the same batches, and
must give the same scores. Run: python benchmarks/frontier.py
"""

from __future__ import annotations

import time
from statistics import median

import laserlm as laser
from laserlm.scoring.evaluate import evaluate_rows
from laserlm.scoring.forward import run_rows
from laserlm.scoring.prefix_cache import PrefixCache, PrefixCheck
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.tokenize import encode
from laserlm.tasks import Split

QUESTIONS = 100
REPEATS = 3
BATCH = 32


def time_candidate(lm: laser.LanguageModel, split: Split, rows: list[TokenSequence], cache: PrefixCache, layer: int) -> str:
    """Return a row: one edited model by complete passes, and from the cache."""
    cache.move_to("", layer)
    complete, cached, same = [], [], True
    with laser.applied(lm, f"{layer}.fc_in@0.1"):
        for _ in range(REPEATS):
            a = evaluate_rows(lm, split, "answer", rows, lambda: run_rows(lm, rows, BATCH))
            b = evaluate_rows(lm, split, "answer", rows, cache.run)
            complete.append(a.seconds)
            cached.append(b.seconds)
            same &= a.scores == b.scores
    slow, fast = median(complete), median(cached)
    return f"{layer:5} {slow:14.3f} {fast:12.3f} {slow / fast:6.1f} {cache.bytes / 1e6:13.2f}  {same}"


def time_pair(lm: laser.LanguageModel, rows: list[TokenSequence], check: PrefixCheck, layer: int) -> str:
    """Return a row: the unchanged and the edited model, the one completely and the other cached, and both cached."""
    separate, shared, same = [], [], True
    for _ in range(REPEATS):
        start = time.perf_counter()
        base = run_rows(lm, rows, BATCH)
        cache = PrefixCache(lm, rows, BATCH, check)
        cache.move_to("", layer)
        with laser.applied(lm, f"{layer}.fc_in@0.1"):
            cache.run()
        separate.append(time.perf_counter() - start)
        start = time.perf_counter()
        cache = PrefixCache(lm, rows, BATCH, check)
        cache.move_to("", layer)
        with laser.applied(lm, f"{layer}.fc_in@0.1"):
            cache.run()
        same &= cache.run() == base
        shared.append(time.perf_counter() - start)
    slow, fast = median(separate), median(shared)
    return f"{layer:5} {slow:14.3f} {fast:12.3f} {slow / fast:6.2f}  {same}"


def main() -> None:
    """Print both tables."""
    lm = laser.load("bundled")
    split = laser.task("worldfacts").validation.limit(QUESTIONS)
    rows = encode(lm, split.examples, "answer")
    start = time.perf_counter()
    check = PrefixCheck(lm, rows)
    print(f"setting up the prefix cache, its checks included: {time.perf_counter() - start:.2f} s")
    blocks = 1 + max(m.layer for m in lm.matrices)
    layers = (0, blocks // 3, 2 * blocks // 3, blocks - 5, blocks - 1)
    cache = PrefixCache(lm, rows, BATCH, check)
    print(f"{'block':>5} {'complete, s':>14} {'cached, s':>12} {'ratio':>6} {'cached, MB':>13}  same scores")
    for layer in layers:
        print(time_candidate(lm, split, rows, cache, layer), flush=True)
    print(f"{'block':>5} {'separate, s':>14} {'shared, s':>12} {'ratio':>6}  same scores")
    for layer in layers:
        print(time_pair(lm, rows, check, layer), flush=True)


if __name__ == "__main__":
    main()
