"""HotpotQA: questions that need two facts, without the paragraphs.

Source: Yang et al., "HotpotQA: a dataset for diverse, explainable multi-hop question answering", arXiv 1809.09600. Rows
and prompt are those of arXiv 2312.13558.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import Record, field

MAX_ANSWER_TOKENS = 15
"""Length of the longest answer in the published rows, in Llama-2's tokens, start token included."""


def examples(records: Sequence[Record]) -> list[Example]:
    """Return one example for each question.

    Raises:
        TaskError: if a record lacks a field.
    """
    rows: list[Example] = []
    for number, (origin, record) in enumerate(records, start=1):
        question = field(record, "question", str, origin).strip()
        prompt = f"{question if question.endswith(('?', '.')) else question + '?'} The answer is"
        rows.append(
            Example(
                id=str(record.get("_id") or record.get("id") or number),
                prompt=prompt,
                answer=field(record, "answer", str, origin).strip(),
                group=str(record.get("type") or ""),
                masked=f"{prompt} {{mask}}",
            )
        )
    return rows


def join_files(files: Sequence[Sequence[Record]]) -> list[Record]:
    """Return the first rows of the training file, as many as the development file has, and then the development file."""
    if len(files) == 1:
        return list(files[0])
    train, dev = files
    return [*train[: len(dev)], *dev]


def short_answers(examples: Sequence[Example], tokenizer: Any) -> list[Example]:
    """Return the examples with answers of at most ``MAX_ANSWER_TOKENS`` tokens, special tokens included.

    Raises:
        TaskError: if there is none.
    """
    lengths = [len(ids) for ids in tokenizer([e.answer for e in examples]).input_ids]
    short = [e for e, n in zip(examples, lengths, strict=True) if n <= MAX_ANSWER_TOKENS]
    if not short:
        raise TaskError(f"none of {len(examples)} answers has at most {MAX_ANSWER_TOKENS} tokens. Check the tokenizer.")
    return short
