"""A user's own questions."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from laserlm.errors import TaskError
from laserlm.scoring.statistics import paired_difference
from laserlm.tasks import Example, task
from laserlm.tasks.questions import examples

GOOD = {"prompt": "The capital of Freedonia is", "answer": "Firefly"}


def write_rows(folder: Path, *rows: Any) -> Path:
    """Write rows (objects, or raw lines as text) as a JSON-lines file."""
    file = folder / "mine.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_prompt_and_answer_are_enough(tmp_path: Path) -> None:
    file = write_rows(tmp_path, GOOD, "", {"prompt": "Capitale du Ceará :", "answer": "Fortaleza"})
    assert examples(file) == [
        Example(id="line 1", prompt="The capital of Freedonia is", answer="Firefly"),
        Example(id="line 3", prompt="Capitale du Ceará :", answer="Fortaleza"),
    ]


def test_every_field_is_kept(tmp_path: Path) -> None:
    row = GOOD | {"choices": ["Firefly", "Teasdale"], "id": "q1", "group": "capital", "fact": "f1", "popularity": 12}
    assert examples(write_rows(tmp_path, row)) == [
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
    assert examples(write_rows(tmp_path, {"prompt": " Q: who?\nA: ", "answer": "me"}))[0].prompt == " Q: who?\nA: "


def test_fields_that_mean_nothing_here_are_left_aside(tmp_path: Path) -> None:
    assert examples(write_rows(tmp_path, GOOD | {"comment": {"by": "hand"}})) == examples(write_rows(tmp_path, GOOD))


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
        (GOOD | {"answer": True}, "the field 'answer' must be text that is not empty, got True"),
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
    file = write_rows(tmp_path, GOOD | {"id": "first"}, "", row, GOOD)
    with pytest.raises(TaskError) as caught:
        examples(file)
    assert f"{file}, line 3: {message}" in str(caught.value)


def test_a_row_without_choices_among_rows_with_them_is_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path, GOOD | {"choices": ["Firefly", "Teasdale"]}, GOOD)
    with pytest.raises(TaskError, match=r"line 2: some rows have 'choices' and some have not\. Put them in two files"):
        examples(file)


@pytest.mark.parametrize(("field", "value"), [("choices", []), ("popularity", True), ("popularity", float("nan"))])
def test_an_empty_list_of_choices_and_a_popularity_that_is_no_number_are_refused(
    tmp_path: Path, field: str, value: Any
) -> None:
    with pytest.raises(TaskError, match=f"line 1: .*'{field}'"):
        examples(write_rows(tmp_path, GOOD | {field: value}))


def test_a_row_without_an_id_does_not_clash_with_one_that_has_its_line_number(tmp_path: Path) -> None:
    assert len({e.id for e in examples(write_rows(tmp_path, GOOD | {"id": 2}, GOOD))}) == 2


def test_null_is_the_same_as_leaving_a_field_out(tmp_path: Path) -> None:
    nulls = GOOD | {"id": None, "group": None, "fact": None, "choices": None, "popularity": None}
    assert examples(write_rows(tmp_path, nulls)) == examples(write_rows(tmp_path, GOOD))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_a_file_without_questions_says_what_to_write(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(TaskError) as caught:
        examples(file)
    assert f"{file} has no questions" in str(caught.value)
    assert "one JSON object with 'prompt' and 'answer' on each line" in str(caught.value)


def test_the_task_is_named_after_its_file_and_scores_answers(tmp_path: Path) -> None:
    file = write_rows(tmp_path, *(GOOD | {"id": f"q{i}", "prompt": f"Question {i} is"} for i in range(10)))
    dataset = task(f"jsonl:{file}")
    assert (dataset.name, dataset.every.scorer, dataset.source) == (
        "jsonl:mine",
        "answer",
        "questions of mine.jsonl",
    )
    assert (len(dataset.validation), len(dataset.test)) == (2, 8)
    assert dataset == task("jsonl", data=file)


def test_rows_with_choices_are_scored_by_choice_by_default(tmp_path: Path) -> None:
    file = write_rows(tmp_path, GOOD | {"choices": ["Firefly", "Teasdale"]})
    assert task(f"jsonl:{file}").every.scorer == "choice"
    assert task(f"jsonl:{file}", scorer="answer").every.scorer == "answer"


def test_rows_of_one_fact_are_not_parted_and_rewrite_keeps_the_first(tmp_path: Path) -> None:
    rows = [
        GOOD | {"prompt": f"Question {f}, phrasing {i}, is", "id": f"{f}/{i}", "fact": f"fact {f}"}
        for i in range(2)
        for f in range(6)
    ]
    file = write_rows(tmp_path, *rows)
    dataset = task(f"jsonl:{file}")
    assert len(dataset.validation) == 2
    assert len({e.fact for e in dataset.validation}) == 1
    assert [e.id for e in task(f"jsonl:{file}", phrasings="rewrite").every] == [f"{f}/0" for f in range(6)]


def test_the_hash_is_that_of_the_content_whatever_the_file_looks_like(tmp_path: Path) -> None:
    plain = task(f"jsonl:{write_rows(tmp_path, GOOD | {'id': 'q'})}").every.hash
    turned = '{ "id":"q",   "answer" : "Fire\\u0066ly", "prompt": "The capital of Freedonia is" }'
    assert task(f"jsonl:{write_rows(tmp_path, turned)}").every.hash == plain


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no data file .*nothing\.jsonl"):
        task(f"jsonl:{tmp_path / 'nothing.jsonl'}")


def test_a_file_with_equal_rows_is_reported_and_each_stays_on_one_side(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"Question {i % 5}:", "answer": "yes", "choices": ["yes", "no"]} for i in range(15)]
    questions = task(f"jsonl:{write_rows(tmp_path, *rows)}")
    assert not {e.prompt for e in questions.validation} & {e.prompt for e in questions.test}
    assert (len(questions.validation), len(questions.test)) == (3, 12)
    assert "the task jsonl:mine has 15 rows of 5 different questions" in caplog.text


CSV = 'question,answer,category,notes\n"Who, or what, rules Freedonia?",Firefly,rule,x\nWho rules Sylvania?,Trentino,rule,y\n'


def test_a_table_s_columns_are_found_by_their_usual_names_and_reported(tmp_path: Path) -> None:
    file = tmp_path / "qa.csv"
    file.write_text(CSV)
    built = task(str(file))
    assert [(e.prompt, e.answer, e.group, e.id) for e in built.every] == [
        ("Who, or what, rules Freedonia?", "Firefly", "rule", "record 1"),
        ("Who rules Sylvania?", "Trentino", "rule", "record 2"),
    ]
    assert built.name == "questions:qa"
    (note,) = built.notes
    assert note == f"{file}: prompt from 'question', answer from 'answer', group from 'category'; not used: 'notes'"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode(),
        CSV.encode("utf-16"),
        CSV.replace(",", ";").replace("Who; or what;", "Who, or what,").encode(),
    ],
    ids=["BOM and CRLF", "UTF-16", "semicolons"],
)
def test_tables_of_pandas_and_excel_are_read_alike(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plain.csv").write_text(CSV)
    (tmp_path / "other.csv").write_bytes(content)
    assert examples(tmp_path / "other.csv") == examples(tmp_path / "plain.csv")


def rows_of(kind: str, rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write rows in one of the formats."""
    file = folder / f"qa{kind}"
    if kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif kind == ".json":
        file.write_text(json.dumps(rows))
    elif kind == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="") as out:
            table = csv.DictWriter(out, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    return file


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_questions(tmp_path: Path, kind: str) -> None:
    rows = [{"question": f"Who is {i}?", "choices": [f"Ann {i}", f"Bob {i}"], "label": 1, "relation": "name"} for i in range(9)]
    result = task(str(rows_of(kind, rows, tmp_path))).every
    assert [(e.prompt, e.answer, e.choices, e.group) for e in result] == [
        (f"Who is {i}?", f"Bob {i}", (f"Ann {i}", f"Bob {i}"), "name") for i in range(9)
    ]
    assert result.scorer == "choice"


def test_an_array_around_which_there_is_an_object_and_columns_of_pandas_are_lists_of_rows(tmp_path: Path) -> None:
    rows = [{"input": "Who rules?", "target": "Firefly"}, {"input": "Who dances?", "target": "Teasdale"}]
    plain = examples(rows_of(".json", rows, tmp_path))
    columns = {name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]}
    for document in ({"version": 1, "data": rows}, columns):
        file = tmp_path / "other.json"
        file.write_text(json.dumps(document))
        assert examples(file) == plain


