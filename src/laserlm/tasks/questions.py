"""A user's own questions, from a table or a list of records. Columns are found by their usual names."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from laserlm.errors import TaskError
from laserlm.tasks import pairs
from laserlm.tasks.cells import MISSING, check_text, literal_of, number_as_text, popularity_of, texts_of, unless_nan
from laserlm.tasks.choices import CHOICE_COLUMN, Choices, Reading, reading_of
from laserlm.tasks.conversation import conversation_of
from laserlm.tasks.datasets import counterfact
from laserlm.tasks.example import Example, TaskSource
from laserlm.tasks.files import Record, json_document, json_lines, kind_of, read_records, read_text, table_records
from laserlm.tasks.files import field as value_at
from laserlm.tasks.rows import place_in_file, read_rows

MAX_ROWS = 20_000
"""Most rows that are used, by default."""
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "input", "query", "problem", "text", "sentence", "sentence1", "premise"),
    "answer": (
        *("answer", "answers", "output", "target", "label", "response", "completion", "ground_truth", "solution"),
        *("answer_key", "expected", "correct_answer", "correct", "correct_option", "correct_choice", "best_answer"),
        *("gold", "expected_answer", "expected_output", "reference", "answer_idx", "answer_index"),
    ),
    "choices": ("choices", "options"),
    "group": ("group", "category", "relation"),
    "messages": ("messages", "conversations", "conversation"),
    "aliases": ("aliases",),
    "text_pair": ("text_pair", "sentence2", "hypothesis"),
    "joint": ("joint",),
    "id": ("id",),
    "fact": ("fact",),
    "subject": ("subject",),
    "popularity": ("popularity",),
}
"""What an example needs, and the column names that mean it, the usual one first; case, spaces, - and _ do not count."""
TABLES = (".csv", ".tsv")
RESEMBLANCE = 0.83
"""Smallest ratio of equal letters at which an unknown column is taken for a misspelt one."""
UNSPACED_SCRIPTS = ("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")


def read_file(file: Path) -> list[Record]:
    """Read the rows of a user's file. Files without a known ending are read as JSON lines.

    Raises:
        TaskError: if it cannot be read, or holds no rows.
    """
    kind = kind_of(file) or ".jsonl"
    if kind in TABLES:
        records = _full_rows(table_records(file, read_text(file), strict=True))
    elif kind == ".parquet":
        records = [(origin, {name: unless_nan(value) for name, value in row.items()}) for origin, row in read_records(file)]
    else:  # by content, because arrays and lines are often named alike
        start = read_text(file).lstrip()[:1]
        if start == "[" or (kind == ".json" and not _is_lines(file)):
            records = [(f"{file}, record {i}", row) for i, row in enumerate(_rows(file, json_document(file)), start=1)]
        else:
            records = [(f"{file}, line {number}", row) for number, row in json_lines(file)]
    if not records:
        raise TaskError(
            f"{file} has no questions. Write one JSON object with 'prompt' and 'answer' on each line, or a CSV file with these "
            "columns."
        )
    return records


def _is_lines(file: Path) -> bool:
    """Return whether a file holds one object on each line."""
    first, _, rest = read_text(file).lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except json.JSONDecodeError:
        return False


def _rows(file: Path, document: Any) -> list[Any]:
    """Return the records of a JSON document: a list, an object around one, or the columns that pandas writes."""
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        columns = list(document.values())
        if len(lists) == 1:
            document = lists[0]
        elif columns and all(isinstance(c, dict) and c.keys() == columns[0].keys() for c in columns):
            document = [{name: column[i] for name, column in document.items()} for i in columns[0]]
        elif len(lists) > 1:
            names = ", ".join(repr(name) for name, value in document.items() if value in lists)
            raise TaskError(f"{file} holds several lists of records: {names}. Write one of them to a file of its own.")
    if not isinstance(document, list):
        raise TaskError(f"{file} holds no list of records. Write a list of objects with 'prompt' and 'answer'.")
    return document


def _full_rows(records: list[Record]) -> list[Record]:
    """Return the rows of a table without those of which all cells are empty."""
    for origin, row in records:
        if None in row:
            raise TaskError(f"{origin}: more cells than the header has columns. Put texts with commas in double quotes.")
    return [(origin, row) for origin, row in records if any(value.strip() for value in row.values())]


def source_of(
    records: Sequence[Record], name: str, file: str, *, columns: Mapping[str, str], seed: int = 0, max_rows: int = MAX_ROWS
) -> TaskSource:
    """Return the questions of a user's records.

    Args:
        records: the rows.
        name: the task's name.
        file: what the rows come from, for messages.
        columns: columns that are named by the user, by what they hold (``prompt``, ``answer``, ``choices``, ``group``).
        seed: seed of the sample that is taken of more rows than ``max_rows``.
        max_rows: most rows that are used.

    Raises:
        TaskError: if rows cannot be used; the message names the first of them.
    """
    first = records[0][1]
    if not columns and isinstance(first, dict) and counterfact.is_record(first):
        examples = counterfact.examples(records)
        note = f"{file} has a schema of CounterFact: read as the task counterfact, scored by next_token"
        return TaskSource(name, examples, f"questions of {Path(file).name}", "next_token", "paper", notes=(note,))
    notes: list[str] = []
    if len(records) > max_rows:
        notes.append(
            f"{file} has {len(records):,} rows: a random sample of {max_rows:,} is used (seed {seed}); --max-rows takes more"
        )
        records = [records[i] for i in sorted(random.Random(seed).sample(range(len(records)), max_rows))]
    if not columns and (pairs_source := pairs.source_of(records, name, file)) is not None:
        return replace(pairs_source, notes=(*notes, *pairs_source.notes))
    reader = _Reader.of(records, file, columns)
    examples = reader.examples(records)
    notes += [reader.note(), *reader.remarks()]
    return TaskSource(
        name,
        examples,
        f"questions of {Path(file).name}",
        "choice" if examples[0].choices else "answer",
        notes=tuple(filter(None, notes)),
    )


def examples(file: Path) -> list[Example]:
    """Return the questions of a file.

    Raises:
        TaskError: if a row cannot be used; the message names the row.
    """
    return list(source_of(read_file(file), file.stem, str(file), columns={}).examples)


@dataclass(frozen=True)
class _Reader:
    """Makes examples of rows: ``columns`` says where each field is, ``choice_columns`` hold one choice each.

    ``reading`` is what answers mean where there are choices. ``seen`` counts what a user should know of the values.
    """

    file: str
    columns: Mapping[str, str]
    choice_columns: tuple[str, ...]
    more_text: str
    left_aside: tuple[str, ...]
    reading: Reading = "text"
    reading_note: str = ""
    seen: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, records: Sequence[Record], file: str, named: Mapping[str, str]) -> _Reader:
        """Find the columns of a file.

        Raises:
            TaskError: if a named column is not there, a column's name is misspelt, or no column holds questions.
        """
        present = dict.fromkeys(str(name) for _, row in records if isinstance(row, dict) for name in row)
        if unknown := [kind for kind in named if kind not in COLUMNS]:
            raise TaskError(f"no kind of column {unknown[0]!r}; there are {', '.join(COLUMNS)}")
        for kind, name in named.items():
            if name not in present:
                raise TaskError(f"{file} has no column {name!r} for the {kind}; it has {', '.join(present)}")
        usual = {kind: _column(names, present, set(named.values())) for kind, names in COLUMNS.items()}
        columns = {kind: name for kind, name in usual.items() if name is not None} | dict(named)
        choices = () if "choices" in columns else tuple(n for n in present if CHOICE_COLUMN.fullmatch(n))
        choices = choices if len(choices) > 1 else ()
        # Instructions may have a text that they are about, as Alpaca's have.
        more = "input" if columns.get("prompt") == "instruction" and "input" in present else ""
        used = {*columns.values(), *choices, more}
        left = tuple(name for name in present if name not in used)
        for name in left:
            known = [other for kind, names in COLUMNS.items() if kind not in columns for other in names]
            close = get_close_matches(name.lower(), known, 1, RESEMBLANCE)
            if close and close[0] not in name.lower():
                raise TaskError(f"{file} has an unknown field {name!r}. Did you mean {close[0]!r}? Rename it or take it out.")
        for kind, what in (("prompt", "questions"), ("answer", "answers")):
            if kind not in columns and "messages" not in columns:
                raise TaskError(
                    f"{file} has no column of {what}; it has {', '.join(present) or 'none'}. Name one with --{kind}-column "
                    f"(columns={{{kind!r}: ...}}), or call it {' or '.join(map(repr, COLUMNS[kind][:4]))}"
                    + (" in the first line" if kind_of(file) in TABLES else "")
                )
        reader = cls(file, columns, choices, more, left)
        rows = [(row, reader.choices(row)) for _, row in records if isinstance(row, dict)]
        with_choices = [(reader.answer_of(row), choices) for row, choices in rows if choices is not None]
        reading, note = reading_of(with_choices) if with_choices else ("text", "")
        return replace(reader, reading=reading, reading_note=note, seen=Counter())  # which counts each row once

    def note(self) -> str:
        """Return which columns are read, in one sentence, unless all of them have the names of the fields."""
        renamed = [f"{kind} from {name!r}" for kind, name in self.columns.items()]
        renamed += [f"choices from {', '.join(map(repr, self.choice_columns))}"] if self.choice_columns else []
        if all(kind == name for kind, name in self.columns.items()) and not (self.choice_columns or self.left_aside):
            return ""
        left = f"; not used: {', '.join(map(repr, self.left_aside))}" if self.left_aside else ""
        more = f" and {self.more_text!r}" if self.more_text else ""
        return f"{self.file}: " + ", ".join(r + more if r.startswith("prompt ") else r for r in renamed) + left

    def remarks(self) -> list[str]:
        """Return how values were read that could be read otherwise, one sentence each."""
        counted = [f"{what} (rows: {count:,})" for what, count in self.seen.items()]
        return [f"{self.file}: {remark}" for remark in (self.reading_note, *counted) if remark]

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """Return the examples of all rows.

        Raises:
            TaskError: if rows cannot be used; the message counts them and shows the first.
        """
        first: list[Example] = []

        def read(row: Any, origin: str) -> Example:
            e = self.example(row, origin)
            if first and bool(e.choices) != bool(first[0].choices):
                raise TaskError(f"{origin}: some rows have 'choices' and some have not. Put them in two files.")
            first.append(e)
            return e

        return self._asked(read_rows(records, self.file, read))

    def example(self, row: Any, origin: str) -> Example:
        """Return the example of one row."""
        if not isinstance(row, dict):
            raise TaskError(f"{origin}: an object is needed, got {row!r:.60}")
        values = self._values(row)
        messages = self._conversation(values, origin)
        if self.more_text and row.get(self.more_text):
            values["prompt"] = f"{values['prompt']}\n\n{row[self.more_text]}"
        self._unpack_answers(values)
        choices, answer = self._chosen(row, values, origin)
        joint = values.get("joint")
        prompt = value_at(self._named(values, "prompt", origin), self.name_of("prompt"), str, origin)
        self._remark(answer, prompt, bool(choices))
        if joint is None:
            joint = "" if _is_unspaced(prompt.rstrip()[-1]) else " "
        if not isinstance(joint, str):
            raise TaskError(f"{origin}: the field 'joint' must be a text, which may be empty, got {joint!r:.60}")
        return Example(
            id=str(values.get("id", place_in_file(origin))),
            prompt=prompt,
            answer=answer,
            choices=choices,
            group=str(values.get("group", "")),
            fact=str(values.get("fact", "")),
            popularity=popularity_of(values.get("popularity"), origin),
            aliases=texts_of(values, "aliases", origin),
            joint=joint,
            subject=str(values.get("subject", "")),
            messages=messages,
            text_pair=value_at(self._named(values, "text_pair", origin), self.name_of("text_pair"), str, origin)
            if "text_pair" in values
            else "",
        )

    def answer_of(self, row: Mapping[str, Any]) -> Any:
        """Return the answer of a row, also from a conversation or a list; None where the row cannot be read."""
        values = self._values(row)
        with suppress(TaskError):
            conversation_of(values, "")
            self._unpack_answers(values)
        return values.get("answer")

    def _values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a row by what they hold, without empty ones."""
        empty = (None, "") if kind_of(self.file) in TABLES else (None,)
        values = {kind: row[name] for kind, name in self.columns.items() if name in row}
        return {k: v for k, v in values.items() if v not in empty or k in ("prompt", "answer")}

    def choices(self, row: Mapping[str, Any]) -> Choices | None:
        """Return the choices of a row, or None if it has none."""
        if self.choice_columns:
            return Choices.of_columns(row, self.choice_columns)
        value = row.get(self.columns["choices"]) if "choices" in self.columns else None
        if value is None or (value == "" and kind_of(self.file) in TABLES):
            return None
        return Choices.of_value(value, is_table=kind_of(self.file) in (*TABLES, ".parquet"))

    def _chosen(self, row: Mapping[str, Any], values: Mapping[str, Any], origin: str) -> tuple[tuple[str, ...], str]:
        """Return the choices of a row, and its answer, which is one of them if there are any."""
        answer: str = value_at(self._named(values, "answer", origin), self.name_of("answer"), str, origin)
        found = self.choices(row)
        if found is None:
            return (), answer
        texts = texts_of({"choices": found.texts}, "choices", origin, different=True)
        meant = found.meant(answer, self.reading)
        if meant is None or len(texts) < 2:
            raise TaskError(
                f"{origin}: 'choices' must hold the answer {answer!r} and one more at least, got {texts!r:.80}"
                + (f"; in this file {self.reading_note}" if self.reading != "text" else "")
            )
        return texts, meant

    def _conversation(self, values: dict[str, Any], origin: str) -> tuple[tuple[str, str], ...]:
        """Return the conversation of a row, and count what follows its answer."""
        messages, unread = conversation_of(values, origin)
        if unread:
            self.seen["conversations go on after the last message of the assistant; what follows it is not read"] += 1
        return messages

    def name_of(self, kind: str) -> str:
        """Return the name of a column by what it holds."""
        return self.columns.get(kind, kind)

    def _named(self, values: Mapping[str, Any], kind: str, origin: str) -> dict[str, Any]:
        """Return a value under the name of its column, for messages."""
        if kind not in values:
            return {}
        value, name = values[kind], self.name_of(kind)
        check_text(value, name, origin)
        if isinstance(value, float) and value.is_integer():
            self.seen[f"numbers in {name!r} are written without '.0'"] += 1
        return {name: number_as_text(value)}

    def _unpack_answers(self, values: dict[str, Any]) -> None:
        """Put the first of several right answers in the place of the answer, and the others among the aliases."""
        answer = values.get("answer")
        if isinstance(answer, str) and kind_of(self.file) in TABLES:
            listed = literal_of(answer)
            answer = listed if isinstance(listed, list) and all(isinstance(a, str) for a in listed) else answer
        if isinstance(answer, dict):  # as SQuAD's and TriviaQA's
            answer = answer.get("text") or [answer.get("value"), *(answer.get("aliases") or ())]
        if isinstance(answer, list):
            answer = [number_as_text(a) for a in answer]
        if not (isinstance(answer, list) and answer and all(isinstance(a, str) for a in answer)):
            return
        values["answer"], *others = dict.fromkeys(answer)
        if others and "aliases" not in values:
            values["aliases"] = others
        elif others:
            self.seen["lists of answers are read up to their first text, because there are aliases"] += 1
        self.seen["answers are lists: the first text is the answer, the others are aliases"] += 1

    def _remark(self, answer: str, prompt: str, has_choices: bool) -> None:
        """Count values that look like something else."""
        if MISSING.fullmatch(prompt.strip()) or (not has_choices and MISSING.fullmatch(answer.strip())):
            self.seen["cells such as 'NaN' or 'None' are read as texts; leave a cell empty where a value is missing"] += 1

    def _asked(self, examples: list[Example]) -> list[Example]:
        """Return the examples, with a conversation for each if they are questions, not texts to be continued."""
        if any(e.messages for e in examples):
            return [e if e.messages else _ask(e) for e in examples]
        ends = sum(e.prompt.rstrip()[-1] in ".?!。？！؟…" for e in examples)
        is_question = self.columns.get("prompt", "prompt") != "prompt" or 2 * ends > len(examples)
        return [_ask(e) for e in examples] if is_question else examples


def _ask(e: Example) -> Example:
    return replace(e, messages=(("user", e.prompt),))


def _column(usual: Sequence[str], present: Mapping[str, Any], taken: set[str]) -> str | None:
    """Return the first of the usual names that a column has."""
    by_name = {_plain(name): name for name in reversed(list(present)) if name not in taken}
    return next((by_name[_plain(name)] for name in usual if _plain(name) in by_name), None)


def _plain(name: str) -> str:
    """Return the name of a column in small letters, without what separates its words."""
    return re.sub(r"[\s_-]", "", name).lower()


def _is_unspaced(character: str) -> bool:
    """Return whether a character belongs to a script that writes no spaces between words."""
    name = unicodedata.name(character, "")
    if name.startswith(UNSPACED_SCRIPTS) or "KATAKANA" in name:
        return True
    is_wide = unicodedata.east_asian_width(character) in "WF" and unicodedata.category(character)[0] in "LPN"
    return is_wide and "HANGUL" not in name
