"""Tasks of BIG-bench: epistemic reasoning, questions from Wikidata, causal judgement.

Source: Srivastava et al., "Beyond the imitation game", arXiv 2206.04615. A ``task.json`` has the examples, and the texts
before and after each example. The copies on the hub have the complete prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import Record, field, json_document, read_records


def records(file: Path) -> list[Record]:
    """Read a ``task.json`` as rows in the schema of the hub. Read any other file unchanged.

    Raises:
        TaskError: if it cannot be read, or a record lacks a field.
    """
    document = json_document(file) if file.name.endswith((".json", ".json.gz")) else None
    if not isinstance(document, dict):
        return read_records(file)
    # These are the defaults of BIG-bench's definition of the format.
    before = document.get("task_prefix", "") + document.get("example_input_prefix", "\nQ: ")
    after = document.get("example_output_prefix", "\nA: ")
    rows: list[Record] = []
    for number, example in enumerate(field(document, "examples", list, str(file)), start=1):
        origin = f"{file}, example {number}"
        scores = example.get("target_scores") if isinstance(example, dict) else None
        row: dict[str, Any] = {"inputs": f"{before}{field(example, 'input', str, origin)}{after}"}
        if scores is None:
            if "target" not in example:
                raise TaskError(f"{origin}: the field 'target' is missing")
            target = example["target"]
            row["targets"] = target if isinstance(target, list) else [target]
        else:
            scores = field(example, "target_scores", dict, origin)
            row |= {"multiple_choice_targets": list(scores), "multiple_choice_scores": list(scores.values())}
        rows.append((origin, row))
    return rows


def questions(records: Sequence[Record]) -> list[Example]:
    """Return one example for each question that has exactly one answer.

    Raises:
        TaskError: if a record lacks a field.
    """
    rows: list[Example] = []
    for number, (origin, record) in enumerate(records, start=1):
        targets = field(record, "targets", list, origin)
        if not all(isinstance(t, str) and t.strip() for t in targets):
            raise TaskError(f"{origin}: the field 'targets' must be a list of texts, got {targets!r:.80}")
        if len(targets) == 1:
            prompt = field(record, "inputs", str, origin).strip()
            rows.append(Example(id=str(number), prompt=prompt, answer=targets[0].strip(), masked=f"{prompt} {{mask}}"))
    return rows


def choices(labels: tuple[str, ...], records: Sequence[Record]) -> list[Example]:
    """Return one example for each question with choices.

    Args:
        labels: all choices, in their order.
        records: the rows.

    Raises:
        TaskError: if a record lacks a field, has other choices, or does not have exactly one right choice.
    """
    rows: list[Example] = []
    for number, (origin, record) in enumerate(records, start=1):
        targets = field(record, "multiple_choice_targets", list, origin)
        scores = field(record, "multiple_choice_scores", list, origin)
        if set(targets) != set(labels) or len(targets) != len(scores):
            raise TaskError(f"{origin}: the choices must be {', '.join(labels)}, one score each, got {targets!r:.80}")
        correct = [c for c, score in zip(targets, scores, strict=True) if score == 1]
        if len(correct) != 1:
            raise TaskError(f"{origin}: exactly one choice must have the score 1, got {scores!r:.60}")
        prompt = field(record, "inputs", str, origin).strip()
        rows.append(Example(id=str(number), prompt=prompt, answer=correct[0], choices=labels, masked=f"{prompt} {{mask}}"))
    return rows
