"""Race the bundled model on every task that a folder of real data sets covers, and print one row for each.

Validation and test are cut to the same number of examples. What the model writes for humaneval is measured without a
race, and only up to so many tokens, which takes minutes.

Run: python benchmarks/tasks.py --data FOLDER [--limit 500] [--only fever,popqa]
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import laserlm as laser
from laserlm.searching import search
from laserlm.tasks import Task, files_in
from laserlm.tasks.definitions import DEFINITIONS

HEAD = "task, scorer|examples|majority|base|best|LASER|gain, points|loss|seconds"


def row(lm: laser.LanguageModel, task: Task) -> str:
    """Return what a race finds, its figures those of the test split."""
    start = time.perf_counter()
    found = search(lm, task, strategy="race")
    seconds = time.perf_counter() - start
    t = found.test
    size = f"{found.validation.n} / {t.n}"
    name = f"{task.name}, {task.test.scorer}"
    if task.test.scorer == "perplexity":
        low, high = t.loss_interval
        change = f"{t.base_loss:.4f} to {t.edited_loss:.4f} ({t.edited_loss - t.base_loss:+.4f} [{low:+.4f}, {high:+.4f}])"
        return "|".join([name, size, "", "", str(found.best), "", "", change, f"{seconds:.0f}"])
    commonest = Counter(e.answer.strip().lower() for e in task.test.examples).most_common(1)[0][1] / t.n
    gain = f"{100 * t.gain:+.1f} [{100 * t.interval.low:+.1f}, {100 * t.interval.high:+.1f}]"
    loss = f"{t.base_loss:.3f} to {t.edited_loss:.3f}"
    figures = [f"{commonest:.1%}", f"{t.base:.1%}", str(found.best), f"{t.edited:.1%}", gain, loss, f"{seconds:.0f}"]
    return "|".join([name, size, *figures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--only", default="")
    parser.add_argument("--program-tokens", type=int, default=256)
    given = parser.parse_args()
    lm = laser.load("bundled")
    names = [n for n, d in DEFINITIONS.items() if n != "humaneval" and (not d.files or files_in(given.data, n))]
    texts = sorted(given.data.glob("*/test.txt"))
    print(HEAD, flush=True)
    for name in given.only.split(",") if given.only else [*names, *(f"perplexity:{f}" for f in texts), "humaneval"]:
        if name == "humaneval":
            how = {"new_tokens": given.program_tokens}
            start = time.perf_counter()
            found = laser.evaluate(lm, laser.task(name, decoding=how, allow_code_execution=True).every)
            seconds = time.perf_counter() - start
            print(f"humaneval, program|{found.n}|||||base only: {found}|{found.loss:.3f}|{seconds:.0f}", flush=True)
            continue
        known = DEFINITIONS.get(name)
        task = laser.task(name, data=given.data if known is not None and known.files else None)
        cut = {part: getattr(task, part).limit(given.limit) for part in ("validation", "test")}
        print(row(lm, replace(task, **cut)), flush=True)


if __name__ == "__main__":
    main()