def test_columns_may_be_named(tmp_path: Path) -> None:
    file = rows_of(".csv", [{"frage": "Wer?", "antwort": "Ann", "answer": "no"}], tmp_path)
    with pytest.raises(
        TaskError, match=r"no column of questions; it has frage, antwort, answer\. Name one with --prompt-column"
    ):
        task(str(file))
    (e,) = task(str(file), columns={"prompt": "frage", "answer": "antwort"}).every
    assert (e.prompt, e.answer) == ("Wer?", "Ann")
    with pytest.raises(TaskError, match="has no column 'fragen' for the prompt; it has frage, antwort, answer"):
        task(str(file), columns={"prompt": "fragen"})


def test_one_column_for_each_choice_and_the_letter_of_the_answer(tmp_path: Path) -> None:
    rows = [{"question": "Two and two?", "A": "3", "B": "4", "C": "5", "D": "6", "answer": "B"}]
    (e,) = examples(rows_of(".csv", rows, tmp_path))
    assert (e.choices, e.answer) == (("3", "4", "5", "6"), "4")


@pytest.mark.parametrize(("name", "meant"), [("choises", "choices"), ("mesages", "messages"), ("Goup", "group")])
def test_a_misspelt_field_is_refused_with_the_one_that_is_meant(tmp_path: Path, name: str, meant: str) -> None:
    with pytest.raises(TaskError, match=f"unknown field '{name}'. Did you mean '{meant}'"):
        examples(write_rows(tmp_path, GOOD | {name: ["Firefly", "Teasdale"]}))


