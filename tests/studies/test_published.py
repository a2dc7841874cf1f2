"""Published results beside ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from laserlm.edit import applied
from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import evaluate
from laserlm.studies.published import CHECKPOINTS, Published, as_published, compare_with_published, published
from laserlm.tasks import Decoding, Example, Task

Make = Callable[..., LanguageModel]
CITIES = ["Paris", "Rome", "Oslo", "Lisbon", "Madrid"]


def facts(name: str, scorer: str) -> Task:
    rows = [Example(str(i), f"The capital of {c} and Rome is", CITIES[i % 5]) for i, c in enumerate("abcdefghij")]
    return Task.of(name, rows, scorer=scorer, split="paper", decoding=Decoding(new_tokens=4))  # type: ignore[arg-type]


ROW = Published("gpt-j-6b", "counterfact", "accuracy_percent", 13.1, 5.78, 24.0, 5.05, "1.fc_in@0.1", "LASER", "the source")


def test_every_published_model_and_task_of_the_paper_is_there() -> None:
    rows = [r for r in published() if r.method == "LASER"]
    assert len(rows) == 24
    assert {r.model for r in rows} == {"gpt-j-6b", "llama-2-7b", "roberta-base"}
    assert {r.model for r in published()} == set(CHECKPOINTS)
    (row,) = published("llama-2-7b", "epistemic-reasoning")
    assert (row.base, row.edited, row.base_loss, row.edited_loss) == (44.8, 63.4, 0.78, 0.73)
    assert row.intervention == "28.fc_out@0.01"
    # "composed" names no intervention and "Sokoban" no task of text: neither can be run.
    assert all(Intervention.parse(r.intervention) for r in published())
    assert not published("decision-transformer")


def test_ours_are_next_to_what_is_published(make: Make) -> None:
    lm = make("gptj")
    questions = facts("counterfact", "next_token")
    messages: list[int] = []
    (result,) = compare_with_published(lm, questions, [ROW], batch_size=3, on_progress=lambda done, _: messages.append(done))
    base = evaluate(lm, questions.test)
    with applied(lm, "1.fc_in@0.1:reference", seed=0):
        edited = evaluate(lm, questions.test)
    assert result.accuracies == (100 * base.accuracy, 100 * edited.accuracy)
    assert result.losses == pytest.approx((base.loss, edited.loss), abs=1e-5)
    assert result.edited.intervention == "1.fc_in@0.1:reference"
    assert messages[-1] == len(questions.test)
    assert not lm.active
    assert any("dtype torch.float32; published with float16" in s for s in result.settings)
    assert any("another seed moves the edited figures" in s for s in result.settings)
    assert compare_with_published(lm, questions, [ROW], limit=3)[0].base.n == 3


def test_what_the_question_says_counts_as_published(make: Make) -> None:
    lm = make("gptj")
    questions = facts("wikidata-qa", "contains")
    split = replace(questions.test, examples=tuple(replace(e, prompt=f"Is it {e.answer}? It is") for e in questions.test))
    (result,) = compare_with_published(lm, replace(questions, test=split), [replace(ROW, task="wikidata-qa")])
    assert result.accuracies == (100.0, 100.0)
    assert result.base.accuracy < 1
    assert any("finds the answer in the prompt too" in s for s in result.settings)


def test_the_published_loss_of_a_masked_model_is_over_one_token_more(make: Make) -> None:
    lm = make("roberta")
    (one,) = compare_with_published(lm, facts("counterfact", "next_token"), [replace(ROW, model="roberta-base")])
    assert one.losses[0] == pytest.approx(one.base.loss)  # one mask, divided by one
    (result,) = compare_with_published(lm, facts("wikidata-qa", "contains"), [replace(ROW, model="roberta-base")])
    by_hand = sum(-s.logprob / (s.tokens + 1) for s in result.base.scores) / result.base.n
    assert result.losses[0] == pytest.approx(by_hand)
    assert result.losses[0] < result.base.loss


def test_every_published_row_is_decomposed_at_random_and_llama_writes_for_counterfact(make: Make) -> None:
    mistral = {"model": "mistral-7b-instruct-v0.1", "metric": "pass_at_1", "intervention": "1-2.all@0.5"}
    row = replace(ROW, method="truncated SVD of every map", **mistral)
    (result,) = compare_with_published(make("llama"), facts("counterfact", "next_token"), [row])
    assert result.edited.intervention == "1-2.all@0.5:reference"
    assert any("decomposition is random" in setting for setting in result.settings)
    assert max(result.accuracies) <= 1
    questions = facts("counterfact", "next_token")
    assert as_published("llama-2-7b", questions).test.scorer == "contains"
    assert as_published("gpt-j-6b", questions) is questions
