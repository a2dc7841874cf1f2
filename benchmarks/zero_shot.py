"""Compare models on three tasks of choices in lm-evaluation-harness, without examples in the prompt and without a network.

The tasks are made from local files: CounterFact (the true or another object ends a statement), FEVER (whether a claim is true)
and TruthfulQA (which of several answers is true, mc1). The first model is the base; differences to it are paired.

Run: LASER_DATA=DIR OMP_NUM_THREADS=1 python benchmarks/zero_shot.py bundled FOLDER FILE.gguf [--limit 400,400,120]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from laserlm.scoring.harness_model import LaserLM

Question = dict[str, Any]
"""A question with its choices and the index of the right one (label)."""


def counterfact(folder: Path) -> list[Question]:
    """Return statements, each with the true object and another one."""
    records = json.loads((folder / "counterfact" / "counterfact_500.json").read_text(encoding="utf-8"))
    rewrites = [record["requested_rewrite"] for record in records]
    return [
        {
            "question": r["prompt"].format(r["subject"]),
            "choices": [r["target_true"]["str"].strip(), r["target_new"]["str"].strip()],
            "label": 0,
        }
        for r in rewrites
    ]


def fever(folder: Path) -> list[Question]:
    """Return claims that are supported or refuted."""
    lines = (folder / "fever" / "paper_dev.jsonl").read_text(encoding="utf-8").splitlines()
    labels = {"SUPPORTS": 0, "REFUTES": 1}
    return [
        {"question": f"Claim: {r['claim']}\nTrue or false? Answer:", "choices": ["True", "False"], "label": labels[r["label"]]}
        for r in map(json.loads, lines)
        if r["label"] in labels
    ]


def truthfulqa(folder: Path) -> list[Question]:
    """Return questions with one true answer (mc1)."""
    records = json.loads((folder / "truthfulqa" / "mc_task.json").read_text(encoding="utf-8"))
    targets = [r["mc1_targets"] for r in records]
    return [
        {"question": f"Q: {r['question']}\nA:", "choices": list(t), "label": list(t.values()).index(1)}
        for r, t in zip(records, targets, strict=True)
    ]


TASKS: dict[str, Callable[[Path], list[Question]]] = {"counterfact": counterfact, "fever": fever, "truthfulqa_mc1": truthfulqa}


def shuffled(question: Question, seed: object) -> Question:
    """Return a question with its choices in an order by seed, so that equal scores of all choices do not count as right."""
    order = list(range(len(question["choices"])))
    random.Random(str(seed)).shuffle(order)
    choices = [question["choices"][i] for i in order]
    return question | {"choices": choices, "label": order.index(question["label"])}


def harness_config(name: str, questions: list[Question], file: Path) -> dict[str, Any]:
    """Write questions into a file, and return the harness's configuration of the task."""
    file.write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    return {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc"}],
    }


def correct_by_task(name: str, configs: list[dict[str, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Return whether a model is right on each document, by task."""
    results = simple_evaluate(model=LaserLM(name, batch_size=8), tasks=configs, task_manager=TaskManager(), bootstrap_iters=0)
    samples = results["samples"]
    return {
        task: np.array([s["acc"] for s in sorted(of_task, key=lambda s: s["doc_id"])], dtype=float)
        for task, of_task in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="names, folders or GGUF files; the first is the base")
    parser.add_argument("--limit", default="400,400,120", help="questions of each task, drawn with one seed")
    arguments = parser.parse_args()
    data = Path(os.environ["LASER_DATA"])
    with tempfile.TemporaryDirectory() as temporary:
        configs = []
        for limit, (name, read) in zip(map(int, arguments.limit.split(",")), TASKS.items(), strict=True):
            questions = read(data)
            drawn = [shuffled(q, i) for i, q in enumerate(random.Random(0).sample(questions, min(limit, len(questions))))]
            configs.append(harness_config(name, drawn, Path(temporary) / f"{name}.jsonl"))
        base: dict[str, np.ndarray[Any, Any]] = {}
        for model in arguments.models:
            scores = correct_by_task(model, configs)
            base = base or scores
            row = [Path(model).name]
            for task, correct in scores.items():
                n, difference = len(correct), correct - base[task]
                errors = [x.std(ddof=1) / np.sqrt(n) for x in (correct, difference)]
                row.append(f"{correct.mean():.1%} ({errors[0]:.1%}), {difference.mean():+.1%} ({errors[1]:.1%})")
            print("|".join(row), flush=True)


if __name__ == "__main__":
    main()
