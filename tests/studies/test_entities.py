from __future__ import annotations

from pathlib import Path

import pytest

from laserlm.edit import applied
from laserlm.errors import AnalysisError
from laserlm.jsonable import to_json
from laserlm.models import LanguageModel
from laserlm.scoring.generation import generate
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.store import Store
from laserlm.studies import cached_scorer
from laserlm.studies.entities import MODELS, PUBLISHED, entities, pipeline, sets_of
from laserlm.studies.writing import generated_texts
from laserlm.tasks import Decoding, Example, Task


def evaluation(right: str) -> Evaluation:
    scores = tuple(ExampleScore(i, mark == "+", -1.0, 1, "x", "y") for i, mark in zip("abcd", right, strict=True))
    return Evaluation("m", "t", "test", "next_token", "", scores, 0.0)


def test_the_sets_are_of_what_the_reduced_model_has_right_and_another_wrong() -> None:
    assert sets_of(evaluation("+--+"), evaluation("+++-"), evaluation("-+-+")) == {"a": ("B",), "b": ("A",), "c": ("A", "B")}


def test_counts_and_shares_worked_out_by_hand() -> None:
    examples = [Example("1", "p", "Rome"), Example("2", "p", "the USA", aliases=("America",)), Example("3", "p", "Oslo")]
    of = {
        "in Rome and Oslo": ["Rome", "Oslo"],
        "Romeo": ["Romeo"],
        "america, I think": ["america"],
        "nothing": [],
        "in Oslo": ["Oslo"],
    }
    texts = {
        "base": ["nothing", "nothing", "in Oslo"],
        "reduced": ["in Rome and Oslo", "america, I think", "in Oslo"],
        "removed part alone": ["Romeo", "nothing", "nothing"],
    }
    sets = {"1": ("A",), "2": ("A", "B"), "3": ("B",)}
    rows, generations = entities(texts, examples, sets, lambda inputs: [of[t] for t in inputs])
    by_name = {(r.set, r.model): (r.entities.value, r.with_answer.value, r.without.value, r.entities.n) for r in rows}
    assert by_name["A", "base"] == (0, 0, 1, 2)
    assert by_name["A", "reduced"] == (1.5, 1, 0, 2)  # an alias counts
    assert by_name["A", "removed part alone"] == (0.5, 0, 0.5, 2)  # Romeo is not Rome
    assert by_name["B", "base"] == (0.5, 0.5, 0.5, 2)
    assert by_name["B", "reduced"] == (1, 1, 0, 2)
    assert [s.sets for s in generations] == [("A",), ("A", "B"), ("B",)]
    assert generations[0].entities["reduced"] == ("Rome", "Oslo")
    assert all(r.entities.is_small for r in rows)
    with pytest.raises(AnalysisError, match="corrects nothing"):
        entities({"base": []}, [], {}, lambda inputs: [])


def test_an_empty_set_has_no_figures() -> None:
    rows, _ = entities({"base": ["x"]}, [Example("1", "p", "Rome")], {"1": ("A",)}, lambda inputs: [[]])
    assert rows[1].set == "B"
    assert to_json(rows[1])["entities"] == {"value": None, "interval": None, "n": 0}


def test_the_published_tables_are_of_the_same_models() -> None:
    assert {tuple(values) for figures in PUBLISHED.values() for values in figures.values()} == {MODELS}


def test_spacy_finds_names_and_says_what_it_cannot_load() -> None:
    pytest.importorskip("spacy")
    find = pipeline()
    assert find(["Angela Merkel went to Paris.", "the of and"]) == [["Angela Merkel", "Paris"], []]
    with pytest.raises(AnalysisError, match="no_such_pipeline"):
        pipeline("no_such_pipeline")


def test_texts_are_those_that_the_model_writes_and_are_kept(llama: LanguageModel, tmp_path: Path) -> None:
    examples = [Example(c, f"The capital of {c} is", "Paris") for c in "abcdef"]
    split = Task.of("t", examples).every
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as scorer:
        interventions = {"base": "", "reduced": "1.fc_in@0.1"}
        texts = generated_texts(scorer, store, split.examples[:4], interventions, new_tokens=3)
        runs = len(store.runs())
        assert generated_texts(scorer, store, split.examples[:4], interventions, new_tokens=3) == texts
        assert len(store.runs()) == runs
        assert generated_texts(scorer, store, [], interventions) == {"base": [], "reduced": []}
    for name, text in interventions.items():
        with applied(llama, text):
            expected = [generate(llama, [e.prompt], max_new_tokens=3, stops=("\n",))[0].strip() for e in examples[:4]]
        assert texts[name] == expected


def test_texts_that_the_book_itself_holds_are_not_written_twice(llama: LanguageModel, tmp_path: Path) -> None:
    how = Decoding(new_tokens=3, stops=("\n",))
    split = Task.of("t", [Example(c, f"The capital of {c} is", "Paris") for c in "ab"], scorer="contains", decoding=how).every
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as scorer:
        texts = generated_texts(scorer, store, split.examples, {"base": ""}, new_tokens=3)
        assert texts["base"] == [s.predicted for s in scorer("").scores]
        assert len(store.runs()) == 1


def test_where_the_task_judges_what_is_written_its_own_texts_are_taken(llama: LanguageModel, tmp_path: Path) -> None:
    examples = [Example(c, f"The capital of {c} is", "Paris") for c in "abcdef"]
    split = Task.of("t", examples, scorer="contains", decoding=Decoding(new_tokens=4)).every
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as scorer:
        texts = generated_texts(scorer, store, split.examples[2:4], {"base": ""})
        assert len(store.runs()) == 1
        assert texts["base"] == [s.predicted for s in scorer("").scores[2:4]]
