"""A user's own questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from laserlm.errors import TaskError
from laserlm.tasks import Example, task
from laserlm.tasks.jsonl import examples

GOOD = {"prompt": "The capital of Freedonia is", "answer": "Firefly"}


def written(folder: Path, *rows: Any) -> Path:
    """Write rows (objects, or raw lines as text) as a JSON-lines file."""
    file = folder / "mine.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_prompt_and_answer_are_enough(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD, "", {"prompt": "Capitale du Ceará :", "answer": "Fortaleza"})
    assert examples(file) == [
        Example(id="line 1", prompt="The capital of Freedonia is", answer="Firefly"),
        Example(id="line 3", prompt="Capitale du Ceará :", answer="Fortaleza"),
    ]


def test_every_field_is_kept(tmp_path: Path) -> None:
    row = GOOD | {"choices": ["Firefly", "Teasdale"], "id": "q1", "group": "capital", "fact": "f1", "popularity": 12}
    assert examples(written(tmp_path, row)) == [
        Example(
            id="q1",
            prompt="The capital of Freedonia is",
            answer="Firefly",
            choices=("Firefly", "Teasdale"),
            group="capital",
            fact="f1",
            popularity=12.0,
        )
    ]


def test_the_prompt_is_taken_as_written_with_its_spaces(tmp_path: Path) -> None:
    assert examples(written(tmp_path, {"prompt": " Q: who?\nA: ", "answer": "me"}))[0].prompt == " Q: who?\nA: "


def test_fields_that_mean_nothing_here_are_left_aside(tmp_path: Path) -> None:
    assert examples(written(tmp_path, GOOD | {"comment": {"by": "hand"}})) == examples(written(tmp_path, GOOD))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "answer": ', "not valid JSON"),
        ('["a", "b"]', "an object is needed"),
        ({"answer": "b"}, "the field 'prompt' is missing"),
        ({"prompt": "a"}, "the field 'answer' is missing"),
        (GOOD | {"prompt": ""}, "the field 'prompt' must be text that is not empty, got ''"),
        (GOOD | {"prompt": None}, "the field 'prompt' must be text that is not empty, got None"),
        (GOOD | {"prompt": ["a"]}, "the field 'prompt' must be text that is not empty, got ['a']"),
        (GOOD | {"answer": " "}, "the field 'answer' must be text that is not empty, got ' '"),
        (GOOD | {"answer": 4}, "the field 'answer' must be text that is not empty, got 4"),
        (GOOD | {"choices": "Firefly"}, "the field 'choices' must be of type list, got 'Firefly'"),
        (GOOD | {"choices": {"a": 1}}, "the field 'choices' must be of type list"),
        (GOOD | {"choices": ["Firefly", 3]}, "the field 'choices' must be a list of different texts"),
        (GOOD | {"choices": ["Firefly", ["Teasdale"]]}, "the field 'choices' must be a list of different texts"),
        (GOOD | {"choices": ["Firefly", ""]}, "the field 'choices' must be a list of different texts"),
        (GOOD | {"choices": ["Firefly", "Teasdale", "Firefly"]}, "the field 'choices' must be a list of different texts"),
        (GOOD | {"choices": ["Firefly"]}, "'choices' must hold the answer 'Firefly' and one more at least"),
        (GOOD | {"choices": ["Teasdale", "Chicolini"]}, "'choices' must hold the answer 'Firefly'"),
        (GOOD | {"choices": ["firefly", "Teasdale"]}, "'choices' must hold the answer 'Firefly'"),
        (GOOD | {"choices": ["Firefly", "Teasdale"]}, "some rows have 'choices' and some have not"),
        (GOOD | {"id": "first"}, "the id 'first' is on line 1 too. Ids must differ."),
        (GOOD | {"popularity": "much"}, "the field 'popularity' must be a finite number, got 'much'"),
        (GOOD | {"popularity": [1]}, "the field 'popularity' must be a finite number, got [1]"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, row: Any, message: str) -> None:
    file = written(tmp_path, GOOD | {"id": "first"}, "", row, GOOD)
    with pytest.raises(TaskError) as caught:
        examples(file)
    assert f"{file}, line 3: {message}" in str(caught.value)


def test_a_row_without_choices_among_rows_with_them_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD | {"choices": ["Firefly", "Teasdale"]}, GOOD)
    with pytest.raises(TaskError, match=r"line 2: some rows have 'choices' and some have not\. Put them in two files"):
        examples(file)


@pytest.mark.parametrize(("field", "value"), [("choices", []), ("popularity", True), ("popularity", float("nan"))])
def test_an_empty_list_of_choices_and_a_popularity_that_is_no_number_are_refused(
    tmp_path: Path, field: str, value: Any
) -> None:
    with pytest.raises(TaskError, match=f"line 1: .*'{field}'"):
        examples(written(tmp_path, GOOD | {field: value}))


def test_a_row_without_an_id_does_not_clash_with_one_that_has_its_line_number(tmp_path: Path) -> None:
    assert len({e.id for e in examples(written(tmp_path, GOOD | {"id": 2}, GOOD))}) == 2


def test_null_is_the_same_as_leaving_a_field_out(tmp_path: Path) -> None:
    nulls = GOOD | {"id": None, "group": None, "fact": None, "choices": None, "popularity": None}
    assert examples(written(tmp_path, nulls)) == examples(written(tmp_path, GOOD))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_a_file_without_questions_says_what_to_write(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(TaskError) as caught:
        examples(file)
    assert f"{file} has no questions" in str(caught.value)
    assert "one JSON object with 'prompt' and 'answer' on each line" in str(caught.value)


def test_the_task_is_named_after_its_file_and_scores_answers(tmp_path: Path) -> None:
    file = written(tmp_path, *(GOOD | {"id": f"q{i}", "prompt": f"Question {i} is"} for i in range(10)))
    dataset = task(f"jsonl:{file}")
    assert (dataset.name, dataset.every.scorer, dataset.source) == (
        "jsonl:mine",
        "answer",
        "questions of mine.jsonl",
    )
    assert (len(dataset.validation), len(dataset.test)) == (2, 8)
    assert dataset == task("jsonl", data=file)


def test_rows_with_choices_are_scored_by_choice_by_default(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD | {"choices": ["Firefly", "Teasdale"]})
    assert task(f"jsonl:{file}").every.scorer == "choice"
    assert task(f"jsonl:{file}", scorer="answer").every.scorer == "answer"


def test_rows_of_one_fact_are_not_parted_and_rewrite_keeps_the_first(tmp_path: Path) -> None:
    rows = [
        GOOD | {"prompt": f"Question {f}, phrasing {i}, is", "id": f"{f}/{i}", "fact": f"fact {f}"}
        for i in range(2)
        for f in range(6)
    ]
    file = written(tmp_path, *rows)
    dataset = task(f"jsonl:{file}")
    assert len(dataset.validation) == 2
    assert len({e.fact for e in dataset.validation}) == 1
    assert [e.id for e in task(f"jsonl:{file}", phrasings="rewrite").every] == [f"{f}/0" for f in range(6)]


def test_the_hash_is_that_of_the_content_whatever_the_file_looks_like(tmp_path: Path) -> None:
    plain = task(f"jsonl:{written(tmp_path, GOOD | {'id': 'q'})}").every.hash
    turned = '{ "id":"q",   "answer" : "Fire\\u0066ly", "prompt": "The capital of Freedonia is" }'
    assert task(f"jsonl:{written(tmp_path, turned)}").every.hash == plain


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no data file .*nothing\.jsonl"):
        task(f"jsonl:{tmp_path / 'nothing.jsonl'}")


def test_a_file_with_equal_rows_is_told_and_each_stays_on_one_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"Question {i % 5}:", "answer": "yes", "choices": ["yes", "no"]} for i in range(15)]
    made = task(f"jsonl:{written(tmp_path, *rows)}")
    assert not {e.prompt for e in made.validation} & {e.prompt for e in made.test}
    assert (len(made.validation), len(made.test)) == (3, 12)
    assert "the task jsonl:mine has 15 rows of 5 different questions" in caplog.text
