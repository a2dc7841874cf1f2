from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from laserlm.edit import applied
from laserlm.errors import AnalysisError
from laserlm.jsonable import to_json
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.scoring.statistics import wilson
from laserlm.store import Store
from laserlm.studies import cached_scorer, flips, likeliest
from laserlm.tasks import Example, Split, Task

Make = Callable[..., LanguageModel]


def evaluation(rows: list[tuple[str, str, str, str]]) -> Evaluation:
    scores = tuple(ExampleScore(i, message == right, -1.0, 1, message, right, group) for i, message, right, group in rows)
    return Evaluation("m", "t", "test", "next_token", "", scores, 0.0)


BEFORE = [("1", "Rome", "Paris", "a"), ("2", "Rome", "Rome", "a"), ("3", "the", "Rome", "a"), ("4", "the", "Oslo", "b")]
AFTER = [("1", "Paris", "Paris", "a"), ("2", "Paris", "Rome", "a"), ("3", "Rome", "Rome", "a"), ("4", "the", "Oslo", "b")]
EXAMPLES = [Example(i, f"prompt {i}", right) for i, _, right, _ in BEFORE]


def test_what_was_corrected_broken_and_answered_instead_worked_out_by_hand() -> None:
    result = flips(evaluation(BEFORE), replace(evaluation(AFTER), intervention="1.fc_in@0.1"), EXAMPLES)
    assert [f.id for f in result.of("corrected")] == ["1", "3"]
    assert [f.id for f in result.of("broken")] == ["2"]
    assert [f.id for f in result.of("wrong")] == ["4"]
    assert result.of("right") == []
    assert result.flips[0].prompt == "prompt 1"
    assert (result.comparison.corrected, result.comparison.broken) == (2, 1)
    assert (result.off_list_base.value, result.off_list_edited.value) == (0.5, 0.25)  # "the" is nobody's answer
    assert result.off_list_base.interval == wilson(2, 4)
    assert result.unchanged.value == 0.25
    assert result.majority.value == 0.5
    assert [(x.label, x.answers, x.base, x.edited) for x in result.labels] == [
        ("rome", 2, 2, 1),
        ("paris", 1, 0, 2),
        ("oslo", 1, 0, 0),
        ("the", 0, 2, 1),
    ]
    assert [(g.group, g.comparison.n, g.comparison.corrected, g.is_small) for g in result.groups] == [
        ("a", 3, 2, True),
        ("b", 1, 0, True),
    ]
    assert to_json(result)["counts"] == {"corrected": 2, "broken": 1, "right": 0, "wrong": 1}


def test_an_example_that_is_not_there_is_reported() -> None:
    with pytest.raises(AnalysisError, match="no example '4'"):
        flips(evaluation(BEFORE), evaluation(AFTER), EXAMPLES[:3])


@pytest.mark.parametrize("family", ["llama", "roberta", "t5"])
def test_the_likeliest_tokens_are_those_of_a_plain_pass(family: str, make: Make) -> None:
    lm = make(family)
    text = "decoder.1.mlp@0.1" if family == "t5" else "1.mlp@0.1"
    examples = [Example(c, f"The capital of {c} is", "Paris") for c in ("France", "Italy and Spain")]
    result = likeliest(lm, examples, text, k=3, batch_size=1)
    assert result == likeliest(lm, examples, text, k=3, batch_size=2)
    assert [len(side) for pair in result for side in pair] == [3] * 4
    if family != "llama":
        return
    tokenizer = lm.require_tokenizer()
    for e, sides in zip(examples, result, strict=True):
        for intervention, side in zip(("", text), sides, strict=True):
            with applied(lm, intervention), torch.no_grad():
                logits = lm.model(**tokenizer(e.prompt, return_tensors="pt")).logits[0, -1]
            assert side == [tokenizer.decode([t]) for t in logits.topk(3).indices.tolist()]


@pytest.fixture
def split() -> Split:
    return Task.of("t", [Example(c, f"The capital of {c} is", "Paris") for c in "abcdef"]).every


