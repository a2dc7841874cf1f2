"""Tasks by name: examples, and the splits they fall into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from laserlm.errors import TaskError
from laserlm.tasks import harness, jsonl, perplexity
from laserlm.tasks.datasets import hotpotqa, humaneval, worldfacts
from laserlm.tasks.definitions import DEFINITIONS, Definition
from laserlm.tasks.example import Decoding, Example, Phrasings, Scorer, Split, SplitBy, Task, TaskSource
from laserlm.tasks.files import Record, local_file
from laserlm.tasks.hub import hub_records

__all__ = ["Decoding", "Example", "Phrasings", "Scorer", "Split", "SplitBy", "Task", "files_in", "task"]


def task(
    name: str,
    *,
    data: str | Path | None = None,
    split: SplitBy | None = None,
    seed: int = 0,
    phrasings: Phrasings = "all",
    scorer: Scorer | None = None,
    decoding: Mapping[str, Any] | None = None,
    allow_code_execution: bool = False,
    answer_tokenizer: Any = None,
) -> Task:
    """Make a task by name.

    Args:
        name: a name in ``laserlm.tasks.definitions``, ``jsonl:FILE``, ``perplexity:FILE``, or ``lm-eval:NAME`` for a task of
            lm-evaluation-harness.
        data: a file or download URL in the task's original schema, or a folder with such files. For ``lm-eval:NAME``, a
            folder with task definitions. Without it, the data comes with laserlm or from the hub.
        split: ``paper`` (first fifth of the rows for validation) or ``shuffled`` (a fifth of the facts). None takes
            ``paper`` for published tasks and ``shuffled`` for all others.
        seed: seed of the shuffled split.
        phrasings: ``rewrite`` keeps the first phrasing of each fact. ``all`` keeps all phrasings.
        scorer: how an example is scored. None takes the task's default.
        decoding: fields of ``Decoding`` that replace the task's own, such as ``{"new_tokens": 20}``.
        allow_code_execution: whether generated programs may be run, each in a sandbox.
        answer_tokenizer: for ``hotpotqa`` only. Drops answers of more than 15 of its tokens, as published with Llama-2's.

    Raises:
        TaskError: if the task is unknown or its data cannot be used.
        MissingExtraError: if a package that the task needs is not installed.
    """
    if answer_tokenizer is not None and name != "hotpotqa":
        raise TaskError(f"the task {name!r} takes no answer_tokenizer; only hotpotqa does")
    source = _read_source(name, data, allow_code_execution)
    if answer_tokenizer is not None:
        source = replace(source, examples=hotpotqa.short_answers(source.examples, answer_tokenizer))
    return Task.of(
        source.name,
        source.examples,
        scorer=scorer or source.scorer,
        split=split or source.split_by,
        seed=seed,
        phrasings=phrasings,
        source=source.source,
        decoding=_replace_fields(source.decoding, {**(decoding or {}), "run_programs": allow_code_execution}),
        judge=source.judge,
    )


def _read_source(name: str, data: str | Path | None, allow_code_execution: bool) -> TaskSource:
    kind, _, argument = name.partition(":")
    if kind in ("jsonl", "perplexity") and bool(argument) != bool(data):
        file = local_file(data or argument)
        if kind == "perplexity":
            return TaskSource(f"{kind}:{file.stem}", perplexity.examples(file), f"text of {file.name}", "perplexity")
        examples = jsonl.examples(file)
        scorer: Scorer = "choice" if examples[0].choices else "answer"
        return TaskSource(f"{kind}:{file.stem}", examples, f"questions of {file.name}", scorer)
    if kind == "lm-eval" and argument:
        return harness.read_task(argument, None if data is None else Path(data), allow_code_execution=allow_code_execution)
    if name in DEFINITIONS:
        d = DEFINITIONS[name]
        source = worldfacts.source() if name == "worldfacts" else f"{name}, {d.licence}"
        return TaskSource(name, d.examples(_read_tables(name, d, data)), source, d.scorer, d.split, d.decoding)
    with_data = f" with data {str(data)!r}" if data is not None else ""
    raise TaskError(
        f"no task {name!r}{with_data}; there are {', '.join(DEFINITIONS)}, jsonl:FILE, perplexity:FILE and lm-eval:NAME. See "
        "'laser tasks'."
    )


def _replace_fields(decoding: Decoding, values: dict[str, Any]) -> Decoding:
    known = {f.name for f in fields(Decoding)}
    if unknown := values.keys() - known:
        raise TaskError(f"decoding has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return replace(decoding, **values)


def files_in(folder: Path, name: str, *, allow_top_level: bool = True) -> list[Path]:
    """Return the data files of a task in a folder, in the order in which they are read.

    Args:
        folder: a folder of one data set or of several.
        name: the task's name.
        allow_top_level: whether the files may lie in the folder itself, not only in a folder of the data set's name.

    Raises:
        TaskError: if several files match one pattern.
    """
    definition = DEFINITIONS[name]
    for candidate in (*(folder / f for f in definition.folders), *([folder] if allow_top_level else [])):
        matches = [sorted({f for p in pattern.split("|") for f in candidate.glob(p)}) for pattern in definition.files]
        for pattern, files in zip(definition.files, matches, strict=True):
            if len(files) > 1:
                names = ", ".join(f.name for f in files)
                raise TaskError(f"{candidate} has several files {pattern} for {name}: {names}. Give one of them.")
        if any(matches):
            return [file for files in matches for file in files]
    return []


def _read_tables(name: str, definition: Definition, data: str | Path | None) -> list[list[Record]]:
    """Return the rows of a task, file by file."""
    if definition.hub is None and not definition.files:
        if data is not None:
            raise TaskError(f"the task {name!r} comes with laserlm and takes no data, got {str(data)!r}")
        return []
    if data is not None and Path(data).expanduser().is_dir():
        folder = Path(data).expanduser()
        files = files_in(folder, name)
        if not files:
            folders = ", ".join((".", *definition.folders))
            raise TaskError(f"{folder} has no file of {name}; put {' or '.join(definition.files)} into one of {folders}")
        return [definition.records(file) for file in files]
    if data is None and name == "humaneval" and (packaged := humaneval.packaged()) is not None:
        data = packaged
    if data is None and definition.hub is not None:
        return hub_records(definition.hub)
    return [definition.records(local_file(data or definition.url))]
