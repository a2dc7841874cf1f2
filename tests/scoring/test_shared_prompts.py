"""Sequences that begin alike in one row of the model's inputs, against a row for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import CAUSAL, SENTENCES, TOKENIZERS, UNUSUAL, build, random_model
from searching.support import CORE

from laserlm.edit import applied
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate, evaluate_rows
from laserlm.scoring.forward import run_rows
from laserlm.scoring.prefix_cache import PrefixCache
from laserlm.scoring.records import TokenScores, TokenSequence
from laserlm.scoring.shared_prompts import JoinedRow, groups_that_begin_alike, joined_length
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


def tokens_run(lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int = 9) -> tuple[int, list[TokenScores]]:
    """Return the tokens that went through the model, padding included, and the scores."""
    sizes: list[int] = []

    def count(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        sizes.append(inputs["input_ids"].numel())

    with lm.model.register_forward_pre_hook(count, with_kwargs=True):
        scores = run_rows(lm, rows, batch_size)
    return sum(sizes), scores


@pytest.mark.parametrize("family", JOINED)
def test_joined_continuations_score_as_single_unpadded_passes(family: str, make: Make) -> None:
    lm = make(family)
    rows = encode(lm, EXAMPLES, "choice")
    assert len(rows) == 9
    run_rows(lm, rows, 9)  # which tests the model
    assert lm.shares_prompts is True
    tokens, scores = tokens_run(lm, rows)
    for outcome, expected in zip(scores, alone(lm, rows), strict=True):
        assert outcome.logprobs == pytest.approx(expected, abs=1e-4)
    lm.shares_prompts = False
    separate, one_by_one = tokens_run(lm, rows)
    assert tokens < 0.75 * separate
    assert [s.argmax for s in scores] == [s.argmax for s in one_by_one]


@pytest.mark.parametrize("family", [*SEPARATE, *(pytest.param(f, marks=pytest.mark.slow) for f in UNUSUAL)])
def test_other_models_score_every_continuation_right(family: str, make: Make) -> None:
    lm = make(family)
    rows = encode(lm, EXAMPLES, "choice")
    for outcome, expected in zip(run_rows(lm, rows, 9), alone(lm, rows), strict=True):
        assert outcome.logprobs == pytest.approx(expected, abs=1e-4)
    assert family not in SEPARATE or lm.shares_prompts is False


def test_a_model_that_sees_the_other_continuations_keeps_rows_of_their_own(llama: LanguageModel) -> None:
    """It takes the mask, and lets every token see all tokens before it."""
    model: Any = llama.model

    def ignore_mask(_module: Any, args: Any, inputs: dict[str, Any]) -> Any:
        return args, inputs | ({"attention_mask": None} if inputs["attention_mask"].ndim == 4 else {})

    rows = encode(llama, EXAMPLES, "choice")
    with model.register_forward_pre_hook(ignore_mask, with_kwargs=True):
        scores = run_rows(llama, rows, 9)
    assert llama.shares_prompts is False
    for outcome, expected in zip(scores, alone(llama, rows), strict=True):
        assert outcome.logprobs == pytest.approx(expected, abs=1e-4)


def test_the_prefix_cache_scores_joined_rows_as_a_full_pass(llama: LanguageModel) -> None:
    rows = encode(llama, EXAMPLES, "choice")
    cache = PrefixCache(llama, rows, 9)
    cache.move_to("", 2)
    assert cache.boundary == 2
    with applied(llama, "2.fc_in@0.3"):
        full, short = evaluate(llama, SPLIT, batch_size=9), evaluate_rows(llama, SPLIT, "choice", rows, cache.run)
    assert llama.shares_prompts is True
    assert [s.logprob for s in short.scores] == [s.logprob for s in full.scores]
    with applied(llama, "2.fc_in@0.3"):
        expected = alone(llama, rows)
    totals = {row.example: [] for row in rows}  # type: dict[int, list[float]]
    for row, of_row in zip(rows, expected, strict=True):
        totals[row.example].append(sum(of_row))
    assert [s.correct for s in full.scores] == [t[0] == max(t) for t in totals.values()]


def sequences(*texts: str) -> list[TokenSequence]:
    """Return a sequence for each text: a token for each letter, the last of which is scored."""
    ids = [tuple(map(ord, text)) for text in texts]
    return [TokenSequence(i, x, (1,), (len(x) - 1,)) for i, x in enumerate(ids)]


def test_groups_are_those_of_fewest_tokens(llama: LanguageModel) -> None:
    rows = sequences("common words one", "other start", "common words two", "common words", "other stars", "x")
    groups = groups_that_begin_alike(llama, rows, 32)
    assert sorted(groups) == [(0, 2, 3), (1, 4), (5,)]
    assert [joined_length(rows, g) for g in ((0, 2, 3), (1, 4), (5,))] == [12 + 4 + 4, 10 + 1 + 1, 1]
    # One letter in common saves nothing where the attention to a long row takes more.
    assert sorted(groups_that_begin_alike(llama, sequences("a" + 60 * "b", "a" + 60 * "c"), 32)) == [(0,), (1,)]
    many = groups_that_begin_alike(llama, sequences(*(f"common {chr(65 + i)}" for i in range(40))), 32)
    assert sorted(i for group in many for i in group) == list(range(40))
    assert (len(many), max(map(len, many))) == (3, 14)
    assert {len(g) for g in groups_that_begin_alike(llama, sequences("ab", "ac", "ad"), 1)} == {1}


def test_a_row_is_within_the_window_of_the_model(make: Make) -> None:
    lm = make("mistral")
    rows = sequences("common words one", "common words two")
    for window, expected in ((None, [(0, 1)]), (19, [(0, 1)]), (18, [(0,), (1,)])):
        lm.model.config.sliding_window = window
        assert sorted(groups_that_begin_alike(lm, rows, 32)) == expected


def test_on_other_devices_only_the_sequences_of_one_example_are_joined(llama: LanguageModel) -> None:
    rows = [*sequences("common words one", "common words two"), *sequences("common words 3", "common words 4")[:1]]
    elsewhere: Any = SimpleNamespace(device=torch.device("meta"), model=llama.model)
    assert sorted(groups_that_begin_alike(llama, rows, 32)) == [(0, 1, 2)]
    assert sorted(groups_that_begin_alike(elsewhere, rows, 32)) == [(0, 2), (1,)]


def test_scored_places_within_and_after_the_common_tokens_are_found() -> None:
    rows = [TokenSequence(0, (1, 2, 3), (5, 6), (1, 2)), TokenSequence(0, (1, 2, 4, 9), (7,), (3,))]
    row = JoinedRow.of(rows, (0, 1))
    assert row == JoinedRow((1, 2, 3, 4, 9), ((1, 2), (4,)), (0, 0, 1, 2, 2), (0, 1, 2, 2, 3))


@pytest.mark.parametrize("family", JOINED)
def test_questions_that_begin_alike_score_as_single_passes(family: str, make: Make) -> None:
    lm = make(family)
    names = ("France", "Spain", "Italy", "Norway", "Portugal")
    examples = tuple(Example(name, f"{SENTENCES[0]} and the capital of {name} is", f"a city in {name}") for name in names)
    rows = encode(lm, (*examples, Example("other", "Rome is", "true")), "answer")
    run_rows(lm, rows, 5)
    assert lm.shares_prompts is True
    assert tokens_run(lm, rows, 5)[0] < 0.7 * sum(len(row.ids) for row in rows)
    for batch_size in (1, 5, 6):  # a padded row, too
        for outcome, expected in zip(run_rows(lm, rows, batch_size), alone(lm, rows), strict=True):
            assert outcome.logprobs == pytest.approx(expected, abs=1e-4)


def continuations(common: int, n: int, own: int, seed: int) -> list[TokenSequence]:
    """Return sequences of random tokens that begin alike, with all of their own tokens scored."""
    tokens = torch.randint(5, 200, (common + n * own,), generator=torch.Generator().manual_seed(seed)).tolist()
    start, rest = tokens[:common], tokens[common:]
    parts = [rest[i * own : (i + 1) * own] for i in range(n)]
    return [TokenSequence(seed, (*start, *p), (*p, 3), tuple(range(common - 1, common + own))) for p in parts]


def windowed(family: str) -> LanguageModel:
    """Return a model whose tokens see 24 tokens, in all blocks or in every other one."""
    if family == "mistral":
        lm = build("mistral")
        lm.model.config.sliding_window = 24
        return lm
    sizes = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "vocab_size": 512, "max_position_embeddings": 128}
    neo = random_model("causal", family, sizes | {"attention_types": [[["global", "local"], 2]], "window_size": 24})
    return LanguageModel(model=neo.eval(), tokenizer=TOKENIZERS["causal"](), name=family, kind="causal")


@pytest.mark.parametrize("family", ["mistral", "gpt_neo"])
def test_a_model_with_a_window_scores_long_rows_next_to_rows_that_begin_alike(family: str) -> None:
    lm = windowed(family)
    run_rows(lm, continuations(12, 3, 3, seed=0), 8)  # short ones, on which a window cannot be seen
    rows = [*continuations(12, 3, 3, seed=0), *continuations(57, 1, 3, seed=1)]
    for outcome, expected in zip(run_rows(lm, rows, 8), alone(lm, rows), strict=True):
        assert outcome.logprobs == pytest.approx(expected, abs=1e-4)


def test_sequences_whose_row_does_not_fit_into_memory_run_in_rows_of_their_own(make: Make) -> None:
    lm = make("llama")
    rows = continuations(12, 10, 4, seed=0)
    lm.shares_prompts = True

    def hook(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].numel() > 40:
            raise torch.OutOfMemoryError("no room")

    with lm.model.register_forward_pre_hook(hook, with_kwargs=True):
        outcomes = run_rows(lm, rows, 4)
    for outcome, expected in zip(outcomes, alone(lm, rows), strict=True):
        assert outcome.logprobs == pytest.approx(expected, abs=1e-4)


def test_an_edited_model_does_not_decide_for_the_unchanged_one(make: Make) -> None:
    lm = make("llama")
    rows = encode(lm, EXAMPLES, "choice")
    with applied(lm, "all.out_proj@0"):
        run_rows(lm, rows, 9)
    assert lm.shares_prompts is None
