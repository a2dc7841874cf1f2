"""LASER after training against a constraint during it: the ways, what they are measured on, and what is learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from laserlm.lab import constrained
from laserlm.lab.constrained import on_recall, on_worldfacts
from laserlm.lab.recall.language import Recipe
from laserlm.models import LanguageModel
from laserlm.spec import Intervention
from laserlm.tasks import Example, task

SMALL = Recipe(words=6, length=16, width=16, steps=4, batch_size=8)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the search find a reduction that is given."""

    def find(text: str) -> None:
        monkeypatch.setattr(constrained, "search", lambda *_, **__: SimpleNamespace(best=Intervention.parse(text)))

    return find


def test_each_way_has_its_rank_and_is_measured_on_the_same_questions(tmp_path: Path, found: Callable[[str], None]) -> None:
    found("1.fc_in@0.25")
    arms = list(on_recall(SMALL, tmp_path, penalties=(0.0, 1e6)))
    assert [(a.name, a.intervention) for a in arms] == [
        ("plain", ""),
        ("LASER after it", "1.fc_in@0.25"),
        ("constraint", "1.fc_in@0.25"),
        ("LASER after it", "1.fc_in@0.1"),
        ("constraint", "1.fc_in@0.1"),
        ("penalty 0", "1.fc_in@0.25"),
        ("penalty 0, LASER after it", "1.fc_in@0.25"),
        ("penalty 1e+06", "1.fc_in@0.25"),
        ("penalty 1e+06, LASER after it", "1.fc_in@0.25"),
    ]
    tails = [a.tails["1.fc_in"] for a in arms]
    assert tails[0] > 0.1
    assert tails[5] == tails[0]  # a penalty of zero changes nothing
    assert [tails[i] for i in (1, 2, 3, 4, 6, 7, 8)] == pytest.approx([0] * 7, abs=1e-9)
    for a in arms:
        assert a.sides["clean"].base == arms[0].sides["clean"].base
        assert a.sides["noisy"].n == arms[0].sides["noisy"].n
    assert arms[5].sides["clean"].edited_loss == arms[0].sides["clean"].edited_loss
    assert arms[2].sides["clean"].edited_loss != arms[1].sides["clean"].edited_loss


def test_models_are_used_again_but_not_those_of_another_constraint(tmp_path: Path, found: Callable[[str], None]) -> None:
    found("1.fc_in@0.25")
    list(on_recall(SMALL, tmp_path, penalties=()))
    told: list[str] = []
    list(on_recall(SMALL, tmp_path, penalties=(), on_progress=lambda name, *_: told.append(name)))
    assert not told
    list(on_recall(SMALL, tmp_path, penalties=(), every=2, on_progress=lambda name, *_: told.append(name)))
    assert set(told) == {"constraint-1.fc_in@0.25-2", "constraint-1.fc_in@0.1-2"}


def test_where_nothing_is_found_there_is_the_plain_model_alone(tmp_path: Path, found: Callable[[str], None]) -> None:
    found("")
    assert [a.name for a in on_recall(SMALL, tmp_path)] == ["plain"]


def test_answers_are_learnt_and_nothing_else(llama: LanguageModel) -> None:
    examples = [Example("a", "The capital of France is", "Paris"), Example("b", "Two and two are", "four of them")]
    lessons = constrained._Answers(llama, examples)
    tokenizer = llama.need_tokenizer()
    for e, item in zip(examples, (lessons[0], lessons[1]), strict=True):
        ids = item["input_ids"][item["attention_mask"].bool()].tolist()
        answer = [t for t in item["labels"].tolist() if t != -100]
        assert ids == tokenizer(f"{e.prompt} {e.answer}").input_ids
        assert answer == ids[len(ids) - len(answer) :]
        assert tokenizer.decode(answer).strip() == e.answer
        # Labels stand where their tokens do; the model itself looks one further.
        assert item["labels"].tolist()[: len(ids)] == [-100] * (len(ids) - len(answer)) + answer


@pytest.mark.bundled
@pytest.mark.slow
def test_the_bundled_model_is_tuned_on_other_facts_than_it_is_measured_on(
    bundled: LanguageModel, found: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found("29.v_proj@0.5")
    seen: list[str] = []
    plain = constrained._Answers

    def watched(lm: LanguageModel, examples: list[Example]) -> object:
        seen.extend(e.fact for e in examples)
        return plain(lm, examples)

    monkeypatch.setattr(constrained, "_Answers", watched)
    arms = list(on_worldfacts(0, steps=2, batch_size=2, validation=4, test=6, penalties=(1e9,), every=1))
    assert [a.name for a in arms] == [
        "not tuned",
        "plain",
        "LASER after it",
        "constraint",
        "penalty 1e+09",
        "penalty 1e+09, LASER after it",
    ]
    facts = task("worldfacts", phrasings="rewrite")
    assert not set(seen) & {e.fact for e in (*facts.test.limit(6), *facts.validation)}
    assert [a.tails["29.v_proj"] for a in arms[2:]] == pytest.approx([0] * 4, abs=1e-9)
    assert arms[0].tails["29.v_proj"] > 0.01
    assert arms[0].sides["test"].n == 6
    assert arms[0].sides["test"].edited_loss != arms[1].sides["test"].edited_loss
    assert bundled.hash == replace(bundled).hash
