"""Noisy in-context recall: the language, the questions, the model and what is found on it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from laserlm.edit import applied
from laserlm.errors import TaskError
from laserlm.export import save
from laserlm.lab.recall import model as training
from laserlm.lab.recall import study as studies
from laserlm.lab.recall.language import NOISE, START, TRIGGER, Language, RecallConfig, questions, texts, write_questions
from laserlm.lab.recall.model import initial_model, load_or_train
from laserlm.lab.recall.study import recall_task, run_study
from laserlm.models import load
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.tokenize import encode
from laserlm.store import Store
from laserlm.tasks import Task, task

SMALL = RecallConfig(words=6, length=16, width=16, steps=12, batch_size=8)
FEW = "0-1.mlp@0,0.5+1.attn@0,0.5"
N_DRAWN = 20_000
ERROR = 4
"""Standard errors by which a share of a draw may be off; the seeds are fixed, so the tests do not change from run to run."""


class Begun(Exception):
    """Stands for a training that begins, with what it would learn from."""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few questions and few candidates for the searches."""
    monkeypatch.setattr(studies, "N_SEQUENCES", 100)
    monkeypatch.setattr(studies, "GRID", FEW)


def within(share: float, expected: float, n: int) -> bool:
    return abs(share - expected) < ERROR * (expected * (1 - expected) / n) ** 0.5


def test_after_a_trigger_comes_noise_or_the_output_of_the_sequence() -> None:
    language = Language(RecallConfig(alpha=0.65))
    drawn = language.draw(N_DRAWN, seed=1)
    tokens, trigger, noise = drawn.tokens, 24, 25
    after = tokens[:, :-1] == trigger
    output = tokens[:, 1:] == drawn.outputs[:, None]
    assert bool((output | (tokens[:, 1:] == noise))[after].all())
    assert within(float((tokens[:, 1:] == noise)[after].float().mean()), 0.65, int(after.sum()))
    assert not bool((tokens[:, 1:] == noise)[~after].any())


def test_words_follow_one_another_as_the_transitions_say() -> None:
    language = Language(RecallConfig(words=5))
    tokens = language.draw(N_DRAWN, seed=1).tokens
    for word in range(5):
        following = tokens[:, 1:][tokens[:, :-1] == word]
        for next_, share in enumerate(language.transitions[word].tolist()):
            assert within(float((following == next_).float().mean()), share, len(following))


def test_each_word_is_the_output_of_as_many_sequences() -> None:
    outputs = Language(RecallConfig(words=8)).draw(N_DRAWN, seed=3).outputs
    assert all(within(float((outputs == word).float().mean()), 1 / 8, N_DRAWN) for word in range(8))


def test_clean_sequences_hold_no_noise_and_equal_seeds_give_equal_ones() -> None:
    language = Language(RecallConfig())
    clean = language.draw(100, seed=5, alpha=0.0)
    assert NOISE not in language.text(clean.tokens.flatten()).split()
    assert bool((clean.tokens == language.draw(100, seed=5, alpha=0.0).tokens).all())
    assert not bool((clean.tokens == language.draw(100, seed=6, alpha=0.0).tokens).all())


def test_swapping_leaves_triggers_and_what_follows_them() -> None:
    language = Language(RecallConfig(alpha=0.0))
    plain, swapped = language.draw(2000, seed=5).tokens, language.draw(2000, seed=5, swapped=0.5).tokens
    before = torch.cat([torch.full((2000, 1), 25), plain[:, :-1]], 1)
    asked = (plain == 24) | (before == 24)
    assert bool((plain == swapped)[asked].all())
    # A word that is hit stays the same once in 24 times.
    changed = float((plain != swapped)[~asked].float().mean())
    assert within(changed, 0.5 * 23 / 24, int((~asked).sum()))


