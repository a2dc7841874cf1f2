"""Grades of texts that a model generated."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from laserlm.errors import ScoringError
from laserlm.scoring.sandbox import Program, run_programs
from laserlm.tasks.example import Example, Split

Grade = tuple[bool, dict[str, float]]
"""Whether a generated text is correct, and extra metrics by name."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
WORD = re.compile(r"\w+|[^\w\s]")
FUNCTION = re.compile(r"^def (\w+)", re.MULTILINE)


def _match_answers(e: Example, text: str) -> dict[str, float]:
    """Return how a text compares with an example's answer and aliases, case and outer spaces aside."""
    answers = [_normalized(a) for a in (e.answer, *e.aliases)]
    generated, full = _normalized(text), _normalized(e.prompt + text)
    f1_pairs = [f1(generated, a) for a in answers]
    return {
        "contains": float(any(a in generated for a in answers)),
        "accuracy_reference": float(any(a in full for a in answers)),
        "exact_match": float(generated in answers),
        "f1": max(ours for ours, _ in f1_pairs),
        "f1_reference": max(reference for _, reference in f1_pairs),
    }


def grade_matches(split: Split, texts: Sequence[Sequence[str]], correct: Literal["contains", "exact_match"]) -> list[Grade]:
    """Grade the first text of each example by its answer and aliases: ``contains`` one, or ``exact_match``."""
    matches = [_match_answers(e, text[0]) for e, text in zip(split.examples, texts, strict=True)]
    return [(match[correct] == 1, {name: x for name, x in match.items() if name != "contains"}) for match in matches]


def grade_numbers(split: Split, texts: Sequence[Sequence[str]]) -> list[Grade]:
    """Grade the last number of each first text by the answer."""
    return [(_is_equal(last_number(text[0]), e.answer), {}) for e, text in zip(split.examples, texts, strict=True)]


def grade_programs(split: Split, texts: Sequence[Sequence[str]]) -> list[Grade]:
    """Grade each text as the end of a program, by running the example's tests on it."""
    programs = [
        Program(e.prompt + text, _tested_function(e), e.prompt + e.answer, e.program)
        for e, samples in zip(split.examples, texts, strict=True)
        for text in samples
    ]
    allow_weak = split.decoding.run_programs == "weakly"
    passes = iter([not failure for failure in run_programs(programs, allow_weak=allow_weak)])
    grades: list[Grade] = []
    for samples in texts:
        passed = [next(passes) for _ in samples]
        n = len(passed)
        grades.append((passed[0], {f"pass@{k}": pass_at_k(n, sum(passed), k) for k in (1, 10, 100) if k <= n}))
    return grades


def _tested_function(example: Example) -> str:
    """Return the name of the function that the program completes: the last one that the prompt begins."""
    names = FUNCTION.findall(example.prompt)
    if not names:
        raise ScoringError(f"the prompt of example {example.id} begins no function ('def NAME(...):'), so none can be tested.")
    return str(names[-1])


def grade_by_judge(split: Split, texts: Sequence[Sequence[str]]) -> list[Grade]:
    """Grade the first text of each example by the split's judge."""
    assert split.judge is not None  # check_split refuses others
    return [split.judge(e, [text[0]]) for e, text in zip(split.examples, texts, strict=True)]


def _normalized(text: str) -> str:
    return text.strip().lower()


def _is_equal(number: str, answer: str) -> bool:
    try:
        return float(number) == float(answer.replace(",", ""))
    except ValueError:
        return number == answer.strip()


def f1(text: str, answer: str) -> tuple[float, float]:
    """Return the F1 of the sets of words and punctuation marks of two texts, and the F1 that the reference computes.

    With precision p over the text's words and recall r over the answer's words, F1 is 2 p r / (p + r). The reference
    divides by max(1, p + r), so its value is lower where p + r < 1.
    """
    words, wanted = set(WORD.findall(text)), set(WORD.findall(answer))
    common = len(words & wanted)
    if not common:
        return 0.0, 0.0
    p, r = common / len(words), common / len(wanted)
    return 2 * p * r / (p + r), 2 * p * r / max(1, p + r)


def last_number(text: str) -> str:
    """Return the last number of a text without thousands separators; an empty text if it has no number."""
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else ""


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate, from n samples, that one of k passes: 1 - C(n - c, k) / C(n, k).

    Raises:
        ScoringError: unless 1 <= k <= n and 0 <= correct <= n.

    Source: Chen et al., arXiv 2107.03374, section 2.1.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ScoringError(f"pass@{k} cannot be estimated from {correct} of {n} samples. Take {k} samples or more.")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)
