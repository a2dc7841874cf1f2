"""Time complete `laser search` commands and the published procedure in one run, and print the ratio of their times.

The published procedure starts a process for each configuration, which loads the model, replaces one matrix by
``svd_lowrank`` and runs every validation question by itself. A few configurations are timed on a part of the questions: the
seconds up to the first question, and the seconds per question. Their medians are multiplied out. The search is one command
with the test split and the harm, which the published procedure does not measure. ``cold`` has no decomposition, no text of
the model and no score of the unchanged model in its cache. ``warm`` has the first two, and ``again`` has all three.

Run: python benchmarks/search_speed.py [--task counterfact --data FILE] [--strategy components] [--warm 2] [--exhaustive]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import laserlm as laser
from laserlm.models.bundled import converted
from laserlm.paths import cache_folder
from laserlm.searching import expand
from laserlm.tasks import Task

GRID = "all.all@0.9,0.8,0.6,0.4,0.2,0.1,0.05,0.01,0.005"
"""The published grid: each matrix at nine sizes."""
CONFIGURATION = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, path, rank, file = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
weight = model.get_parameter(path).data
U, S, V = torch.svd_lowrank(weight.float(), q=max(1, int(rank)), niter=2)
weight.copy_((U * S) @ V.T)
start = time.perf_counter()
n = 0
with torch.no_grad():
    for prompt, answer in json.load(open(file)):
        before = tokenizer(prompt).input_ids
        ids = tokenizer(prompt + " " + answer).input_ids
        model(torch.tensor([ids])).logits[0, len(before) - 1 : -1].log_softmax(-1).argmax(-1)
        n += 1
print(json.dumps([time.perf_counter() - start, n]))
"""


def time_configurations(lm: laser.LanguageModel, task: Task, count: int, questions: int, scratch: Path) -> tuple[float, float]:
    """Return the median seconds up to the first question, and per question, of some configurations of the published grid."""
    file = scratch / "questions.json"
    file.write_text(json.dumps([(e.prompt, e.answer) for e in task.validation.limit(questions)]))
    before, each = [], []
    for candidate in random.Random(0).sample(expand(GRID, lm.matrices), count):
        (reduction,) = candidate.intervention.reductions
        rank = int(float(reduction.size.rho or 0) * candidate.matrix.max_rank)
        arguments = [str(converted(cache_folder())), candidate.matrix.path, str(rank), str(file)]
        start = time.perf_counter()
        output = subprocess.run([sys.executable, "-c", CONFIGURATION, *arguments], check=True, capture_output=True).stdout
        total = time.perf_counter() - start
        seconds, n = json.loads(output)
        before.append(total - seconds)
        each.append(seconds / n)
    return median(before), median(each)


def time_search(options: list[str], cache: Path, store: Path) -> tuple[float, dict[str, Any]]:
    """Return the seconds of one `laser search` command, and what it prints."""
    command = [sys.executable, "-m", "laserlm", "search", "bundled", *options]
    start = time.perf_counter()
    output = subprocess.run(
        [*command, "--store", str(store), "--cache", str(cache), "--json"], check=True, stdout=subprocess.PIPE
    ).stdout
    seconds = time.perf_counter() - start
    result: dict[str, Any] = json.loads(output)
    return seconds, result


def main() -> None:
    """Time both, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="worldfacts")
    parser.add_argument("--data", help="file of the task")
    parser.add_argument("--strategy", default="race")
    parser.add_argument("--metric", default="accuracy")
    parser.add_argument("--configurations", type=int, default=5, help="configurations of the published procedure to time")
    parser.add_argument("--questions", type=int, default=60, help="questions that each of them is timed on")
    parser.add_argument("--warm", type=int, default=2, help="warm searches")
    parser.add_argument("--limit", type=int, help="most questions of each split, for a short trial")
    parser.add_argument(
        "--exhaustive", action="store_true", help="time an exhaustive search of the published grid too (an hour)"
    )
    arguments = parser.parse_args()
    lm, task = laser.load("bundled"), laser.task(arguments.task, data=arguments.data)
    n, grid = len(task.validation.limit(arguments.limit)), len(expand(GRID, lm.matrices))
    options = ["--task", arguments.task, "--metric", arguments.metric]
    options += [] if arguments.limit is None else ["--limit", str(arguments.limit)]
    options += [] if arguments.data is None else ["--data", arguments.data]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        before, each = time_configurations(lm, task, arguments.configurations, arguments.questions, scratch)
        published = grid * (before + n * each)
        print(f"published: {grid} x ({before:.1f} s + {n} x {each:.4f} s) = {published:,.0f} s", flush=True)
        cache = scratch / "cache"
        cache.mkdir()
        (cache / "models").symlink_to(converted(cache_folder()).parent)
        searches = [(f"{arguments.strategy}, cold", ["--strategy", arguments.strategy])]
        searches += [(f"{arguments.strategy}, warm", ["--strategy", arguments.strategy])] * arguments.warm
        searches += [(f"{arguments.strategy}, again", ["--strategy", arguments.strategy])]
        searches += [("exhaustive", ["--strategy", "exhaustive", "--grid", GRID])] if arguments.exhaustive else []
        for i, (label, more) in enumerate(searches):
            if not label.endswith("again"):
                shutil.rmtree(cache / "scores", ignore_errors=True)
            seconds, result = time_search([*options, *more], cache, scratch / f"{i}.db")
            phases = ", ".join(f"{phase} {s:.1f}" for phase, s in result["phases"].items())
            test = result["test"]
            print(
                f"{label}: {seconds:.1f} s, {published / seconds:,.0f} times less; best {result['best']}, "
                f"accuracy on test {test['base']:.1%} to {test['best']:.1%}, loss {test['base_loss']:.3f} to "
                f"{test['best_loss']:.3f}; seconds: {phases}",
                flush=True,
            )


if __name__ == "__main__":
    main()
