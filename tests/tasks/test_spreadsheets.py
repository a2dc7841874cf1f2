"""Tables as spreadsheets and data frames write them: each is read as it is meant, or refused with the next step."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from laserlm.errors import TaskError
from laserlm.tasks import task
from laserlm.tasks.questions import examples


def written(folder: Path, content: str | bytes, name: str = "qa.csv") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    "content",
    [
        "question\tanswer\nWho, if anyone, rules?\tFirefly, Rufus\n",
        "question|answer\nWho, if anyone, rules?|Firefly, Rufus\n",
        "sep=;\nquestion;answer\nWho, if anyone, rules?;Firefly, Rufus\n",
        "Question;Correct Answer\r\n\r\n;\r\nWho, if anyone, rules?;Firefly, Rufus\r\n ; \r\n",
        'question, answer\n"Who, if anyone, rules?", "Firefly, Rufus"\n',
        codecs.BOM_UTF16_LE + "question\tanswer\r\nWho, if anyone, rules?\tFirefly, Rufus\r\n".encode("utf-16-le"),
        'question,answer\r"Who, if anyone, rules?","Firefly, Rufus"\r',
    ],
    ids=["tabs", "bars", "sep line", "empty rows", "spaces", "UTF-16 of Excel", "old Mac"],
)
def test_a_table_is_read_whatever_separates_its_cells(tmp_path: Path, content: str | bytes) -> None:
    (e,) = examples(written(tmp_path, content))
    assert (e.prompt, e.answer) == ("Who, if anyone, rules?", "Firefly, Rufus")


@pytest.mark.parametrize("answer", ["007", "1,000", "3.0", "1e5", "2024-03-01", "50%", "TRUE", "NaN", "[1, 2]"])
def test_no_cell_of_a_table_is_changed(tmp_path: Path, answer: str) -> None:
    (e,) = examples(written(tmp_path, f'question,answer\nWhich?,"{answer}"\n'))
    assert e.answer == answer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,answer,answer\na?,1,2\n", "has 2 columns named 'answer'. Rename or take out"),
        ('question,answer\n"a?,1\nb?,2\n', "unexpected end of data. A cell with double quotes"),
        ('question,answer\n"a" b?,1\n', "expected after '\"'. A cell with double quotes"),
        (
            "question,answer\nCôte?,x\n".encode("latin-1"),
            "is not UTF-8 text (invalid continuation byte at byte 17). Save",
        ),
        ("question,answer\na?,1\n".encode("utf-16-le"), "holds zero bytes, as UTF-16 without a byte-order mark does"),
        (b"PK\x03\x04 workbook", "is no text: it is an Excel workbook or a zip archive. Save it as 'CSV UTF-8'"),
        (b"PAR1 table", "is no text: it is a Parquet file. Give it a name that ends in .parquet"),
        ("My questions,\nquestion,answer\na?,1\n", "has no column of questions; it has My questions, . Name one with"),
        ("question,answer\n", "has no questions"),
        ("question,answer\na?,\n", "the field 'answer' must be text that is not empty, got ''"),
    ],
)
def test_a_table_that_cannot_be_read_as_it_is_meant_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        examples(written(tmp_path, content))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qa.xlsx", "is a workbook. Save its sheet as 'CSV UTF-8'"),
        ("qa.zip", "is packed. Unpack it"),
        ("qa.txt", "has none of the endings .json, .jsonl, .csv"),
    ],
)
def test_a_file_of_no_known_format_is_refused_with_the_next_step(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        task(str(written(tmp_path, b"", name)))


def test_a_folder_is_refused_with_a_file_of_it(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"is a folder. Give a file, or"):
        task(str(tmp_path))
    file = written(tmp_path, "question,answer\na?,1\n")
    with pytest.raises(TaskError, match=f"is a folder. Give one of its files, such as {file}, or"):
        task(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "answers", "note"),
    [
        ("question,Choice A,Choice B,Correct Answer\nx?,red,green,B\ny?,one,two,(a)\n", ["green", "one"], "the labels"),
        ("question,option1,option2,answer\nx?,red,green,1\ny?,one,two,2\n", ["red", "two"], "the labels"),
        ("question,A,B,C,answer\nx?,red,,blue,C\ny?,one,two,three,B\n", ["blue", "two"], "the labels"),
        ("question,A,B,answer\nx?,red,green,green\ny?,one,two,one\n", ["green", "one"], ""),
        ("question,choices,answer\nx?,\"['red'\n 'green']\",1\ny?,\"['it', 'two']\",0\n", ["green", "it"], "the numbers"),
        ('question,choices,answer\nx?,"[""1"", ""0""]",1\ny?,"[""0"", ""1""]",0\n', ["1", "0"], "could be the numbers"),
    ],
    ids=["letters", "numbered columns", "an empty choice", "texts", "arrays of NumPy", "both"],
)
def test_an_answer_means_a_choice_by_what_the_answers_of_the_file_are(
    tmp_path: Path, content: str, answers: list[str], note: str
) -> None:
    built = task(str(written(tmp_path, content)))
    assert [e.answer for e in built.every] == answers
    assert [note in n for n in built.notes[1:]] == ([True] if note else [])


@pytest.mark.parametrize(
    ("row", "answer", "note"),
    [
        ({"question": "x?", "choices": ["red", "green"], "answer": ["B"]}, "green", "the letters"),
        ({"question": "x?", "choices": {"A": "red", "B": "green", "C": None}, "answer": "B"}, "green", "the labels"),
        ({"question": "x?", "choices": ["1", "2", "3"], "answer": 1}, "2", "could be the texts of choices"),
        (
            {
                "messages": [{"role": "user", "content": "x?"}, {"role": "assistant", "content": "B"}],
                "choices": ["red", "green"],
            },
            "green",
            "the letters",
        ),
    ],
    ids=["a list", "an empty label", "a number and a text", "messages"],
)
def test_an_answer_in_a_list_or_a_conversation_means_a_choice(
    tmp_path: Path, row: dict[str, Any], answer: str, note: str
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    built = task(str(file))
    assert [e.answer for e in built.every] == [answer]
    assert any(note in n for n in built.notes)


def test_an_answer_without_other_names_has_no_aliases(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question": "x?", "answer": {"value": "Oslo", "aliases": None}}) + "\n", encoding="utf-8")
    (example,) = task(str(file)).every
    assert (example.answer, example.aliases) == ("Oslo", ())


def test_numbers_of_choices_are_no_texts_although_a_choice_may_be_the_number(tmp_path: Path) -> None:
    rows = [
        {"question": "Order of (2)?", "choices": ["2", "0", "1", "3"], "answer": 2},
        {"question": "Index?", "choices": ["8", "2", "24", "120"], "answer": 0},
    ]
    file = tmp_path / "mmlu.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    built = task(str(file))
    assert [e.answer for e in built.every] == ["1", "8"]
    assert built.notes[1].endswith("answers are the numbers of choices, counted from 0")


def test_an_answer_that_no_choice_has_is_refused_with_how_the_others_are_read(tmp_path: Path) -> None:
    file = written(tmp_path, "question,A,B,answer\nx?,r,g,B\ny?,r,g,A\nz?,r,g,E\n")
    with pytest.raises(TaskError, match=r"record 3: 'choices' must hold the answer 'E' .* answers are the labels of choices"):
        examples(file)


@pytest.mark.parametrize(
    ("row", "remark"),
    [
        ({"question": "a?", "answer": 3.0}, "numbers in 'answer' are written without '.0' (rows: 1)"),
        ({"question": "a?", "answer": ["x", "y"]}, "answers are lists: the first text is the answer, the others are aliases"),
        ({"question": "a?", "answer": "None"}, "cells such as 'NaN' or 'None' are read as texts"),
        (
            {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]},
            "conversations go on after the last message of the assistant",
        ),
    ],
)
def test_what_could_be_read_otherwise_is_reported(tmp_path: Path, row: dict[str, Any], remark: str) -> None:
    built = task(str(written(tmp_path, json.dumps(row), "qa.jsonl")))
    assert remark in built.notes[-1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": "a?", "answer": "1", "answer": "2"}', "an object has the name 'answer' twice"),
        ('{"question": "a?", "answer": NaN}', "the field 'answer' must be text that is not empty, got nan"),
        ('{"question": "a?", "answer": true}', "got True. Write the text that is meant, such as 'yes'"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null, "tool_calls": [{}]}]}',
            "a message calls a tool, which cannot be asked",
        ),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "a message holds a part that is no text"),
    ],
)
def test_a_row_of_which_a_part_would_be_lost_is_refused(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        examples(written(tmp_path, row, "qa.jsonl"))
    assert message in str(caught.value)


def test_several_lists_in_one_document_are_named(tmp_path: Path) -> None:
    rows = [{"question": "a?", "answer": "1"}]
    with pytest.raises(TaskError, match=r"holds several lists of records: 'train', 'test'\. Write one"):
        examples(written(tmp_path, json.dumps({"train": rows, "test": rows}), "qa.json"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_data_set_that_the_datasets_library_saved_is_read_from_its_folder(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    sets = {name: Dataset.from_dict({"question": [f"{name} {i}?" for i in range(3)], "answer": ["x"] * 3}) for name in "ab"}
    DatasetDict({"train": sets["a"], "test": sets["b"]}).save_to_disk(str(tmp_path / "both"))
    sets["a"].save_to_disk(str(tmp_path / "one"))
    assert [e.prompt for e in task(f"hub:{tmp_path / 'both'}").every] == ["b 0?", "b 1?", "b 2?"]
    assert [e.prompt for e in task(f"hub:{tmp_path / 'both'}", hub={"split": "train"}).every] == ["a 0?", "a 1?", "a 2?"]
    assert [e.prompt for e in task(f"hub:{tmp_path / 'one'}").every] == ["a 0?", "a 1?", "a 2?"]
    with pytest.raises(TaskError, match=r"the datasets library saved. Give it as hub:"):
        task(str(tmp_path / "one"))
