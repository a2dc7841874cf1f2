"""Tasks of lm-evaluation-harness, scored with the harness's own requests and metrics."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy

from laserlm.errors import MissingExtraError, TaskError
from laserlm.tasks.example import Decoding, Example, Judge, TaskSource

METRICS = ("acc", "exact_match", "em", "pass@1", "acc_norm")
"""Metrics that can say whether an example is correct. The first one that a task has is used."""


def read_task(name: str, folder: Path | None = None, *, allow_code_execution: bool = False) -> TaskSource:
    """Read a task by its name.

    Args:
        name: name of a task, not of a group of tasks.
        folder: a folder with further task definitions.
        allow_code_execution: whether the task may run generated programs, which the harness does without a sandbox.

    Raises:
        MissingExtraError: if the harness is not installed.
        TaskError: if there is no such task, it is a group, its documents cannot be read, or it runs generated programs and
            that is not allowed.
    """
    task = _load(name, folder)
    if not allow_code_execution and (getattr(task, "UNSAFE_CODE", False) or task.config.unsafe_code):
        raise TaskError(
            f"the task {name!r} of lm-evaluation-harness runs generated programs, which the harness does not confine. Allow "
            "that with --allow-code-execution (allow_code_execution=True)."
        )
    instances = sorted(task.instances, key=lambda instance: (instance.doc_id, instance.idx))
    documents = [list(group) for _, group in groupby(instances, key=lambda instance: instance.doc_id)]
    name, source = f"lm-eval:{name}", f"lm-evaluation-harness, {task.config.dataset_path}"
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        texts = [Example(id=str(group[0].doc_id), prompt="", answer=str(group[0].args[0])) for group in documents]
        return TaskSource(name, texts, source, "perplexity")
    examples = [_example(task, group) for group in documents]
    judge = _judge(task, {e.id: group[0].doc for e, group in zip(examples, documents, strict=True)})
    if task.OUTPUT_TYPE == "generate_until":
        decoding = _decoding(task.config.generation_kwargs or {})
        return TaskSource(name, examples, source, "lm_eval_text", decoding=decoding, judge=judge)
    return TaskSource(name, examples, source, "lm_eval", judge=judge)


def _load(name: str, folder: Path | None) -> Any:
    """Return the harness's task with its requests built."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("tasks of lm-evaluation-harness need its package: pip install 'laserlm[eval]'") from error
    if folder is not None and not folder.expanduser().is_dir():
        raise TaskError(f"no folder {str(folder)!r} of task definitions. Give one with --data (data=...).")
    include_path = None if folder is None else str(folder.expanduser())
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if include_path is None or name not in manager.all_tasks:  # reading the harness's own thousands takes many seconds
        manager = TaskManager(include_path=include_path)
    if name not in manager.all_tasks:
        raise TaskError(f"lm-evaluation-harness has no task {name!r}. See 'lm_eval ls tasks', or give a folder with --data.")
    if name not in manager.all_subtasks:
        raise TaskError(f"{name!r} is a group of tasks of lm-evaluation-harness. Give one of its tasks.")
    with _harness_errors(name):
        (task,) = manager.load(name)["tasks"].values()
        task.set_fewshot_seed(1234)  # as the harness's own command does
        task.build_all_requests()
    return task


@contextmanager
def _harness_errors(name: str) -> Iterator[None]:
    """Seed as the harness does, hide its progress bars, and raise its errors as a TaskError."""
    states = random.getstate(), numpy.random.get_state()
    random.seed(0)
    numpy.random.seed(1234)
    try:
        with redirect_stderr(StringIO()):
            yield
    except Exception as error:
        raise TaskError(f"lm-evaluation-harness cannot make its task {name!r}: {type(error).__name__}: {error}") from error
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _example(task: Any, instances: Sequence[Any]) -> Example:
    """Return the example of one document and its requests."""
    first = instances[0]
    target = task.doc_to_target(first.doc)
    if task.OUTPUT_TYPE == "generate_until":
        if isinstance(target, int) and task.config.doc_to_choice is not None:
            target = task.doc_to_choice(first.doc)[target]
        answers = [str(t) for t in target] if isinstance(target, list) and target else [str(target)]
        prompt = str(first.args[0])
        pair = _move_space(prompt, ("" if prompt[-1:].isspace() else " ") + (answers[0].strip() or "?"))
        return Example(id=str(first.doc_id), prompt=prompt, answer=answers[0], aliases=tuple(answers[1:]), pairs=(pair,))
    pairs = tuple(_move_space(*instance.args[:2]) for instance in instances)
    right = target[0] if isinstance(target, list) and target else target
    if task.OUTPUT_TYPE == "loglikelihood":
        right = 0
    elif task.multiple_input:
        right = task.doc_to_text(first.doc)
    elif isinstance(right, str):
        choices = list(task.doc_to_choice(first.doc))
        right = choices.index(right) if right in choices else 0
    right = int(right) if 0 <= int(right) < len(pairs) else 0
    return Example(id=str(first.doc_id), prompt=pairs[right][0], answer=pairs[right][1].strip(), pairs=pairs, right=right)


def _move_space(context: str, continuation: str) -> tuple[str, str]:
    """Return a request whose white space between the parts is in the second part, where the harness tokenises it."""
    cut = len(context.rstrip())
    return context[:cut], context[cut:] + continuation


def _decoding(arguments: dict[str, Any]) -> Decoding:
    until = arguments.get("until") or []
    return Decoding(
        new_tokens=int(arguments.get("max_gen_toks") or arguments.get("max_new_tokens") or 256),
        stops=(until,) if isinstance(until, str) else tuple(until),
    )


def _judge(task: Any, docs: dict[str, Any]) -> Judge:
    """Return a function that grades one document's results by the harness's own filters and metrics."""
    # Other metrics, such as the harness's perplexity, are no means over documents.
    means = {name for name, f in task.aggregation().items() if getattr(f, "__name__", "") == "mean"}

    def judge(e: Example, results: list[Any]) -> tuple[bool, dict[str, float]]:
        doc = docs[e.id]
        metrics: dict[str, float] = {}
        for ensemble in task._filters:
            filtered = [[r] for r in results]
            for f in ensemble.filters:
                filtered = list(f().apply(filtered, [doc] * len(filtered)))
            values = task.process_results(doc, filtered)
            label = "" if ensemble.name == "none" else f",{ensemble.name}"
            metrics |= {
                f"{name}{label}": float(v) for name, v in values.items() if name in means and isinstance(v, int | float)
            }
        for metric in METRICS:
            for name, value in metrics.items():
                if name.partition(",")[0] == metric and value in (0, 1):
                    return value == 1, metrics
        raise TaskError(
            f"the task {task.config.task} has no metric that is 0 or 1 for document {e.id} ({metrics or 'none'}), so no "
            "example can be graded. Score it with 'laser lm-eval'."
        )

    return judge
