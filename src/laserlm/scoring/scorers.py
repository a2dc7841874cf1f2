"""The scorers: one row of ``SCORERS`` says how a scorer tokenises and grades an example. To add a scorer, add a row.

The names are those of ``laserlm.tasks.Scorer``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from laserlm.errors import ScoringError
from laserlm.models.kinds import Kind
from laserlm.scoring.generation_grades import (
    Grade,
    grade_by_judge,
    grade_matches,
    grade_numbers,
    grade_programs,
)
from laserlm.scoring.records import ExampleScore, TokenScores, TokenSequence
from laserlm.scoring.text_grades import (
    Slopes,
    grade_label,
    grade_preference,
    grade_similarity,
    preference_slopes,
    similarity_slopes,
)
from laserlm.tasks.example import Example, Judge, Scorer, Split

Request = tuple[str, str]
"""A context, and the continuation whose tokens are scored."""


@dataclass(frozen=True)
class ScoredExample:
    """An example with the scores of its tokens.

    Args:
        example: the example.
        rows: its token sequences, one or several.
        outcomes: the token scores of each sequence.
        decode: turns token ids into text.
        judge: the split's judge, for tasks of another library.
    """

    example: Example
    rows: Sequence[TokenSequence]
    outcomes: Sequence[TokenScores]
    decode: Callable[[list[int]], str]
    judge: Judge | None

    def is_greedy(self, row: int) -> bool:
        """Return whether the most likely tokens are the targets of a row, all of them."""
        return self.outcomes[row].argmax == list(self.rows[row].targets)

    def is_tied(self, row: int) -> bool:
        """Return whether a token as likely as the most likely one could take its place, up to the first missed target."""
        outcome, targets = self.outcomes[row], self.rows[row].targets
        misses = (i for i, (a, t) in enumerate(zip(outcome.argmax, targets, strict=True)) if a != t)
        return any(outcome.tied[: next(misses, len(targets)) + 1])

    def score(
        self, correct: bool, predicted: str, *, tied: bool, row: int = 0, metrics: dict[str, float] | None = None
    ) -> ExampleScore:
        """Return the score of the example; its log-probability is that of one row."""
        e, logprob = self.example, math.fsum(self.outcomes[row].logprobs)
        tokens = len(self.rows[row].targets)
        answer = e.answer.strip()
        return ExampleScore(e.id, correct, logprob, tokens, predicted.strip(), answer, e.group, metrics or {}, tied, e.fact)

    def text_score(self, correct: bool, text: str, metrics: dict[str, float], *, tied: bool | None = None) -> ExampleScore:
        """Return the score of an example whose answer is a long text; its log-probability is the sum over all rows."""
        e, logprob = self.example, math.fsum(x for outcome in self.outcomes for x in outcome.logprobs)
        tokens = sum(len(row.targets) for row in self.rows)
        # The answer is not stripped: a stripped copy of a long text would take its memory again.
        return ExampleScore(e.id, correct, logprob, tokens, text.strip(), e.answer, e.group, metrics, tied, e.fact)


def _answer_request(e: Example) -> list[Request]:
    return [e.pairs[e.right] if e.pairs else (e.prompt, e.answer)]


def _choice_requests(e: Example) -> list[Request]:
    return [(e.prompt, choice) for choice in e.choices]


def _no_problem(_: Example) -> str:
    return ""


@dataclass(frozen=True)
class ScorerDefinition:
    """How a scorer tokenises and grades an example.

    Args:
        correct_when: when an example counts as correct.
        grade_tokens: grades an example by its token scores; None where the model generates text.
        grade_texts: grades the generated texts of all examples of a split; None where the model generates none.
        requests: returns the contexts and continuations that are tokenised.
        gold_index: returns which request is the answer's, where several requests are compared; None otherwise.
        problem: returns why an example cannot be scored, or an empty text.
        is_short_answer: whether a prompt asks for a short answer or a choice. All other scorers need a causal model, and
            have no calibration.
        is_choice: whether the example's choices are compared.
        scored_tokens: the tokens of a continuation that count: all, the first, or the first in masked models only.
        tokenizes_apart: whether a continuation is tokenised without its context.
        in_windows: whether a long text is read in overlapping windows.
        reads_ranks: whether the ranks of the targets are read.
        truncates: whether a sequence that is too long is cut on the left instead of refused.
        needs_judge: whether the split's judge grades.
        runs_programs: whether generated programs are run. Only these may have several samples.
        kind: the kind of model whose outputs for a text are graded; empty for models that predict tokens.
        slopes: returns, for each row of an example, the derivatives of the loss by the row's outputs, or roots of their
            expected squares. None where the loss is the negative log-probability of the row's targets.
        has_accuracy: whether accuracy is what the scorer is chosen by; otherwise it is the loss.
    """

    correct_when: str
    grade_tokens: Callable[[ScoredExample], ExampleScore] | None = None
    grade_texts: Callable[[Split, Sequence[Sequence[str]]], list[Grade]] | None = None
    requests: Callable[[Example], Sequence[Request]] = _answer_request
    gold_index: Callable[[Example], int] | None = None
    problem: Callable[[Example], str] = _no_problem
    is_short_answer: bool = True
    is_choice: bool = False
    scored_tokens: Literal["all", "first", "first if masked"] = "all"
    tokenizes_apart: bool = False
    in_windows: bool = False
    reads_ranks: bool = False
    truncates: bool = False
    needs_judge: bool = False
    runs_programs: bool = False
    kind: Literal["", "classifier", "reward", "embedding"] = ""
    slopes: Callable[[Example, Sequence[TokenScores], bool], list[Slopes]] | None = None
    has_accuracy: bool = True

    @property
    def generates(self) -> bool:
        """Whether the model generates text, which is graded."""
        return self.grade_texts is not None


def scorer_for(kind: Kind, scorer: Scorer) -> Scorer:
    """Return the scorer by which a kind of model is scored on a task: by labels for a classifier, by rewards for its kind."""
    definition = SCORERS[scorer]
    if kind == "classifier" and definition.is_short_answer and not definition.kind:
        return "label"
    return "preference" if kind == "reward" and definition.is_choice else scorer


def check_split(split: Split, scorer: Scorer) -> None:
    """Raise a ScoringError if a split cannot be graded by a scorer."""
    definition = SCORERS[scorer]
    if definition.runs_programs and not split.decoding.run_programs:
        raise ScoringError(
            f"scoring {split.task} runs programs that the model writes. Allow that with --allow-code-execution "
            "(allow_code_execution=True)."
        )
    if not definition.runs_programs and split.decoding.samples > 1:
        raise ScoringError(
            f"scorer {scorer} grades one text for each example, got {split.decoding.samples} samples. Take several samples of "
            "programs only."
        )
    if definition.needs_judge and split.judge is None:
        raise ScoringError(f"scorer {scorer} needs the task's own judge, and {split.task} has none. Use another scorer.")


def grade_texts(split: Split, scorer: Scorer, texts: Sequence[Sequence[str]]) -> list[Grade]:
    """Grade the texts that a model generated for each example of a split.

    Returns:
        ``contains`` and ``exact_match`` have the metrics ``accuracy_reference`` (the answer occurs in prompt and text, as
        published), ``exact_match``, ``f1`` and ``f1_reference``. ``program`` has ``pass@k`` for each k of 1, 10 and 100 up
        to the number of samples.

    Raises:
        ScoringError: if the scorer generates no text, or running programs is not allowed.
    """
    check_split(split, scorer)
    grade = SCORERS[scorer].grade_texts
    if grade is None:
        raise ScoringError(f"scorer {scorer} grades no generated text. Use one of {', '.join(GENERATING)}.")
    return grade(split, texts)


def _grade_next_token(x: ScoredExample) -> ExampleScore:
    predicted = x.decode(x.outcomes[0].argmax[:1])
    correct = predicted.strip().lower() == x.example.answer.strip().lower()
    return x.score(correct, predicted, tied=x.outcomes[0].tied[0])


def _grade_first_token(x: ScoredExample) -> ExampleScore:
    outcome = x.outcomes[0]
    return x.score(outcome.argmax[0] == x.rows[0].targets[0], x.decode(outcome.argmax[:1]), tied=outcome.tied[0])


def _grade_top(x: ScoredExample, k: int) -> ExampleScore:
    outcome = x.outcomes[0]
    tied = outcome.ranks[0] < k <= outcome.last_ranks[0]
    return x.score(outcome.ranks[0] < k, x.decode(outcome.argmax[:1]), tied=tied)


def _grade_answer(x: ScoredExample) -> ExampleScore:
    argmax = x.outcomes[0].argmax
    hits = [a == t for a, t in zip(argmax, x.rows[0].targets, strict=True)]
    # After its first miss, greedy decoding would have continued from another token.
    greedy = argmax if all(hits) else argmax[: hits.index(False) + 1]
    return x.score(all(hits), x.decode(greedy), tied=x.is_tied(0))


def _grade_choice(x: ScoredExample) -> ExampleScore:
    gold = x.example.choices.index(x.example.answer)
    totals = x.outcomes[0].choice_logprobs or [math.fsum(outcome.logprobs) for outcome in x.outcomes]
    best = max(range(len(totals)), key=totals.__getitem__)
    correct = all(totals[gold] > t for i, t in enumerate(totals) if i != gold)
    tied = totals.count(totals[best]) > 1
    return x.score(correct, x.example.choices[best], tied=tied, row=gold if len(x.rows) > 1 else 0)


def _grade_perplexity(x: ScoredExample) -> ExampleScore:
    rows = range(len(x.rows))
    return x.text_score(all(map(x.is_greedy, rows)), "", {}, tied=any(map(x.is_tied, rows)))


def _grade_requests(x: ScoredExample) -> ExampleScore:
    assert x.judge is not None  # check_split refuses others
    responses = [(math.fsum(outcome.logprobs), x.is_greedy(i)) for i, outcome in enumerate(x.outcomes)]
    correct, metrics = x.judge(x.example, list(responses))
    totals = [total for total, _ in responses]
    best = totals.index(max(totals))
    tied = totals.count(totals[best]) > 1 if len(totals) > 1 else x.is_tied(0)
    return x.score(correct, x.example.pairs[best][1], tied=tied, row=x.example.right, metrics=metrics)


def _choice_problem(e: Example) -> str:
    if len(e.choices) < 2 or e.answer not in e.choices:
        return f"its choices {e.choices} must hold the answer and at least one more"
    return ""


def _similarity_problem(e: Example) -> str:
    try:
        is_score = math.isfinite(float(e.answer))
    except ValueError:
        is_score = False
    return "" if is_score and e.text_pair else "it needs two sentences and the number that says how similar they are"


SCORERS: dict[str, ScorerDefinition] = {
    # Arxiv 2312.13558 scores this way. A masked prompt has one mask there, however many tokens the answer has.
    "next_token": ScorerDefinition(
        "the most likely next token, decoded, is the answer, case and outer spaces aside",
        _grade_next_token,
        scored_tokens="first if masked",
    ),
    "first_token": ScorerDefinition(
        "the most likely next token is the first token of the answer; only that token counts for the loss",
        _grade_first_token,
        scored_tokens="first",
    ),
    "top5": ScorerDefinition(
        "the first token of the answer is among the 5 most likely tokens; only that token counts for the loss",
        partial(_grade_top, k=5),
        scored_tokens="first",
        reads_ranks=True,
    ),
    "top10": ScorerDefinition(
        "the first token of the answer is among the 10 most likely tokens; only that token counts for the loss",
        partial(_grade_top, k=10),
        scored_tokens="first",
        reads_ranks=True,
    ),
    "answer": ScorerDefinition(
        "greedy decoding gives all tokens of the answer; a masked model fills one mask for each token at once", _grade_answer
    ),
    "choice": ScorerDefinition(
        "the answer has a strictly higher log-probability, summed over its tokens, than every other choice",
        _grade_choice,
        requests=_choice_requests,
        gold_index=lambda e: e.choices.index(e.answer),
        problem=_choice_problem,
        is_choice=True,
    ),
    "perplexity": ScorerDefinition(
        "all most likely tokens are those of the text, which is read in overlapping windows; the loss is what counts",
        _grade_perplexity,
        has_accuracy=False,
        is_short_answer=False,
        tokenizes_apart=True,
        in_windows=True,
    ),
    "lm_eval": ScorerDefinition(
        "lm-evaluation-harness says so of the log-probabilities that it asks for",
        _grade_requests,
        requests=lambda e: e.pairs,
        gold_index=lambda e: e.right,
        problem=lambda e: "" if e.pairs else "it has no requests of lm-evaluation-harness",
        is_short_answer=False,
        truncates=True,  # as the harness does
        needs_judge=True,
    ),
    "contains": ScorerDefinition(
        "the answer or an alias occurs in the generated text, case and outer spaces aside",
        grade_texts=partial(grade_matches, correct="contains"),
    ),
    "exact_match": ScorerDefinition(
        "the generated text is the answer or an alias, case and outer spaces aside",
        grade_texts=partial(grade_matches, correct="exact_match"),
    ),
    "number": ScorerDefinition("the last number of the generated text equals the answer", grade_texts=grade_numbers),
    "program": ScorerDefinition(
        "prompt and generated text pass the example's tests",
        grade_texts=grade_programs,
        problem=lambda e: "" if e.program else "it has no tests for a program",
        is_short_answer=False,
        tokenizes_apart=True,
        runs_programs=True,
    ),
    "rollout": ScorerDefinition(
        "the generated moves reach the goal, as the split's judge says",
        grade_texts=grade_by_judge,
        is_short_answer=False,
        needs_judge=True,
    ),
    "lm_eval_text": ScorerDefinition(
        "lm-evaluation-harness says so of the generated text",
        grade_texts=grade_by_judge,
        is_short_answer=False,
        needs_judge=True,
    ),
    "label": ScorerDefinition(
        "the most likely label of a classifier is the answer; the loss is its cross entropy", grade_label, kind="classifier"
    ),
    "preference": ScorerDefinition(
        "the chosen answer has a strictly higher reward than every other; the loss is -log sigmoid of the difference of two",
        grade_preference,
        problem=_choice_problem,
        kind="reward",
        slopes=preference_slopes,
    ),
    "similarity": ScorerDefinition(
        "the cosine of two vectors is within 0.1 of the score; the loss is (cosine - score)^2 / 0.02",
        grade_similarity,
        problem=_similarity_problem,
        kind="embedding",
        slopes=similarity_slopes,
        has_accuracy=False,
    ),
}
"""Every scorer by its name."""
GENERATING = tuple(name for name, definition in SCORERS.items() if definition.generates)
"""Scorers that grade generated text. Their loss is that of the right answer."""
