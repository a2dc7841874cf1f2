"""Tell whether what a model wrote is right."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from laserlm.errors import ScoringError
from laserlm.scoring.sandbox import run_programs
from laserlm.tasks.example import Example, Scorer, Split

__all__ = ["Judged", "check_graded", "f1", "grade", "last_number", "pass_at_k"]

Judged = tuple[bool, dict[str, float]]
"""Whether it is right, and other figures on it."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
WORD = re.compile(r"\w+|[^\w\s]")


def grade(split: Split, scorer: Scorer, texts: Sequence[Sequence[str]]) -> list[Judged]:
    """Judge what a model wrote for each example of a split, under one of the ``GENERATING`` scorers.

    Args:
        split: the examples.
        scorer: ``contains``: the answer, or one of its aliases, occurs in the text, case and outer spaces aside.
            ``exact_match``: it is the text. ``number``: the last number of the text equals it. ``program``: prompt and text
            pass the example's tests. ``rollout`` and ``lm_eval_text``: the split's own judge says so.
        texts: of each example, in order; only programs may have several.

    Returns:
        Of ``contains`` and ``exact_match`` also ``accuracy_reference`` (the answer occurs in prompt and text, as published),
        ``exact_match``, ``f1`` and ``f1_reference``; of ``program`` also ``pass@k`` for k of 1, 10 and 100 as far as there
        are samples.

    Raises:
        ScoringError: if programs would have to be run and that was not allowed.
    """
    check_graded(split, scorer)
    if scorer == "program":
        return _programs(split, texts)
    pairs = list(zip(split.examples, (t[0] for t in texts), strict=True))
    if scorer in ("rollout", "lm_eval_text") and split.judge is not None:
        return [split.judge(e, [text]) for e, text in pairs]
    if scorer == "number":
        return [(_equal(last_number(text), e.answer), {}) for e, text in pairs]
    return [_compared(e, text, scorer) for e, text in pairs]


def check_graded(split: Split, scorer: Scorer) -> None:
    """Raise a ScoringError unless what a model writes for a split can be judged in this way."""
    if scorer == "program" and not split.decoding.run_programs:
        raise ScoringError(
            f"scoring {split.task} runs programs that the model writes; allow that with --allow-code-execution "
            "(allow_code_execution=True)"
        )
    if scorer != "program" and split.decoding.samples > 1:
        raise ScoringError(f"{scorer} judges one text for each example; take several samples of programs only")
    if scorer in ("rollout", "lm_eval", "lm_eval_text") and split.judge is None:
        raise ScoringError(f"the task {split.task} has no judge of its own; use another scorer")


def _compared(e: Example, text: str, scorer: Scorer) -> Judged:
    answers = [_plain(a) for a in (e.answer, *e.aliases)]
    written, whole = _plain(text), _plain(e.prompt + text)
    within = any(a in written for a in answers)
    exact = written in answers
    both = [f1(written, a) for a in answers]
    figures = {
        "accuracy_reference": float(any(a in whole for a in answers)),
        "exact_match": float(exact),
        "f1": max(right for right, _ in both),
        "f1_reference": max(reference for _, reference in both),
    }
    return exact if scorer == "exact_match" else within, figures


def _plain(text: str) -> str:
    return text.strip().lower()


def f1(text: str, answer: str) -> tuple[float, float]:
    """Return the F1 of the sets of words and punctuation marks of two texts, and the same as the reference computes it.

    With precision p, over the text's words, and recall r, over the answer's, F1 is 2 p r / (p + r). The reference divides
    by max(1, p + r), which is less where p + r < 1.
    """
    words, wanted = set(WORD.findall(text)), set(WORD.findall(answer))
    common = len(words & wanted)
    if not common:
        return 0.0, 0.0
    p, r = common / len(words), common / len(wanted)
    return 2 * p * r / (p + r), 2 * p * r / max(1, p + r)


def last_number(text: str) -> str:
    """Return the last number of a text without separators of thousands, empty where it has none."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else ""


def _equal(number: str, answer: str) -> bool:
    try:
        return float(number) == float(answer.replace(",", ""))
    except ValueError:
        return number == answer.strip()


def _programs(split: Split, texts: Sequence[Sequence[str]]) -> list[Judged]:
    programs = [f"{e.prompt}{text}\n{e.program}" for e, of in zip(split.examples, texts, strict=True) for text in of]
    passed = iter([not failure for failure in run_programs(programs)])
    judged: list[Judged] = []
    for of in texts:
        here = [next(passed) for _ in of]
        judged.append((here[0], {f"pass@{k}": pass_at_k(len(here), sum(here), k) for k in (1, 10, 100) if k <= len(here)}))
    return judged


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate, from n samples, of the probability that one of k passes: 1 - C(n - c, k) / C(n, k).

    Raises:
        ScoringError: unless 1 <= k <= n and 0 <= correct <= n.

    Source: Chen et al., arXiv 2107.03374, section 2.1.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ScoringError(f"pass@{k} cannot be told from {correct} of {n} samples; take {k} or more")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)
