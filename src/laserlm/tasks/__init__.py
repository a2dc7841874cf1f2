"""Tasks by name: examples, and the splits they fall into."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

from laserlm.errors import TaskError
from laserlm.tasks import harness, perplexity, questions
from laserlm.tasks.datasets import hotpotqa, humaneval, worldfacts
from laserlm.tasks.definitions import DEFINITIONS, Definition
from laserlm.tasks.example import Decoding, Example, Phrasings, Scorer, Split, SplitBy, Task, TaskSource
from laserlm.tasks.files import Record, kind_of, local_file, unreadable
from laserlm.tasks.hub import hub_records, user_records

log = logging.getLogger(__name__)

CHAT_TOKENS = 32
"""Tokens that a model may write for a sentence in which it answers."""
FEW = 100
"""Number of facts of a test split below which a warning says how wide intervals are."""
Z = NormalDist().inv_cdf(0.975)

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
    allow_code_execution: bool | Literal["weakly"] = False,
    answer_tokenizer: Any = None,
    columns: Mapping[str, str] | None = None,
    hub: Mapping[str, str] | None = None,
    max_rows: int = questions.MAX_ROWS,
    chat: bool | None = None,
    system: str | None = None,
) -> Task:
    """Make a task by name.

    Args:
        name: a name in ``laserlm.tasks.definitions``, a file of questions (CSV, TSV, JSON, JSON lines or Parquet; of another
            ending, ``jsonl:FILE``), ``hub:ORG/NAME`` for questions of a data set on the hub, ``perplexity:FILE``, or
            ``lm-eval:NAME`` for a task of lm-evaluation-harness.
        data: a file or download URL in the task's original schema, or a folder with such files. For ``lm-eval:NAME``, a
            folder with task definitions. Without it, the data comes with laserlm or from the hub.
        split: ``paper`` (first fifth of the rows for validation) or ``shuffled`` (a fifth of the facts). None takes
            ``paper`` for published tasks and ``shuffled`` for all others.
        seed: seed of the shuffled split.
        phrasings: ``rewrite`` keeps the first phrasing of each fact. ``all`` keeps all phrasings.
        scorer: how an example is scored. None takes the task's default.
        decoding: fields of ``Decoding`` that replace the task's own, such as ``{"new_tokens": 20}``.
        allow_code_execution: whether generated programs may be run, each in a sandbox; ``weakly`` also on a system where
            only the interpreter confines them.
        answer_tokenizer: for ``hotpotqa`` only. Drops answers of more than 15 of its tokens, as published with Llama-2's.
        columns: for a file of questions: the names of its columns, by what they hold (``prompt``, ``answer``, ``choices``,
            ``group``, ``messages``). Other columns are found by their usual names.
        hub: for ``hub:ORG/NAME``: ``split``, ``config`` and ``revision``.
        max_rows: for questions: most rows that are used, drawn at random by ``seed``.
        chat: whether the model's chat template is used. None uses it for the questions of a file, if the model has one;
            texts to be continued, and the tasks of laserlm, are read as they are.
        system: the system text of the conversation; implies ``chat``.

    Raises:
        TaskError: if the task is unknown or its data cannot be used.
        MissingExtraError: if a package that the task needs is not installed.
    """
    if answer_tokenizer is not None and name != "hotpotqa":
        raise TaskError(f"the task {name!r} takes no answer_tokenizer; only hotpotqa does")
    if _is_of_user(name):
        source = _read_questions(name, data, columns or {}, hub or {}, seed, max_rows)
        if chat is not False and any(e.messages for e in source.examples):
            source = replace(source, decoding=replace(source.decoding, new_tokens=CHAT_TOKENS))
    elif columns or hub:
        raise TaskError(f"the task {name!r} takes no columns and no hub options; they are for files of questions and hub:NAME")
    else:
        source = _read_source(name, data, allow_code_execution)
        if (chat or system is not None) and scorer is None and source.scorer in ("answer", "next_token"):
            # In a conversation, a text to be continued is answered by a sentence.
            source = replace(source, scorer="contains", decoding=replace(source.decoding, new_tokens=CHAT_TOKENS))
    if answer_tokenizer is not None:
        source = replace(source, examples=hotpotqa.short_answers(source.examples, answer_tokenizer))
    result = Task.of(
        source.name,
        source.examples,
        scorer=scorer or source.scorer,
        split=split or source.split_by,
        seed=seed,
        phrasings=phrasings,
        source=source.source,
        decoding=_replace_fields(source.decoding, {**(decoding or {}), "run_programs": allow_code_execution}),
        judge=source.judge,
        chat=chat,
        system=system,
        notes=source.notes,
    )
    if _is_of_user(name):
        _warn_of_few(result)
    return result


def _is_of_user(name: str) -> bool:
    """Return whether a task's name means questions of a user: a file, or a data set of the hub."""
    kind, separator, _ = name.partition(":")
    if kind in ("jsonl", "hub"):
        return True
    return bool(kind_of(name)) and (not separator or kind in ("http", "https") or Path(name).is_file())


