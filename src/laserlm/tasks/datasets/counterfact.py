"""CounterFact, in the schema of its publication.

Source: Meng et al., "Locating and Editing Factual Associations in GPT", arXiv 2202.05262. Rows and prompts are in the
order of arXiv 2312.13558: for each record the rewrite prompt with its subject, then the paraphrases. The answer is the
true target.
"""

from __future__ import annotations

from collections.abc import Sequence

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import Record, field

__all__ = ["examples"]


def examples(records: Sequence[Record]) -> list[Example]:
    """Return the examples of the records of ``counterfact.json``.

    Raises:
        TaskError: if a record lacks a field; the message names both.
    """
    rows: list[Example] = []
    for origin, record in records:
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
