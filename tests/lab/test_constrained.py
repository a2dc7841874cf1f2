"""LASER after training against a constraint during training: the methods, their test questions and their labels."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from laserlm.lab import constrained
from laserlm.lab.constrained import TrainingResult, compare_on_recall, compare_on_worldfacts
from laserlm.lab.recall.language import RecallConfig
from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.tasks import Example, Task, task

SMALL = RecallConfig(words=6, length=16, width=16, steps=4, batch_size=8)


def find(patch: pytest.MonkeyPatch, text: str) -> None:
    """Let the search find a reduction that is given."""
    patch.setattr(constrained, "search", lambda *_, **__: SimpleNamespace(best=Intervention.parse(text)))


@pytest.fixture
def find_reduction(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return partial(find, monkeypatch)


def few_questions(patch: pytest.MonkeyPatch) -> None:
    """Measure on a part of the questions."""
    questions = constrained.questions

    def first_questions(*arguments: Any, **options: Any) -> list[Example]:
        return questions(*arguments, **options)[:100]

    patch.setattr(constrained, "questions", first_questions)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on a part of the questions in one test."""
    few_questions(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrainingResult]]:
    """A folder of models trained in every way, and what they are worth."""
    folder = tmp_path_factory.mktemp("constrained")
    with pytest.MonkeyPatch.context() as patch:
        few_questions(patch)
        find(patch, "1.fc_in@0.25")
        return folder, list(compare_on_recall(SMALL, folder, penalties=(0.0, 1e6)))


class Begun(Exception):
    """Stands for a training that begins, with what it would learn from."""


def test_each_method_has_its_rank_and_is_measured_on_the_same_questions(trained: tuple[Path, list[TrainingResult]]) -> None:
    _, results = trained
    assert [(a.name, a.intervention) for a in results] == [
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
    energies = [a.residual_energy["1.fc_in"] for a in results]
    assert energies[0] > 0.1
    assert energies[5] == energies[0]  # a penalty of zero changes nothing
    assert [energies[i] for i in (1, 2, 3, 4, 6, 7, 8)] == pytest.approx([0] * 7, abs=1e-9)
    for a in results:
        assert a.comparisons["clean"].base == results[0].comparisons["clean"].base
        assert a.comparisons["noisy"].n == results[0].comparisons["noisy"].n
    assert results[5].comparisons["clean"].edited_loss == results[0].comparisons["clean"].edited_loss
    assert results[2].comparisons["clean"].edited_loss != results[1].comparisons["clean"].edited_loss


@pytest.mark.usefixtures("few")
def test_models_are_used_again_but_not_those_of_another_constraint(
    trained: tuple[Path, list[TrainingResult]], tmp_path: Path, find_reduction: Callable[[str], None]
) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "models")
    find_reduction("1.fc_in@0.25")
    messages: list[str] = []
    list(compare_on_recall(SMALL, folder, penalties=(), on_progress=lambda name, *_: messages.append(name)))
    assert not messages
    list(compare_on_recall(SMALL, folder, penalties=(), every=2, on_progress=lambda name, *_: messages.append(name)))
    assert set(messages) == {"constraint-1.fc_in@0.25-2", "constraint-1.fc_in@0.1-2"}


@pytest.mark.usefixtures("few")
def test_where_nothing_is_found_there_is_the_plain_model_alone(tmp_path: Path, find_reduction: Callable[[str], None]) -> None:
    find_reduction("")
    assert [a.name for a in compare_on_recall(SMALL, tmp_path)] == ["plain"]


def test_answers_are_learnt_and_nothing_else(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("The capital of France is", "Paris"), ("Two and two are", "four of them"), ("Oslo is", "in Norway")]
    pairs += [(f"Note: {prompt}", answer) for prompt, answer in pairs]
    questions = Task.of("example", [Example(str(i), prompt, answer) for i, (prompt, answer) in enumerate(pairs)])

    def fit(model: object, lessons: Any, *_: object, **__: object) -> None:
        raise Begun(lessons)

    monkeypatch.setattr(constrained, "load", lambda *_, **__: llama)
    monkeypatch.setattr(constrained, "task", lambda *_, **__: questions)
    monkeypatch.setattr(constrained, "fit", fit)
    with pytest.raises(Begun) as begun:
        list(compare_on_worldfacts(0, test=2))
    (lessons,) = begun.value.args
    examples = questions.test.examples[2:]
    assert len(lessons) == len(examples) == 3
    tokenizer = llama.require_tokenizer()
    for e, item in zip(examples, [lessons[i] for i in range(3)], strict=True):
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
    bundled: LanguageModel, find_reduction: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_reduction("29.v_proj@0.5")
    seen: list[str] = []
    plain = constrained.encode

    def watched(lm: LanguageModel, examples: Sequence[Example], *arguments: Any) -> Any:
        seen.extend(e.fact for e in examples)
        return plain(lm, examples, *arguments)

    monkeypatch.setattr(constrained, "encode", watched)
    results = list(compare_on_worldfacts(0, steps=2, batch_size=2, validation=4, test=6, penalties=(1e9,), every=1))
    assert [a.name for a in results] == [
        "not tuned",
        "plain",
        "LASER after it",
        "constraint",
        "penalty 1e+09",
        "penalty 1e+09, LASER after it",
    ]
    facts = task("worldfacts", phrasings="rewrite")
    assert seen
    assert not set(seen) & {e.fact for e in (*facts.test.limit(6), *facts.validation)}
    assert [a.residual_energy["29.v_proj"] for a in results[2:]] == pytest.approx([0] * 4, abs=1e-9)
    assert results[0].residual_energy["29.v_proj"] > 0.01
    assert results[0].comparisons["test"].n == 6
    assert results[0].comparisons["test"].edited_loss != results[1].comparisons["test"].edited_loss
    assert bundled.hash == replace(bundled).hash
