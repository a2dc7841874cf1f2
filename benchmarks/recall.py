"""Hold the race against an exhaustive search: does it choose as well, and what did it never look at?

The exhaustive search scores the whole grid on the same validation examples once; the race is run with several seeds, which
change the order of the examples, the screen's part of them and the controls. Both winners are measured on the same test
rows. The exhaustive search takes most of an hour for 300 examples; its database is kept and used again.

Run: python benchmarks/recall.py --store FILE.db [--task counterfact --data FILE] [--examples 300] [--seeds 3]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import get_args

import laserlm as laser
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.searching import Metric, search
from laserlm.store import Store

SIZES = "0.9,0.8,0.6,0.4,0.2,0.1,0.05,0.01,0.005"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="worldfacts")
    parser.add_argument("--data", default="")
    parser.add_argument("--layers", default="all", help="blocks whose matrices are searched, such as top10")
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--store", required=True)
    given = parser.parse_args()
    lm = laser.load("bundled")
    grid = f"{given.layers}.all@{SIZES}"
    task = laser.task(given.task, data=given.data or None)
    short = replace(task, validation=task.validation.limit(given.examples), test=task.test.limit(10))
    whole = search(lm, short, strategy="exhaustive", grid=grid, metric="loss", store=given.store)
    with Store.open(given.store) as store:
        texts = [t.intervention for t in store.trials(whole.run) if t.split == "validation" and t.status == "done"]
        every = {text: store.evaluation(whole.run, "validation", text) for text in texts}
    scores = {text: e for text, e in every.items() if e is not None}
    base = scores[""]
    for metric in get_args(Metric):
        ranked = sorted(scores, key=lambda t: (-scores[t].accuracy, scores[t].loss) if metric == "accuracy" else scores[t].loss)
        best = scores[ranked[0]]
        print(f"{given.task}, {base.n} examples, by {metric}; unchanged {base.accuracy:.1%}, loss {base.loss:.3f}")
        print(f"  exhaustive: {best.intervention} {best.accuracy:.1%}, loss {best.loss:.3f}; top ten {', '.join(ranked[:10])}")
        for seed in range(given.seeds):
            task_ = replace(short, test=task.test.limit(given.test))
            found = search(lm, task_, strategy="race", grid=grid, metric=metric, seed=seed)
            chosen = scores[str(found.best)]
            if metric == "accuracy":
                pairs = [(a.correct, b.correct) for a, b in by_id(best, chosen)]
                behind = sum(a - b for a, b in pairs) / best.n
                error = math.sqrt(best.accuracy * (1 - best.accuracy) / best.n)
            else:
                differences = [b.loss - a.loss for a, b in by_id(best, chosen)]
                behind = sum(differences) / best.n
                spread = [a.loss for a in best.scores]
                mean = sum(spread) / best.n
                error = math.sqrt(sum((x - mean) ** 2 for x in spread) / (best.n - 1) / best.n)
            entered = set(found.screened.expected) if found.screened else set()
            recall = [sum(t in entered for t in ranked[:k]) for k in (10, 50)]
            print(
                f"  seed {seed}: {found.best or 'unchanged'} ({1 + ranked.index(str(found.best))} of {len(ranked)}), behind "
                f"{behind:.4f} = {behind / error:.2f} standard errors; of the best 10 and 50 the screen sent {recall}; "
                f"test {found.test.base:.1%} to {found.test.edited:.1%}, loss {found.test.base_loss:.3f} to "
                f"{found.test.edited_loss:.3f}; {found.seconds:.0f} s",
                flush=True,
            )
        with laser.applied(lm, ranked[0]):
            tested = laser.evaluate(lm, task.test.limit(given.test))
        print(f"  exhaustive's winner on test: {tested.accuracy:.1%}, loss {tested.loss:.3f}", flush=True)


def by_id(a: Evaluation, b: Evaluation) -> list[tuple[ExampleScore, ExampleScore]]:
    """Return the scores of two evaluations in pairs, whatever their order."""
    other = {s.id: s for s in b.scores}
    return [(s, other[s.id]) for s in a.scores]


if __name__ == "__main__":
    main()