def test_scores_are_computed_once_and_kept(llama: LanguageModel, split: Split, tmp_path: Path) -> None:
    with applied(llama, "1.fc_in@0.1"):
        expected = evaluate(llama, split)
    # A pass from a cached boundary may round otherwise than a full one.
    logprobs = pytest.approx([s.logprob for s in expected.scores], abs=1e-5)
    passes: list[str] = []
    llama.model.register_forward_pre_hook(lambda *_: passes.append(llama.intervention))
    calls: list[list[str]] = []
    for _ in range(2):
        with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as score:
            edited = [
                score("1.fc_in@0.10"),
                score("named", applied(llama, "1.fc_in@0.1")),
                score("another", applied(llama, "1.fc_in@0.1"), matrices_of="1.fc_in@0.5"),
            ]
            assert [[s.logprob for s in each.scores] for each in edited] == [logprobs] * 3
            assert score("").intervention == ""
            assert score.cached("a text", lambda: passes.append("computed") or ["kept"]) == ["kept"]
        calls.append(list(passes))
    assert set(calls[0]) == {"1.fc_in@0.1", "", "computed"}
    assert calls[1] == calls[0]  # the second time everything comes from the store
    with Store.open(tmp_path / "runs.db") as store:
        assert store.examples(store.runs()[0].id, "all") == split.examples
        with cached_scorer(llama, split.limit(3), store) as score:
            score("")
    assert len(passes) > len(calls[0])  # other examples are other scores


def test_scores_under_edits_of_tied_weights_start_below_the_first_of_them(make: Make, split: Split, tmp_path: Path) -> None:
    lm = make("llama")
    layers = lm.model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    lm = LanguageModel(lm.model, lm.tokenizer, "tied", "causal")
    with applied(lm, "2.fc_up@0.1"):
        expected = evaluate(lm, split)
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(lm, split, store) as score:
        score("2.fc_in@0.1")  # puts the boundary below block 2
        assert score("2.fc_up@0.1").loss == pytest.approx(expected.loss, abs=1e-5)


def test_examples_come_back_complete_from_the_store(llama: LanguageModel, tmp_path: Path) -> None:
    examples = [Example("1", "The capital is", "Paris", ("Paris", "Rome"), aliases=("x", "y"), masked="{mask}", popularity=2.0)]
    split = Task.of("t", examples).every
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as score:
        score("")
        assert store.examples(store.runs()[0].id, "all") == split.examples
        assert store.examples(store.runs()[0].id, "test") == ()


def of(scorer: str, rows: list[tuple[str, bool, str]], examples: list[Example]) -> tuple[int, list[tuple[str, int, int]]]:
    scores = tuple(
        ExampleScore(e.id, right, -1.0, 1, message, answer) for e, (message, right, answer) in zip(examples, rows, strict=True)
    )
    one = Evaluation("m", "t", "test", scorer, "", scores, 0.0)
    result = flips(one, one, examples)
    return round(result.off_list_base.value * result.off_list_base.n), [(x.label, x.answers, x.base) for x in result.labels]


def test_what_is_outside_of_all_answers_goes_by_what_the_scorer_reads() -> None:
    examples = [Example("1", "p", "Ouagadougou", aliases=("Ouaga",)), Example("2", "p", "Lima", ("Lima", "Cusco"))]
    token = [("Ou", True, "Ouagadougou"), ("the", False, "Lima")]
    assert of("first_token", token, examples) == (1, [("ouagadougou", 1, 1), ("lima", 1, 0), ("the", 0, 1)])
    assert of("answer", [("Ou", False, "Ouagadougou"), ("Li", False, "Lima")], examples)[0] == 0
    assert of("next_token", [("Ou", False, "Ouagadougou"), ("Li", False, "Lima")], examples)[0] == 2
    assert of("choice", [("Cusco", False, "Ouagadougou"), ("Cusco", False, "Lima")], examples)[0] == 0
    text = [(" It is Ouaga, of course", True, "Ouagadougou"), (" nowhere", False, "Lima")]
    assert of("contains", text, examples)[0] == 1