def _read_questions(
    name: str, data: str | Path | None, columns: Mapping[str, str], hub: Mapping[str, str], seed: int, max_rows: int
) -> TaskSource:
    kind, _, argument = name.partition(":")
    if kind not in ("jsonl", "hub"):
        kind, argument = "questions", name
    if bool(argument) == bool(data):
        return _read_source(name, data, allow_code_execution=False)  # which says what there is
    if kind == "hub":
        if unknown := sorted(hub.keys() - {"split", "config", "revision"}):
            raise TaskError(f"hub has no {unknown[0]!r}; it has split, config and revision")
        path = str(data or argument)
        split, records = user_records(path, **{key: hub.get(key) for key in ("split", "config", "revision")})
        label = f"{path}, split {split}"
        source = questions.source_of(records, f"hub:{path}", label, columns=columns, seed=seed, max_rows=max_rows)
        return replace(source, source=f"questions of {label}", notes=(f"hub:{label}, {len(records):,} rows", *source.notes))
    file = local_file(data or argument)
    records = questions.read_file(file)
    return questions.source_of(records, f"{kind}:{file.stem}", str(file), columns=columns, seed=seed, max_rows=max_rows)


def _warn_of_few(task: Task) -> None:
    """Warn of splits so small that no interval of a gain can be narrow."""
    n = len({e.fact for e in task.test})
    if n < FEW:
        best = Z**2 / (n + Z**2)  # Tango's interval where no question changes
        log.warning(
            "the task %s has %d questions to choose on and %d to measure on: even if none of them changes, the 95 %% "
            "interval of a gain is %+.1f to %+.1f points; give some hundreds",
            *(task.name, len(task.validation), len(task.test), -100 * best, 100 * best),
        )


def _read_source(name: str, data: str | Path | None, allow_code_execution: bool | Literal["weakly"]) -> TaskSource:
    kind, _, argument = name.partition(":")
    if kind == "perplexity" and bool(argument) != bool(data):
        file = local_file(data or argument)
        return TaskSource(f"{kind}:{file.stem}", perplexity.examples(file), f"text of {file.name}", "perplexity")
    if kind == "lm-eval" and argument:
        return harness.read_task(
            argument, None if data is None else Path(data), allow_code_execution=bool(allow_code_execution)
        )
    if name in DEFINITIONS:
        d = DEFINITIONS[name]
        source = worldfacts.source() if name == "worldfacts" else f"{name}, {d.licence}"
        return TaskSource(name, d.examples(_read_tables(name, d, data)), source, d.scorer, d.split, d.decoding)
    if name and data is None and (path := Path(name).expanduser()).exists():
        raise TaskError(f"{unreadable(path)}.")
    with_data = f" with data {str(data)!r}" if data is not None else ""
    raise TaskError(
        f"no task {name!r}{with_data}; there are {', '.join(DEFINITIONS)}, a file of questions such as FILE.csv, hub:ORG/NAME, "
        "perplexity:FILE and lm-eval:NAME. See 'laser tasks'."
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
