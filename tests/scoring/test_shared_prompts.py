"""Continuations of one prompt in one row of the model's inputs, against a row for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import CAUSAL, UNUSUAL
from searching.support import CORE

from laserlm.edit import applied
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate, evaluate_rows
from laserlm.scoring.forward import batches, run_rows
from laserlm.scoring.prefix_cache import PrefixCache
from laserlm.scoring.records import TokenScores, TokenSequence
from laserlm.scoring.shared_prompts import can_be_joined, groups_with_one_prompt
from laserlm.scoring.tokenize import encode
from laserlm.tasks import Example, Split

Make = Callable[..., LanguageModel]
CHOICES = [
    ("The capital of France is", ("Paris", "a big city in Italy", "Rome or Madrid")),
    ("Oslo is the capital of Norway, which is a country, and Lisbon is", ("a city", "the capital of Portugal")),
    ("Rome is", ("a city in Italy", "Madrid", "the capital of Spain", "true")),
]
EXAMPLES = tuple(Example(str(i), prompt, choices[0], choices) for i, (prompt, choices) in enumerate(CHOICES))
SPLIT = Split("example", "all", EXAMPLES, "choice")
SEPARATE = ["bloom"]
"""Causal models without positions among their inputs, whose continuations have rows of their own."""
JOINED = [pytest.param(f, marks=[] if f in CORE else [pytest.mark.slow]) for f in CAUSAL if f not in SEPARATE]


def alone(lm: LanguageModel, rows: Sequence[TokenSequence]) -> list[list[float]]:
    """Return the log-probabilities of the targets of each row, from a pass of its own, computed by hand."""
    with torch.no_grad():
        logits = [lm.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0] for row in rows]
    return [of.log_softmax(-1)[list(row.positions), list(row.targets)].tolist() for of, row in zip(logits, rows, strict=True)]


def tokens_run(lm: LanguageModel, rows: Sequence[TokenSequence]) -> tuple[int, list[TokenScores]]:
    """Return the tokens that went through the model, padding included, and the scores."""
    sizes: list[int] = []

    def count(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        sizes.append(inputs["input_ids"].numel())

    with lm.model.register_forward_pre_hook(count, with_kwargs=True):
        return (scores := run_rows(lm, rows, 2)) and sum(sizes), scores


@pytest.mark.parametrize("family", JOINED)
def test_joined_continuations_score_as_single_unpadded_passes(family: str, make: Make) -> None:
    lm = make(family)
    rows = encode(lm, EXAMPLES, "choice")
    assert len(rows) == 9
    run_rows(lm, rows, 2)  # which tests the model
    assert lm.shares_prompts is True
    tokens, scores = tokens_run(lm, rows)
    for outcome, expected in zip(scores, alone(lm, rows), strict=True):
        assert outcome.logprobs == pytest.approx(expected, abs=1e-4)
    lm.shares_prompts = False
    separate, one_by_one = tokens_run(lm, rows)
    assert tokens < 0.6 * separate
    assert [s.argmax for s in scores] == [s.argmax for s in one_by_one]


@pytest.mark.parametrize("family", [*SEPARATE, *(pytest.param(f, marks=pytest.mark.slow) for f in UNUSUAL)])
def test_other_models_score_every_continuation_right(family: str, make: Make) -> None:
    lm = make(family)
    rows = encode(lm, EXAMPLES, "choice")
    for outcome, expected in zip(run_rows(lm, rows, 2), alone(lm, rows), strict=True):
        assert outcome.logprobs == pytest.approx(expected, abs=1e-4)
    assert family not in SEPARATE or lm.shares_prompts is False


def test_a_model_that_sees_the_other_continuations_keeps_rows_of_their_own(llama: LanguageModel) -> None:
    """It takes the mask, and lets every token see all tokens before it."""
    model: Any = llama.model

    def ignore_mask(_module: Any, args: Any, inputs: dict[str, Any]) -> Any:
        return args, inputs | ({"attention_mask": None} if inputs["attention_mask"].ndim == 4 else {})

    rows = encode(llama, EXAMPLES, "choice")
    with model.register_forward_pre_hook(ignore_mask, with_kwargs=True):
        scores = run_rows(llama, rows, 2)
    assert llama.shares_prompts is False
    for outcome, expected in zip(scores, alone(llama, rows), strict=True):
        assert outcome.logprobs == pytest.approx(expected, abs=1e-4)


def test_the_prefix_cache_scores_joined_rows_as_a_full_pass(llama: LanguageModel) -> None:
    rows = encode(llama, EXAMPLES, "choice")
    cache = PrefixCache(llama, rows, 2)
    cache.move_to("", 2)
    assert cache.boundary == 2
    with applied(llama, "2.fc_in@0.3"):
        full, short = evaluate(llama, SPLIT, batch_size=2), evaluate_rows(llama, SPLIT, "choice", rows, cache.run)
    assert llama.shares_prompts is True
    assert [s.logprob for s in short.scores] == [s.logprob for s in full.scores]
    with applied(llama, "2.fc_in@0.3"):
        expected = alone(llama, rows)
    totals = {row.example: [] for row in rows}  # type: dict[int, list[float]]
    for row, of_row in zip(rows, expected, strict=True):
        totals[row.example].append(sum(of_row))
    assert [s.correct for s in full.scores] == [t[0] == max(t) for t in totals.values()]


def test_rows_of_one_example_and_prompt_are_joined_within_the_window(make: Make) -> None:
    lm = make("mistral")
    rows = encode(lm, EXAMPLES, "choice")
    groups = groups_with_one_prompt(rows, range(len(rows)))
    assert groups == [(0, 1, 2), (3, 4), (5, 6, 7, 8)]
    length = max(len(rows[i].ids) for i in groups[0])
    for window, expected in ((None, True), (4 * length, True), (length, False)):
        lm.model.config.sliding_window = window
        assert can_be_joined(lm, rows, groups[0]) is expected
    run_rows(lm, rows, 2)
    lm.shares_prompts = True
    inside = [b.rows for b in batches(lm, rows, 1, joined=True)]
    assert (0, 1, 2) not in inside
    assert sorted(i for of_batch in inside for i in of_batch) == list(range(9))


def test_equal_prompts_of_two_examples_and_windows_of_a_text_stay_apart() -> None:
    def row(example: int, ids: tuple[int, ...], at: int) -> TokenSequence:
        return TokenSequence(example, ids, (*ids[at + 1 :], 9), tuple(range(at, len(ids))))

    two = [row(0, (1, 2, 3), 1), row(1, (1, 2, 4), 1)]
    assert groups_with_one_prompt(two, (0, 1)) == [(0,), (1,)]
    windows = [row(0, (1, 2, 3, 4), 0), row(0, (3, 4, 5, 6), 1)]
    assert groups_with_one_prompt(windows, (0, 1)) == [(0,), (1,)]
