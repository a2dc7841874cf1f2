"""CounterFact, in the schema of its publication.

Source: Meng et al., "Locating and Editing Factual Associations in GPT", arXiv 2202.05262; order of rows and prompts as
in arXiv 2312.13558: for each record the rewrite prompt with its subject, then its paraphrases; the answer is the true
target.
"""

from __future__ import annotations

from collections.abc import Sequence

from laserlm.errors import TaskError
from laserlm.tasks.example import Example
from laserlm.tasks.files import Record, field

__all__ = ["examples"]


def examples(records: Sequence[Record]) -> list[Example]:
    """Make examples of records of ``counterfact.json``.

    Raises:
        TaskError: if a record lacks a field; the record and the field are named.
    """
    rows: list[Example] = []
    for where, record in records:
        template = field(record, "requested_rewrite.prompt", str, where)
        if "{}" not in template:
            raise TaskError(
                f"{where}: the field 'requested_rewrite.prompt' must hold {{}} for the subject, got {template!r:.60}"
            )
        subject = field(record, "requested_rewrite.subject", str, where)
        prompts = [template.replace("{}", subject)]
        paraphrases = field(record, "paraphrase_prompts", list, where)
        if not all(isinstance(p, str) and p.strip() for p in paraphrases):
            raise TaskError(f"{where}: the field 'paraphrase_prompts' must be a list of texts, got {paraphrases!r:.80}")
        prompts += paraphrases
        answer = field(record, "requested_rewrite.target_true.str", str, where)
        case = str(field(record, "case_id", int, where))
        for i, prompt in enumerate(prompts):
            rows.append(
                Example(
                    id=f"{case}/{'rewrite' if i == 0 else f'paraphrase{i}'}",
                    prompt=prompt,
                    answer=answer,
                    group=field(record, "requested_rewrite.relation_id", str, where),
                    fact=case,
                    subject=subject,
                )
            )
    return rows
