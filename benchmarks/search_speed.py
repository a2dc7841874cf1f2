"""Time a search beside the published procedure on the bundled model, whole grid of every matrix at nine sizes.

The published procedure is a fresh process for each configuration: it loads the model, replaces one matrix by
``svd_lowrank`` and runs every validation example by itself. Ten configurations drawn from the grid are timed and
multiplied out. The race and the exhaustive search are timed whole, each in a fresh process, imports and loading included;
only the test split is cut to ten rows, since the procedure beside it has none. ``cold`` has no decomposition on disk.

Run: python benchmarks/search_speed.py [--task counterfact --data FILE] [--examples 300] [--exhaustive]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import laserlm as laser
from laserlm.models.bundled import converted
from laserlm.paths import cache_folder
from laserlm.searching import expand
from laserlm.tasks import Task

GRID = "all.all@0.9,0.8,0.6,0.4,0.2,0.1,0.05,0.01,0.005"
REFERENCE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, path, rank, file = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
weight = model.get_parameter(path).data
U, S, V = torch.svd_lowrank(weight.float(), q=max(1, int(rank)), niter=2)
weight.copy_((U * S) @ V.T)
hits, losses = 0, 0.0
with torch.no_grad():
    for prompt, answer in json.load(open(file)):
        before = tokenizer(prompt).input_ids
        whole = tokenizer(prompt + " " + answer).input_ids
        targets = torch.tensor(whole[len(before):])
        logprobs = model(torch.tensor([whole])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        hits += bool((logprobs.argmax(-1) == targets).all())
        losses -= float(logprobs.gather(-1, targets[:, None]).mean())
"""
OURS = """
import json, sys
from dataclasses import replace
import laserlm as laser

name, data, examples, strategy, grid, cache, metric, store, seed = sys.argv[1:]
lm = laser.load("bundled", cache=cache)
task = laser.task(name, data=data or None)
task = replace(task, validation=task.validation.limit(int(examples)), test=task.test.limit(10))
found = laser.search(lm, task, strategy=strategy, grid=grid, metric=metric, store=store, seed=int(seed))
print(json.dumps(found.as_dict()))
"""


def peak() -> float:
    """Return the best rate of a float32 matrix product of the model's shapes, in operations a second."""
    from laserlm.scoring.kernels import fast_cpu_kernels

    x, w = torch.randn(430, 576), torch.randn(1536, 576)
    times = []
    with fast_cpu_kernels(torch.device("cpu"), 16), torch.no_grad():
        for _ in range(200):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - start)
    return 2 * x.shape[0] * w.numel() / statistics.median(times)


def reference(task: Task, lm: laser.LanguageModel, configurations: int, scratch: Path) -> list[float]:
    """Return the seconds of some configurations, drawn from the grid, each in a process of its own."""
    candidates = random.Random(0).sample(expand(GRID, lm.matrices), configurations)
    file = scratch / "examples.json"
    file.write_text(json.dumps([(e.prompt, e.answer) for e in task.validation]))
    seconds = []
    for candidate in candidates:
        size = candidate.intervention.reductions[0].size
        rank = int(float(size.rho or 0) * candidate.matrix.max_rank)
        folder = converted(cache_folder())
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", REFERENCE, str(folder), candidate.matrix.path, str(rank), str(file)], check=True)
        seconds.append(time.perf_counter() - start)
        print(f"  reference {candidate.intervention}: {seconds[-1]:.1f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="worldfacts")
    parser.add_argument("--data", default="")
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--configurations", type=int, default=10)
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--exhaustive", action="store_true", help="time the exhaustive search too (about an hour)")
    parser.add_argument("--store", default="", help="keep the results in this database")
    given = parser.parse_args()
    lm = laser.load("bundled")
    task = laser.task(given.task, data=given.data or None)
    validation = task.validation.limit(given.examples)
    task = Task(task.name, validation, task.test, task.every)
    grid = len(expand(GRID, lm.matrices))
    print(
        f"{given.task}, {len(validation)} examples, {grid} candidates, float32 products {peak() / 1e9:.0f} GFLOP/s", flush=True
    )
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        one = reference(task, lm, given.configurations, scratch)
        published = statistics.median(one) * grid
        print(f"reference: median {statistics.median(one):.1f} s of {len(one)}, times {grid}: {published / 3600:.1f} h")
        runs = [("race, cold", "race"), ("race, warm", "race"), ("race, warm", "race")]
        runs += [("exhaustive", "exhaustive")] if given.exhaustive else []
        cache = scratch / "cache"
        cache.mkdir()
        (cache / "models").symlink_to(converted(cache_folder()).parent)
        for i, (label, strategy) in enumerate(runs):
            store = given.store if given.store and strategy == "exhaustive" else str(scratch / f"{i}.db")
            arguments = [
                given.task,
                given.data,
                str(given.examples),
                strategy,
                GRID,
                str(cache),
                given.metric,
                store,
                given.seed,
            ]
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", OURS, *arguments], check=True, stdout=subprocess.PIPE, text=True)
            seconds = time.perf_counter() - start
            found = json.loads(done.stdout)
            v = found["validation"]
            print(
                f"{label}: {seconds:.1f} s, {published / seconds:.0f} times less than the reference; best {found['best']}, "
                f"{v['base']:.1%} to {v['best']:.1%}, loss {v['base_loss']:.3f} to {v['best_loss']:.3f}; scored "
                f"{found['scored']} of {found['candidates']}; boundary {found['boundary_bytes'] / 1e6:.1f} MB",
                flush=True,
            )
            if found["screened"]:
                s = found["screened"]
                print(f"  screen {s['seconds']:.1f} s, correlation {s['correlation']}, controls ahead {s['controls_ahead']}")
                print(
                    "  rungs: " + "; ".join(f"{r['examples']}: {r['entered']} in, {r['leader']} leads" for r in found["rungs"])
                )


if __name__ == "__main__":
    main()