def test_many_bad_rows_are_counted_and_the_first_five_shown(tmp_path: Path) -> None:
    rows = [GOOD | {"id": str(i)} | ({"answer": ""} if i >= 10 else {}) for i in range(60)]
    with pytest.raises(TaskError) as caught:
        examples(write_rows(tmp_path, *rows))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("50 of 60 rows of ")
    assert [line.partition(": ")[0].rpartition(", ")[2] for line in lines[1:6]] == [f"line {i}" for i in range(11, 16)]
    assert lines[6:] == ["  and 45 more"]


def test_the_last_message_of_the_assistant_is_the_answer(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Capital of Norway?"},
        {"role": "assistant", "content": "Oslo"},
        {"role": "user", "content": [{"type": "text", "text": "And of Italy?"}]},
        {"role": "assistant", "content": "Rome"},
    ]
    (e,) = examples(write_rows(tmp_path, {"messages": messages}))
    assert e.answer == "Rome"
    assert e.messages == (
        ("system", "Be short."),
        ("user", "Capital of Norway?"),
        ("assistant", "Oslo"),
        ("user", "And of Italy?"),
    )
    turns = [{"from": "human", "value": "Capital of Italy?"}, {"from": "gpt", "value": "Rome"}]
    (e,) = examples(write_rows(tmp_path, {"conversations": turns}))
    assert (e.prompt, e.answer, e.messages) == ("Capital of Italy?", "Rome", (("user", "Capital of Italy?"),))
    with pytest.raises(TaskError, match="must hold a question and, last, the assistant's answer"):
        examples(write_rows(tmp_path, {"messages": messages[:2]}))


def test_questions_are_asked_in_a_conversation_and_texts_to_be_continued_are_not(tmp_path: Path) -> None:
    ask = {"prompt": "What is the capital of Norway?", "answer": "Oslo"}
    assert [e.messages for e in task(str(write_rows(tmp_path, ask))).every] == [(("user", ask["prompt"]),)]
    assert [e.messages for e in task(str(write_rows(tmp_path, GOOD))).every] == [()]
    asked = task(str(write_rows(tmp_path, GOOD)), system="Be short.").every
    assert [(e.messages, e.needs_template) for e in asked] == [((("system", "Be short."), ("user", GOOD["prompt"])), True)]
    assert [e.messages for e in task(str(write_rows(tmp_path, ask)), chat=False).every] == [()]
    with pytest.raises(TaskError, match="a system text is for a conversation"):
        task(str(write_rows(tmp_path, ask)), chat=False, system="Be short.")


