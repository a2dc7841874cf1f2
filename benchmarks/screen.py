"""How well the screen ranks: predictions from some questions against changes of loss measured on others.

Every matrix of the last ten blocks at nine sizes is scored on 100 validation questions; the screen takes its gradient over
100 others. Spearman's correlation over all candidates, by the first order alone and with the variance added.
Run: python benchmarks/screen.py [--task counterfact --data FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from scipy import stats

import laserlm as laser
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.scoring.tokenize import encode
from laserlm.searching import expand, search
from laserlm.searching.screen import screen
from laserlm.store import Store

GRID = "top10.all@0.9,0.8,0.6,0.4,0.2,0.1,0.05,0.01,0.005"
N = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="worldfacts")
    parser.add_argument("--data", default="")
    given = parser.parse_args()
    lm = laser.load("bundled")
    task = laser.task(given.task, data=given.data or None)
    scored = replace(task, validation=task.validation.limit(N), test=task.test.limit(10))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "runs.db"
        start = time.perf_counter()
        found = search(lm, scored, strategy="exhaustive", grid=GRID, metric="loss", store=file)
        print(
            f"{given.task}: {found.scored} candidates scored on {N} questions in {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        with Store.open(file) as store:
            losses = {t.intervention: t.loss for t in store.trials(found.run) if t.split == "validation" and t.loss is not None}
    candidates = expand(GRID, lm.matrices)
    cache = DecompositionCache(lm.cache / "decompositions", memory=2**30)
    truth = sorted((t for t in losses if t), key=lambda t: losses[t])
    for first, last in ((N, N + 32), (N, N + 64), (N, 2 * N)):
        examples = task.validation.examples[first:last]
        rows = encode(lm, examples, task.validation.scorer)
        start = time.perf_counter()
        predictions = screen(lm, examples, rows, task.validation.scorer, candidates, cache=cache).predictions
        seconds = time.perf_counter() - start
        both = [t for t in truth if t in predictions]
        measured = [losses[t] for t in both]
        for name, values in (
            ("first order", [predictions[t].change for t in both]),
            ("and variance", [predictions[t].expected for t in both]),
        ):
            order = [t for _, t in sorted(zip(values, both, strict=True))]
            helped = sum(losses[t] < losses[""] for t in order[:48])
            print(
                f"  {last - first:4} questions, {name:13} Spearman {stats.spearmanr(values, measured).statistic:5.2f}; "
                f"the best three by measurement are ranked {[order.index(t) + 1 for t in truth[:3]]}; of the first 48, "
                f"{helped} lower the loss; {seconds:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
