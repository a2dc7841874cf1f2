"""Tasks by name: examples, and the splits they fall into."""

from __future__ import annotations

from pathlib import Path

from laserlm.errors import TaskError
from laserlm.tasks import counterfact, jsonl, worldfacts
from laserlm.tasks.example import Example, Phrasings, Scorer, Split, SplitBy, Task
from laserlm.tasks.files import local_file

__all__ = ["Example", "Phrasings", "Scorer", "Split", "SplitBy", "Task", "task"]

COUNTERFACT_URL = "https://rome.baulab.info/data/dsets/counterfact.json"


def task(
    name: str,
    *,
    data: str | Path | None = None,
    split: SplitBy | None = None,
    seed: int = 0,
    phrasings: Phrasings = "all",
    scorer: Scorer | None = None,
) -> Task:
    """Make a task by name.

    Args:
        name: ``worldfacts``, ``counterfact`` or ``jsonl:FILE``.
        data: file or download URL in the task's original schema, where the task needs one.
        split: ``paper`` (first fifth of the rows for validation) or ``shuffled`` (a fifth of the facts); None takes
            ``paper`` for published tasks and ``shuffled`` for all others.
        seed: of the shuffled split.
        phrasings: ``rewrite`` keeps the first phrasing of each fact, ``all`` keeps them all.
        scorer: how an example is scored; None takes the task's own.

    Raises:
        TaskError: if the task is unknown or its data cannot be used.
    """
    kind, _, file = name.partition(":")
    own: Scorer = "answer"
    by: SplitBy = "shuffled"
    if kind == "jsonl" and bool(file) != bool(data):
        path = local_file(data or file)
        rows = jsonl.examples(path)
        name, source = f"jsonl:{path.stem}", f"questions of {path.name}"
        own = "choice" if rows[0].choices else "answer"
    elif name == "counterfact":
        if data is None:
            raise TaskError(
                f"the task 'counterfact' needs its file: --data counterfact.json (data=...), as at {COUNTERFACT_URL}"
            )
        rows, source = counterfact.examples(local_file(data)), counterfact.SOURCE
        own, by = "next_token", "paper"
    elif name == "worldfacts" and data is None:
        rows, source = worldfacts.examples(), worldfacts.source()
    else:
        given = f" with data {str(data)!r}" if data is not None else ""
        raise TaskError(f"no task {name!r}{given}; there are worldfacts, counterfact (with data) and jsonl:FILE")
    return Task.of(name, rows, scorer=scorer or own, split=split or by, seed=seed, phrasings=phrasings, source=source)
