"""CounterFact files in their public schema."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from laserlm.errors import TaskError
from laserlm.tasks import task
from laserlm.tasks.datasets.counterfact import examples as of_records
from laserlm.tasks.example import Example
from laserlm.tasks.files import read_records


def record(case_id: int, subject: str, answer: str) -> dict[str, Any]:
    """Return a fictional record in the public schema."""
    return {
        "case_id": case_id,
        "pararel_idx": 1000 + case_id,
        "requested_rewrite": {
            "prompt": "{} is the capital of",
            "relation_id": "P1376",
            "target_new": {"str": "Osterlich", "id": "Q2"},
            "target_true": {"str": answer, "id": "Q1"},
            "subject": subject,
        },
        "paraphrase_prompts": [f"He was born in 1931. {subject} governs", f"The seat of {subject} rules over"],
        "neighborhood_prompts": ["Tomania City is the capital of"],
        "attribute_prompts": [],
        "generation_prompts": [f"{subject} is known for"],
    }


RECORDS = [record(7, "Firefly Town", "Freedonia"), record(3, "Trentino", "Sylvania"), record(11, "Tomania City", "Tomania")]


def examples(file: Path) -> list[Example]:
    """Return the examples of a file."""
    return of_records(read_records(file))


def write_records(folder: Path, records: Any) -> Path:
    """Write records as a CounterFact file."""
    file = folder / "counterfact.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def test_a_record_is_its_rewrite_prompt_and_paraphrases_in_that_order(tmp_path: Path) -> None:
    first = examples(write_records(tmp_path, RECORDS))[:3]
    assert [e.prompt for e in first] == [
        "Firefly Town is the capital of",
        "He was born in 1931. Firefly Town governs",
        "The seat of Firefly Town rules over",
    ]
    assert [e.id for e in first] == ["7/rewrite", "7/paraphrase1", "7/paraphrase2"]
    assert {e.answer for e in first} == {"Freedonia"}
    assert {e.group for e in first} == {"P1376"}
    assert {e.fact for e in first} == {"7"}


def test_records_stay_in_file_order(tmp_path: Path) -> None:
    rows = examples(write_records(tmp_path, RECORDS))
    assert [e.fact for e in rows] == ["7"] * 3 + ["3"] * 3 + ["11"] * 3
    assert [e.answer for e in rows[::3]] == ["Freedonia", "Sylvania", "Tomania"]


def test_the_task_scores_the_next_token_on_the_published_split(tmp_path: Path) -> None:
    records = [record(i, f"Town {i}", f"Land {i}") for i in range(10)]
    dataset = task("counterfact", data=write_records(tmp_path, records))
    assert (dataset.name, dataset.every.scorer) == ("counterfact", "next_token")
    assert [e.id for e in dataset.validation] == [f"{i}/{p}" for i in (0, 1) for p in ("rewrite", "paraphrase1", "paraphrase2")]
    assert len(dataset.test) == 24
    assert "MIT" in dataset.source


def test_the_split_phrasings_and_scorer_of_the_task_can_be_chosen(tmp_path: Path) -> None:
    file = write_records(tmp_path, [record(i, f"Town {i}", f"Land {i}") for i in range(10)])
    dataset = task("counterfact", data=file, split="shuffled", seed=3, phrasings="rewrite", scorer="answer")
    assert [e.id for e in dataset.every] == [f"{i}/rewrite" for i in range(10)]
    assert dataset.every.scorer == "answer"
    assert len(dataset.validation) == 2
    again = task("counterfact", data=str(file), split="shuffled", seed=4, phrasings="rewrite")
    assert {e.id for e in dataset.validation} != {e.id for e in again.validation}


def test_a_subject_in_braces_is_not_taken_for_a_place(tmp_path: Path) -> None:
    assert examples(write_records(tmp_path, [record(1, "{odd} {}", "Freedonia")]))[0].prompt == "{odd} {} is the capital of"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("requested_rewrite", "text"),
        ("requested_rewrite.prompt", 3),
        ("requested_rewrite.prompt", ""),
        ("requested_rewrite.prompt", "no place for the subject"),
        ("requested_rewrite.subject", None),
        ("requested_rewrite.subject", " "),
        ("requested_rewrite.relation_id", 1376),
        ("requested_rewrite.target_true", "Freedonia"),
        ("requested_rewrite.target_true.str", ["Freedonia"]),
        ("requested_rewrite.target_true.str", ""),
        ("paraphrase_prompts", "one text"),
        ("paraphrase_prompts", None),
        ("paraphrase_prompts", [1, 2]),
        ("paraphrase_prompts", ["", "b"]),
        ("case_id", "7"),
        ("case_id", None),
    ],
)
def test_a_malformed_field_is_named_with_its_record(tmp_path: Path, path: str, value: Any) -> None:
    check_refused(tmp_path, path, lambda holder, name: holder.__setitem__(name, value))


@pytest.mark.parametrize(
    "path",
    [
        "requested_rewrite",
        "requested_rewrite.prompt",
        "requested_rewrite.subject",
        "requested_rewrite.relation_id",
        "requested_rewrite.target_true",
        "requested_rewrite.target_true.str",
        "paraphrase_prompts",
        "case_id",
    ],
)
def test_a_missing_field_is_named_with_its_record(tmp_path: Path, path: str) -> None:
    check_refused(tmp_path, path, lambda holder, name: holder.pop(name))


def check_refused(folder: Path, path: str, spoil: Callable[[dict[str, Any], str], Any]) -> None:
    """Check that the second of three records is refused by name when the field at ``path`` is spoilt."""
    records = copy.deepcopy(RECORDS)
    *parents, name = path.split(".")
    holder = records[1]
    for parent in parents:
        holder = holder[parent]
    spoil(holder, name)
    file = write_records(folder, records)
    with pytest.raises(TaskError) as caught:
        examples(file)
    assert f"{file}, record 2" in str(caught.value)
    assert f"'{path}" in str(caught.value)


def test_a_record_that_is_no_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"record 2: the field 'requested_rewrite\.prompt' is missing"):
        examples(write_records(tmp_path, [RECORDS[0], "text"]))


def test_two_records_with_one_case_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="'7/rewrite'"):
        task("counterfact", data=write_records(tmp_path, [*RECORDS, RECORDS[0]]))


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "counterfact.json"
    text = json.dumps(RECORDS, indent=1)
    line = text[: text.index('"subject": "Trentino"')].count("\n") + 1
    file.write_text(text.replace('"subject": "Trentino"', '"subject": Trentino'), encoding="utf-8")
    with pytest.raises(TaskError) as caught:
        task("counterfact", data=file)
    assert f"{file}, line {line}: not valid JSON" in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}"])
def test_a_file_without_records_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "counterfact.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(TaskError, match="a list of records is needed"):
        task("counterfact", data=file)


@pytest.mark.realdata
def test_real_records_have_three_phrasings_each_and_keep_their_text(real_data: Path) -> None:
    file = real_data / "counterfact" / "counterfact_500.json"
    records = json.loads(file.read_text(encoding="utf-8"))
    dataset = task("counterfact", data=file)
    assert len(records) == 500
    assert len(dataset.every) == 1500
    assert (len(dataset.validation), len(dataset.test)) == (300, 1200)
    for number, raw in enumerate(records):
        rewrite, *paraphrases = dataset.every.examples[3 * number : 3 * number + 3]
        asked = raw["requested_rewrite"]
        before, after = asked["prompt"].split("{}")
        assert rewrite.prompt == before + asked["subject"] + after
        assert [e.prompt for e in paraphrases] == raw["paraphrase_prompts"]
        assert {e.answer for e in (rewrite, *paraphrases)} == {asked["target_true"]["str"]}