def test_a_question_ends_at_a_trigger_after_another_one() -> None:
    language = Language(RecallConfig())
    drawn = language.draw(300, seed=2)
    examples = questions(language, drawn, "q")
    assert len(examples) > 290
    for e in examples:
        words = e.prompt.split()
        assert words[-1] == TRIGGER
        assert words[:-1].count(TRIGGER) >= 1
        followed = {b for a, b in pairwise(words) if a == TRIGGER}
        assert followed <= {e.answer, NOISE}
    noisy = questions(language, drawn, "q", noisy=True)
    assert [e.prompt for e in noisy] == [e.prompt for e in examples]
    same = [a.answer == b.answer for a, b in zip(examples, noisy, strict=True)]
    assert all(s or b.answer == NOISE for s, b in zip(same, noisy, strict=True))
    assert 0.2 < sum(same) / len(same) < 0.5


def test_a_sequence_without_a_second_trigger_asks_nothing() -> None:
    language = Language(RecallConfig(words=4, length=8, triggers=0.01))
    drawn = language.draw(200, seed=0)
    assert len(questions(language, drawn, "q")) < 10


def test_the_tokenizer_has_one_token_for_each_word() -> None:
    language = Language(RecallConfig(words=3))
    tokens = language.draw(1, seed=0).tokens[0]
    ids = language.tokenizer()(language.text(tokens)).input_ids
    assert ids == [language.vocabulary.index(START), *tokens.tolist()]


@pytest.mark.parametrize(
    "wrong", [{"alpha": 1.0}, {"triggers": 0.0}, {"words": 27}, {"words": 1}, {"length": 4}, {"loss_on": "some"}]
)
def test_an_invalid_configuration_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(TaskError, match=r"write|must be|give 2 to 26 words"):
        RecallConfig(**wrong)  # type: ignore[arg-type]


