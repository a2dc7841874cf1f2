"""CounterFact, in the schema of its publication.

Source: Meng et al., "Locating and Editing Factual Associations in GPT", arXiv 2202.05262. Rows and prompts are in the
order of arXiv 2312.13558: for each record the rewrite prompt with its subject, then the paraphrases. The answer is the
true target.

Three other schemas have one prompt for a record, and here and there a paraphrase: EasyEdit's, that of "known_1000" (Meng et
al.) and that of "counterfact-tracing" on the hub. "multi_counterfact" has the schema of the publication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import Record, field

OTHER_SCHEMAS: tuple[dict[str, str], ...] = (
    {"answer": "ground_truth", "prompt": "prompt", "subject": "subject", "wrong": "target_new"},  # EasyEdit
    {"answer": "attribute", "prompt": "prompt", "subject": "subject", "wrong": "template"},  # known_1000
    {"answer": "target_true", "prompt": "prompt", "subject": "subject", "wrong": "target_false"},  # counterfact-tracing
)
"""The names of the answer, the prompt and the subject, and a further one that tells the schema."""


def is_record(record: Mapping[str, Any]) -> bool:
    """Return whether a record has a schema of CounterFact."""
    return "requested_rewrite" in record or _schema(record) is not None


def _schema(record: Any) -> dict[str, str] | None:
    is_object = isinstance(record, Mapping) and "requested_rewrite" not in record
    return next((s for s in OTHER_SCHEMAS if is_object and set(s.values()) <= record.keys()), None)


def examples(records: Sequence[Record]) -> list[Example]:
    """Return the examples of the records of ``counterfact.json``, or of a file with another schema of the same facts.

    Raises:
        TaskError: if a record lacks a field; the message names both.
    """
    rows: list[Example] = []
    for number, (origin, record) in enumerate(records):
        if (schema := _schema(record)) is not None:
            rows += _of_other_schema(record, schema, number, origin)
            continue
        template = field(record, "requested_rewrite.prompt", str, origin)
        if "{}" not in template:
            raise TaskError(
                f"{origin}: the field 'requested_rewrite.prompt' must hold {{}} for the subject, got {template!r:.60}"
            )
        subject = field(record, "requested_rewrite.subject", str, origin)
        prompts = [template.replace("{}", subject)]
        paraphrases = field(record, "paraphrase_prompts", list, origin)
        if not all(isinstance(p, str) and p.strip() for p in paraphrases):
            raise TaskError(f"{origin}: the field 'paraphrase_prompts' must be a list of texts, got {paraphrases!r:.80}")
        prompts += paraphrases
        answer = field(record, "requested_rewrite.target_true.str", str, origin)
        case = str(field(record, "case_id", int, origin))
        for i, prompt in enumerate(prompts):
            rows.append(
                Example(
                    id=f"{case}/{'rewrite' if i == 0 else f'paraphrase{i}'}",
                    prompt=prompt,
                    answer=answer,
                    group=field(record, "requested_rewrite.relation_id", str, origin),
                    fact=case,
                    subject=subject,
                )
            )
    return rows


def _of_other_schema(record: Mapping[str, Any], schema: Mapping[str, str], number: int, origin: str) -> list[Example]:
    """Return the examples of a record that has its prompt, subject and answer at the top."""
    answer = record[schema["answer"]]
    if isinstance(answer, list) and answer:  # EasyEdit's later files list the true answers
        answer = answer[0][0] if isinstance(answer[0], list) and answer[0] else answer[0]
    answer = field({schema["answer"]: answer}, schema["answer"], str, origin)
    prompts = [field(record, schema["prompt"], str, origin)]
    paraphrase = record.get("rephrase_prompt", record.get("rephrase"))
    prompts += [paraphrase] if isinstance(paraphrase, str) and paraphrase.strip() else []
    case = str(record.get("case_id", record.get("known_id", number)))
    return [
        Example(
            id=f"{case}/{'rewrite' if i == 0 else f'paraphrase{i}'}",
            prompt=prompt,
            answer=answer.strip(),
            group=str(record.get("relation_id") or ""),
            fact=case,
            subject=field(record, schema["subject"], str, origin),
        )
        for i, prompt in enumerate(prompts)
    ]