def test_a_task_without_a_conversation_has_the_hash_that_it_had_before_there_were_any(tmp_path: Path) -> None:
    before = {
        "id": "q", "prompt": GOOD["prompt"], "answer": "Firefly", "choices": [], "group": "", "fact": "q", "popularity": None,
        "aliases": [], "joint": " ", "masked": "", "passage": "", "program": "", "pairs": [], "right": 0, "subject": "",
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps([before], sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    assert task(str(write_rows(tmp_path, GOOD | {"id": "q"}))).every.hash == digest
    assert task(str(write_rows(tmp_path, GOOD | {"id": "q"})), chat=True).every.hash != digest


@pytest.mark.parametrize(
    ("prompt", "joint"),
    [
        ("法国的首都是", ""),
        ("日本の首都は", ""),
        ("质：首都？", ""),
        ("เมืองหลวงคือ", ""),
        ("프랑스의 수도는", " "),
        ("Paris", " "),
    ],
)
def test_scripts_without_spaces_get_none_before_the_answer(tmp_path: Path, prompt: str, joint: str) -> None:
    assert examples(write_rows(tmp_path, {"prompt": prompt, "answer": "x"}))[0].joint == joint
    assert examples(write_rows(tmp_path, {"prompt": prompt, "answer": "x", "joint": "_"}))[0].joint == "_"


def test_of_many_rows_a_seeded_sample_is_taken_and_reported(tmp_path: Path) -> None:
    file = write_rows(tmp_path, *(GOOD | {"prompt": f"Town {i} is"} for i in range(40)))
    built, again, other = (task(str(file), max_rows=10, seed=seed) for seed in (3, 3, 4))
    assert len(built.every) == 10
    assert built == again
    assert {e.id for e in built.every} != {e.id for e in other.every}
    assert "40 rows: a random sample of 10 is used (seed 3)" in built.notes[0]


def test_few_questions_are_reported_with_the_narrowest_interval(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task(str(write_rows(tmp_path, *(GOOD | {"prompt": f"Town {i} is"} for i in range(20)))))
    low, high = paired_difference(0, 0, 16)
    assert "has 4 questions to choose on and 16 to measure on" in caplog.text
    assert f"{100 * low:+.1f} to {100 * high:+.1f} points" in caplog.text


KNOWN = {"known_id": 0, "subject": "Trentino", "attribute": "Sylvania", "template": "{} governs", "prompt": "Trentino governs"}
EASY_EDIT = {"prompt": "Trentino governs", "subject": "Trentino", "ground_truth": ["Sylvania"], "target_new": "Freedonia"}
TRACING = {"prompt": "Trentino governs", "subject": "Trentino", "target_true": " Sylvania", "target_false": " Freedonia"}


@pytest.mark.parametrize("record", [KNOWN, EASY_EDIT, TRACING], ids=["known_1000", "EasyEdit", "counterfact-tracing"])
def test_other_schemas_of_counterfact_are_recognised(tmp_path: Path, record: dict[str, Any]) -> None:
    file = rows_of(".json", [record], tmp_path)
    for built in (task(str(file)), task("counterfact", data=file)):
        (e,) = built.every
        assert (e.prompt, e.answer, e.subject, e.messages) == ("Trentino governs", "Sylvania", "Trentino", ())
        assert (built.every.scorer, built.split_by) == ("next_token", "paper")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_questions_of_a_data_set_of_the_hub_are_read_with_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [{"text": f"{split} {i} was fine.", "label": i % 2} for i in range(4)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n      class_label:\n"
        "        names:\n          '0': good\n          '1': bad\n---\n"
    )
    built = task(f"hub:{folder}")
    assert [(e.prompt, e.answer) for e in built.every] == [(f"test {i} was fine.", ("good", "bad")[i % 2]) for i in range(4)]
    assert built.notes[0] == f"hub:{folder}, split test, 4 rows"
    assert task(f"hub:{folder}", hub={"split": "train"}).every.examples[0].prompt == "train 0 was fine."
    with pytest.raises(TaskError, match=r"from the hub: .*--hub-split"):
        task(f"hub:{folder}", hub={"split": "dev"})