def test_embeddings_and_output_layer_are_frozen_and_random() -> None:
    model = initial_model(SMALL).model
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight", "lm_head.weight"}
    again, other = initial_model(SMALL).model, initial_model(replace(SMALL, seed=1)).model
    assert bool((model.lm_head.weight == again.lm_head.weight).all())
    assert not bool((model.lm_head.weight == other.lm_head.weight).all())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model that was trained for a few steps."""
    folder = tmp_path_factory.mktemp("recall") / "model"
    load_or_train(SMALL, folder)
    return folder


def test_training_changes_the_blocks_alone_and_is_done_once(folder: Path) -> None:
    lm = load(folder)
    before = initial_model(SMALL).model.state_dict()
    changed = {name for name, weight in lm.model.state_dict().items() if not bool((weight == before[name]).all())}
    assert changed == {name for name in before if ".layers." in name}
    seen: list[int] = []
    again = load_or_train(SMALL, folder, on_progress=lambda done, _: seen.append(done))
    assert not seen
    assert again.hash == lm.hash


def test_a_folder_of_another_configuration_is_refused(folder: Path) -> None:
    with pytest.raises(TaskError, match="another configuration"):
        load_or_train(replace(SMALL, steps=13), folder)


@pytest.mark.parametrize("loss_on", ["outputs", "all"])
def test_the_loss_is_over_the_words_after_triggers_or_over_all(
    loss_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, loss_on=loss_on)
    language = Language(config)

    def fit(model: object, lessons: Any, *_: object, **__: object) -> None:
        raise Begun(lessons)

    monkeypatch.setattr(training, "fit", fit)
    with pytest.raises(Begun) as begun:
        load_or_train(config, tmp_path / "model")
    (lessons,) = begun.value.args
    assert len(lessons) == config.steps * config.batch_size
    item = lessons[0]
    words = [language.vocabulary[i] for i in item["input_ids"].tolist()]
    assert words[0] == START
    for before, word, label in zip(["", *words], words, item["labels"].tolist(), strict=False):
        asked = before == TRIGGER or loss_on == "all"
        assert label == (language.vocabulary.index(word) if asked else -100)


def test_a_full_sequence_is_scored_in_one_window() -> None:
    lm, language = initial_model(SMALL), Language(SMALL)
    rows = encode(lm, texts(language, language.draw(5, seed=0), "t"), "perplexity")
    assert [len(row.targets) for row in rows] == [SMALL.length] * 5


def test_a_folder_that_holds_something_else_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(TaskError, match="holds no model of this training"):
        load_or_train(SMALL, tmp_path, on_progress=lambda *_: pytest.fail("it trains"))


def test_training_leaves_the_random_numbers_of_the_caller(tmp_path: Path) -> None:
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    expected = torch.rand(1).item(), random.random(), numpy.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    load_or_train(SMALL, tmp_path / "model")
    assert (torch.rand(1).item(), random.random(), numpy.random.rand()) == expected


@pytest.mark.slow
def test_a_study_tries_every_matrix_at_every_size(folder: Path, tmp_path: Path) -> None:
    result = run_study(load(folder), SMALL, tmp_path / "runs.db")
    assert (
        result.exhaustive.candidates == result.race.candidates == 2 * 6 * 7
    )  # blocks, matrices, ranks: three sizes are rank 0
    assert result.clean.n > 1700  # some short sequences ask nothing


def test_it_is_searched_saved_and_loaded_as_any_model(folder: Path, tmp_path: Path, few: None) -> None:
    lm = load(folder)
    result = run_study(lm, SMALL, tmp_path / "runs.db")
    assert result.exhaustive.candidates == result.race.candidates == (2 * 2 + 4) * 2
    assert result.clean.n == result.first_clean.n == result.attention_clean.n
    assert result.attention.split(".")[1].partition("@")[0] in ("q_proj", "k_proj", "v_proj", "out_proj")
    json.dumps(result.as_dict())
    with Store.open(tmp_path / "runs.db") as results:
        assert {run.task for run in results.runs()} == {"noisy-recall"}
    save(lm, "1.fc_in@0.5", tmp_path / "reduced", form="factored")
    examples = Task.of("noisy-recall", questions(Language(SMALL), Language(SMALL).draw(60, seed=1, alpha=0.0), "q")).every
    with applied(lm, "1.fc_in@0.5"):
        expected = evaluate(lm, examples)
    assert evaluate(load(tmp_path / "reduced"), examples).loss == pytest.approx(expected.loss, abs=1e-5)


def test_its_questions_are_read_back_from_a_file(tmp_path: Path) -> None:
    own_task = recall_task(replace(SMALL, seed=1))
    write_questions(own_task.every.examples, tmp_path / "questions.jsonl")
    read = task("jsonl", data=tmp_path / "questions.jsonl")
    for split in ("validation", "test", "all"):  # what the search chose on is not measured on
        assert [(e.id, e.prompt, e.answer) for e in read.split(split)] == [
            (e.id, e.prompt, e.answer) for e in own_task.split(split)
        ]


def test_texts_are_full_sequences() -> None:
    language = Language(SMALL)
    drawn = language.draw(3, seed=0)
    assert [e.answer.split() for e in texts(language, drawn, "t")] == [
        [language.vocabulary[i] for i in row] for row in drawn.tokens.tolist()
    ]


def test_the_command_trains_searches_and_tells(run: Callable[..., tuple[int, str, str]], tmp_path: Path, few: None) -> None:
    out = tmp_path / "models"
    code, text, _ = run("lab", "noisy-recall", "--seeds", 1, "--steps", 2, "--out", out, "--store", tmp_path / "r.db", "--json")
    assert code == 0
    (one,) = json.loads(text)
    assert one["clean"]["n"] > 95
    code, text, _ = run("evaluate", out / "seed-0", "--task", f"jsonl:{out / 'seed-0' / 'questions.jsonl'}", "--json")
    assert code == 0
    assert json.loads(text)["n"] == one["clean"]["n"] - one["clean"]["n"] // 5
