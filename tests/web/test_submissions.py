"""What is passed on is whole and says no more than it should; what comes from elsewhere is checked to the last figure."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest

from laserlm.errors import ReportError
from laserlm.models import LanguageModel
from laserlm.models.bundled import HUB_ID
from laserlm.searching import search
from laserlm.searching.config import Metric, Strategy
from laserlm.store import Store
from laserlm.tasks import Example, Scorer, Task
from laserlm.web.submissions import MAX_BYTES, _schema, add, find_problems, load_submission, public_name, submission

Record = Callable[..., str]
INTERVENTIONS = [
    "27.fc_in@0.01",
    "24.fc_in@r40",
    "20-27.mlp@0.1",
    "all.fc_out@0",
    "top4.all@1",
    "encoder.3.fc_in@0.1:bottom",
    "1.experts.2.fc_up@0.25:reference",
    "1.fc_in@0.5:bottom:split4",
    "1.fc_in@0.5+2.fc_in@0.5",
    "1.fc_in@drop0,7-9+encoder.2.fc_in@drop3",
    "1.fc_in@scale0=0.5,7-9=-0.25",
]


@pytest.fixture
def good(store: Store, record: Record) -> dict[str, Any]:
    return submission(store.find(record()), credit="Ann", report="https://example.org/a.html")


def test_a_search_of_a_model_becomes_a_submission_with_its_own_figures(llama: LanguageModel, tmp_path: Path) -> None:
    cities = ["Paris", "Rome", "Oslo", "Lisbon", "Madrid"]
    rows = [
        Example(f"{a}{b}", f"The capital of {a} and {b} is", cities[(ord(a) + ord(b)) % 5]) for a in "abcde" for b in "uvwx"
    ]
    task = Task.of("example", rows, scorer="first_token")
    file = tmp_path / "runs.db"
    results = search(llama, task, strategy="exhaustive", grid="0-1.mlp@0.5,0.1", metric="loss", store=file, seed=3)
    assert results.best
    with Store.open(file) as store:
        entry = submission(store.find(results.run))
    assert entry["model"] == {
        "name": public_name(llama.name),
        "sha256": llama.hash,
        "config": results.settings["config"],
        "dtype": "float32",
    }
    assert entry["task"] == {
        "name": "example",
        "scorer": "first_token",
        "validation": task.validation.hash,
        "test": task.test.hash,
    }
    assert entry["intervention"] == str(results.best)
    result, test = entry["result"], results.test
    assert (result["n"], result["corrected"], result["broken"]) == (len(task.test), test.corrected, test.broken)
    assert (result["base"], result["edited"]) == (
        {"accuracy": test.base, "loss": test.base_loss},
        {"accuracy": test.edited, "loss": test.edited_loss},
    )
    assert (result["gain"], result["mcnemar_p"]) == (test.gain, test.mcnemar_p)
    assert (tuple(result["interval"]), tuple(result["loss_interval"])) == (test.interval, test.loss_interval)
    assert entry["search"] == {
        "strategy": "exhaustive",
        "metric": "loss",
        "grid": "0-1.mlp@0.5,0.1",
        "seed": 3,
        "candidates": 12,
        "scored": 12,
        "complete": True,
    }
    assert set(entry["versions"]) == {"laserlm", "python", "torch", "transformers", "tokenizers", "safetensors"}
    assert "credit" not in entry
    assert find_problems(json.loads(json.dumps(entry))) == []


def test_it_names_no_folder_user_or_machine(store: Store, record: Record) -> None:
    text = json.dumps(submission(store.find(record(model="/home/ann/models/mine.gguf"))))
    assert "ann" not in text
    assert "Linux" not in text
    assert json.loads(text)["model"]["name"] == "mine.gguf"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("EleutherAI/gpt-j-6b", "EleutherAI/gpt-j-6b"),
        ("gpt2", "gpt2"),
        ("/home/ann/models/mine/", "mine"),
        ("../models/mine", "mine"),
        ("./mine", "mine"),
        ("~/mine", "mine"),
        ("a/b/c", "c"),
        (r"C:\Users\ann\mine", "mine"),
        ("models\\mine", "mine"),
        ("/", "a local folder"),
        (".", "a local folder"),
    ],
)
def test_of_a_path_the_last_part_is_reported(name: str, shown: str) -> None:
    assert public_name(name) == shown


def test_a_folder_that_looks_like_a_hub_id_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret" / "mine").mkdir(parents=True)
    assert public_name("secret/mine") == "mine"
    assert HUB_ID.endswith(public_name("bundled").partition(" ")[0])


def test_a_perplexity_has_no_accuracy(store: Store, record: Record) -> None:
    result = submission(store.find(record(scorer="perplexity")))["result"]
    assert result == {
        "n": 1000,
        "base": {"accuracy": None, "loss": 3.5},
        "edited": {"accuracy": None, "loss": 3.25},
        "gain": None,
        "loss_interval": [-0.3, -0.2],
    }


def test_how_a_model_writes_is_reported(store: Store, record: Record) -> None:
    how = {"new_tokens": 20, "stops": ["/x"], "masks": 5, "samples": 1, "temperature": 0.8, "seed": 0, "run_programs": True}
    entry = submission(store.find(record(scorer="contains", decoding=how)))
    assert entry["task"]["decoding"] == {"new_tokens": 20, "samples": 1, "temperature": 0.8, "masks": 5}


@pytest.mark.parametrize(
    ("changed", "output"),
    [
        ({"best": ""}, "found nothing better than the unchanged model"),
        ({"finish": False}, "it is a search, interrupted"),
        ({"kind": "scores"}, "it is a scores, done"),
        ({"model": "x" * 121}, "model.name: 'xxx"),
        ({"model_hash": "abc"}, "model.sha256: 'abc' is not allowed; write text of 64 characters"),
    ],
)
def test_what_cannot_be_submitted_is_reported(store: Store, record: Record, changed: dict[str, Any], output: str) -> None:
    info = store.find(record(**changed))
    with pytest.raises(ReportError) as raised:
        submission(info)
    assert output in str(raised.value)
    assert info.id in str(raised.value)


def test_the_schema_is_a_schema_and_knows_what_the_library_knows() -> None:
    schema = _schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert set(schema["properties"]["task"]["properties"]["scorer"]["enum"]) == set(get_args(Scorer))
    properties = schema["properties"]["search"]["properties"]
    assert set(properties["strategy"]["enum"]) == set(get_args(Strategy))
    assert set(properties["metric"]["enum"]) == set(get_args(Metric))


def test_every_object_of_the_schema_is_closed() -> None:
    def objects(schema: Any) -> list[dict[str, Any]]:
        inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
        results = [o for value in inner for o in objects(value)]
        return [schema, *results] if isinstance(schema, dict) and schema.get("type") == "object" else results

    every = objects(_schema())
    assert len(every) == 9
    assert all(o["additionalProperties"] is False for o in every)


@pytest.mark.parametrize("text", INTERVENTIONS)
def test_every_form_of_an_intervention_is_allowed(good: dict[str, Any], text: str) -> None:
    assert find_problems(good | {"intervention": text}) == []


WRONG: list[tuple[str, Any, str]] = [
    ("format", 2, "format: 2 is not allowed; write 1"),
    ("format", True, "format: true is not allowed; write 1"),
    ("model.sha256", "A" * 64, f"model.sha256: '{'A' * 60}'... is not allowed; write text of 64 characters: a sha256"),
    ("model.sha256", "a" * 64 + "\n", "model.sha256: 'aaa"),
    ("model.name", "", "model.name: '' is not allowed; write text of 1 to 120 characters: one line"),
    ("model.name", "a\nb", r"model.name: 'a\nb' is not allowed"),
    ("model.name", "a\n", r"model.name: 'a\n' is not allowed"),
    ("model.name", "a\u202eb", r"model.name: 'a\u202eb' is not allowed"),
    ("model.name", "a\ud800b", r"model.name: 'a\ud800b' is not allowed"),
    ("model.name", "\x1b[31m", r"model.name: '\x1b[31m' is not allowed"),
    ("model.path", "/home", "model: 'path' is unknown here; allowed are name, sha256, config, dtype"),
    ("model", [], "model: an array of 0 items is not allowed; write an object"),
    ("task.scorer", "f1", "task.scorer: 'f1' is not allowed; write one of next_token, first_token,"),
    (
        "report",
        "javascript:alert(1)",
        "report: 'javascript:alert(1)' is not allowed; write text of 9 to 500 characters: an https",
    ),
    ("report", "http://example.org/", "report: 'http://example.org/' is not allowed"),
    ("report", "https://ann:pw@example.org/", "report: "),
    ("report", 'https://example.org/" onclick=', "report: "),
    ("report", "https://example.org/\n", "report: "),
    ("report", " https://example.org/", "report: "),
    ("intervention", "", "intervention: '' is not allowed; write text of 1 to 400000 characters: reductions joined by +"),
    ("intervention", "27.fc_in@1e-999999999", "intervention: '27.fc_in@1e-999999999' is not allowed"),
    ("intervention", "27.fc_in@0.1+", "intervention: "),
    ("intervention", "nothing@0.1", "intervention: cannot read the reduction 'nothing@0.1'"),
    ("intervention", "27-20.fc_in@0.1", "intervention: the layers '27-20' run backwards; write 20-27"),
    ("intervention", "27.fc_in@1.5", "intervention: rho 1.5 is out of range"),
    ("intervention", "27.fc_in@0.10", "intervention: '27.fc_in@0.10' is not in canonical form; write '27.fc_in@0.1'"),
    ("intervention", "2.fc_in@0.1+1.fc_in@0.1", "intervention: '2.fc_in@0.1+1.fc_in@0.1' is not in canonical form"),
    ("result.n", 0, "result.n: 0 is not allowed; write a whole number from 1 to 100000000"),
    ("result.n", 10.5, "result.n: 10.5 is not allowed"),
    ("result.n", True, "result.n: true is not allowed"),
    ("result.n", "10", "result.n: '10' is not allowed"),
    ("result.base.accuracy", 18.5, "result.base.accuracy: 18.5 is not allowed; write a number or null from 0 to 1: null where"),
    ("result.base.loss", float("inf"), "result.base.loss: Infinity is not allowed; write a number from 0 to 1000000: in nats"),
    ("result.interval", [0.1], "result.interval: an array of 1 items is not allowed; write an array of 2 numbers"),
    ("result.interval", [0.1, "x"], "result.interval[1]: 'x' is not allowed; write a number from -1 to 1"),
    ("result.interval", [0.031, 0.05], "result.interval: [0.031, 0.05] does not hold the gain, 0.03; write its 95 % interval"),
    ("result.interval", [0.01, 0.029], "result.interval: [0.01, 0.029] does not hold the gain"),
    ("result.interval", [0.05, 0.01], "result.interval: [0.05, 0.01] does not hold the gain"),
    ("result.loss_interval", [0.1, 0.2], "result.loss_interval: [0.1, 0.2] does not hold the change of loss, -0.25"),
    ("result.gain", 0.04, "result.gain: 0.04 is not edited - base, 0.03; write that difference"),
    ("result.gain", -0.03, "result.gain: -0.03 is not edited - base"),
    ("result.edited.accuracy", 0.225, "result.gain: 0.03 is not edited - base, 0.04"),
    ("result.gain", None, "result: with the scorer answer write numbers for accuracy and gain"),
    ("result.base.accuracy", None, "result: with the scorer answer write numbers for accuracy and gain"),
    ("task.scorer", "perplexity", "result: with the scorer perplexity write null for accuracy and gain"),
    ("result.corrected", 41, ""),  # 0.031 is 0.03 but for rounding
    ("result.corrected", 60, "result.gain: 0.03 is not (60 corrected - 10 broken) / 1000 = 0.05"),
    ("result.broken", 970, "result: 40 corrected and 970 broken are more than n, 1000"),
    ("result.mcnemar_p", 0.5, "result.mcnemar_p: 0.5 is not the exact two-sided 2.386e-05"),
    ("result.more", 1, "result: 'more' is unknown here; allowed are n, base, edited, gain, interval"),
    ("search.strategy", "luck", "search.strategy: 'luck' is not allowed; write one of strengths, components, race, exhaustive"),
    ("harm", [{"guard": "own text", "ratio": 1.006, "interval": [1.003, 1.01], "n": 64}], ""),
    ("harm", [{"guard": "own text", "ratio": 1.5, "interval": [1, 1.2], "n": 9}], "harm[0].interval: [1, 1.2] does not hold"),
    ("harm", [], "harm: an array of 0 items is not allowed; write an array of 1 to 10 entries"),
    ("harm", [{"guard": "a text", "ratio": 0, "n": 64}], "harm[0].ratio: 0 is not allowed; write a number above 0 to 1000000"),
    ("search.complete", 1, "search.complete: 1 is not allowed; write true or false"),
    ("search.seed", -1, ""),
    ("versions.laserlm", "<b>", "versions.laserlm: '<b>' is not allowed; write text of 1 to 60 characters: letters"),
    ("versions.numpy", "1", "versions: 'numpy' is unknown here"),
    ("credit", "x" * 121, f"credit: '{'x' * 60}'... is not allowed"),
    ("credit", "<script>alert(1)</script> & Söhne 李", ""),
    ("host", "me", "the document: 'host' is unknown here; allowed are format, method, credit, report, model"),
]


@pytest.mark.parametrize(("path", "value", "output"), WRONG, ids=[f"{p}={v!r:.30}" for p, v, _ in WRONG])
def test_each_wrong_value_is_reported_with_its_place(good: dict[str, Any], path: str, value: Any, output: str) -> None:
    document = copy.deepcopy(good)
    *above, last = path.split(".")
    place = document
    for name in above:
        place = place[name]
    place[last] = value
    problems = find_problems(document)
    assert bool(problems) == bool(output)
    assert any(line.startswith(output) for line in problems) or not output, problems


@pytest.mark.parametrize("path", ["format", "method", "model.name", "task.name", "task.scorer", "intervention", "result.n"])
def test_each_missing_value_is_reported(good: dict[str, Any], path: str) -> None:
    *above, last = path.split(".")
    place = good
    for name in above:
        place = place[name]
    del place[last]
    assert find_problems(good) == [f"{path}: is missing, and is required"]


@pytest.mark.parametrize("document", [None, [], 3, "x", True])
def test_what_is_no_object_is_reported(document: Any) -> None:
    assert "is not allowed; write an object" in find_problems(document)[0]


def test_all_problems_of_a_file_are_reported_at_once(good: dict[str, Any]) -> None:
    good["format"], good["result"]["n"], good["more"] = 2, 0, 1
    assert [line.partition(":")[0] for line in find_problems(good)] == ["format", "result.n", "the document"]


def test_rounded_figures_are_allowed(good: dict[str, Any]) -> None:
    good["result"] |= {"base": {"accuracy": 0.185}, "edited": {"accuracy": 0.215}, "gain": 0.0304, "interval": [0.017, 0.045]}
    del good["result"]["loss_interval"]
    assert find_problems(good) == []


def test_an_interval_of_no_value_is_reported(good: dict[str, Any]) -> None:
    del good["result"]["base"]["loss"]
    assert find_problems(good) == ["result.loss_interval: there is no value that it is the interval of; leave it out"]


def write(folder: Path, content: Any, name: str = "a.json") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return file


def test_a_good_file_is_copied_once(good: dict[str, Any], tmp_path: Path) -> None:
    file, to = write(tmp_path, good), tmp_path / "to"
    (added,) = add([file], to)
    assert (added.file, added.problems) == (file, ())
    assert added.target is not None
    assert load_submission(added.target) == good
    assert added.target.name.startswith("worldfacts-some-model-")
    (again,) = add([file], to)
    assert again.target is None
    assert again.problems == (f"the same submission is there already, as {added.target}; leave this one out",)
    assert list(to.iterdir()) == [added.target]


def test_the_same_document_is_a_duplicate_and_a_copy_by_another_name_keeps_none_out(
    good: dict[str, Any], tmp_path: Path
) -> None:
    other = copy.deepcopy(good)
    other["result"]["n"] = 1000.0
    mallory, renamed = copy.deepcopy(good) | {"credit": "Mallory"}, copy.deepcopy(good)
    renamed["model"]["name"] = "renamed"
    third = copy.deepcopy(good)
    third["model"]["sha256"] = "e" * 64
    fourth = copy.deepcopy(good)
    fourth["result"]["edited"]["loss"] += 0.001
    files = [write(tmp_path, d, f"{i}.json") for i, d in enumerate((mallory, renamed, good, other, third, fourth))]
    assert [a.target is None for a in add(files, tmp_path / "to")] == [False, False, False, True, False, False]
    assert len(list((tmp_path / "to").iterdir())) == 5


@pytest.mark.parametrize("name", ["../../../evil", 'a/b\\c:d*e?"<>|', "..", "CON", "Ü李", "x" * 120, "-rf"])
def test_the_name_of_a_copy_is_safe_whatever_the_names_in_it(good: dict[str, Any], tmp_path: Path, name: str) -> None:
    good["model"]["name"] = good["task"]["name"] = name
    (added,) = add([write(tmp_path, good)], tmp_path / "to")
    assert added.target is not None
    assert added.target.parent == tmp_path / "to"
    assert len(added.target.name) < 90
    assert set(added.target.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
    assert added.target.name[0] not in "-."


def nested(depth: int) -> bytes:
    return b'{"format": ' + b"[" * depth + b"]" * depth + b"}"


HOSTILE = {
    "empty": (b"", "is not JSON"),
    "no text": (b"\xff\xfe\x00", "is not JSON"),
    "not a number": (b'{"format": NaN}', "is not JSON (NaN is no number of JSON)"),
    "infinite": (b'{"format": -Infinity}', "is not JSON (-Infinity is no number of JSON)"),
    "many digits": (b'{"format": ' + b"9" * 5000 + b"}", "is not JSON"),
    "large number": (b'{"format": 1e999}', "format: Infinity is not allowed"),
    "twice": (b'{"format": 1, "format": 2}', "is not JSON (the name 'format' occurs twice in one object)"),
    "too large": (b" " * (MAX_BYTES + 1), f"is larger than {MAX_BYTES:,} bytes"),
    "many names": (json.dumps({f"n{i}": i for i in range(60_000)}).encode(), "'n0', 'n1', 'n2' and 59997 more is unknown"),
    "long array": (json.dumps({"result": {"interval": ["x"] * 150_000}}).encode(), "result.interval"),
    "long text": (json.dumps({"intervention": "1.a@0.5+" * 120_000}).encode(), "intervention: '1.a@0.5+1.a"),
    "dots": (json.dumps({"intervention": "a.1." * 200_000}).encode(), "intervention: 'a.1.a"),
    "spaces": (json.dumps({"versions": {"python": "a" + " " * 900_000}}).encode(), "versions.python"),
    "slashes": (json.dumps({"report": "https://" + "a." * 400_000}).encode(), "report"),
    **{f"depth {depth}": (nested(depth), "") for depth in (50, 300, 700, 900, 960, 990, 5_000, 400_000)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_and_does_no_harm(tmp_path: Path, name: str) -> None:
    content, values = HOSTILE[name]
    (added,) = add([write(tmp_path, content)], tmp_path / "to")
    assert added.target is None
    assert any(values in problem for problem in added.problems), added.problems
    assert all(len(problem) < 1000 for problem in added.problems)
    assert len(added.problems) <= 30
    assert not (tmp_path / "to").exists()
    with pytest.raises(ReportError):
        load_submission(write(tmp_path, content))


def test_a_document_deeper_than_it_can_be_shown_is_reported(good: dict[str, Any]) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert find_problems(good | {"credit": deep}) == ["the document is nested too deep; a submission has three levels"]


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    added = add([tmp_path, tmp_path / "pipe", tmp_path / "missing"], tmp_path / "to")
    assert all(a.target is None and "is not a file" in a.problems[0] for a in added)


def test_good_files_among_bad_ones_are_added(good: dict[str, Any], tmp_path: Path) -> None:
    added = add([write(tmp_path, b"{", "bad.json"), write(tmp_path, good)], tmp_path / "to")
    assert [a.target is None for a in added] == [True, False]


def test_the_p_value_of_questions_that_share_facts_is_not_mcnemars(good: dict[str, Any]) -> None:
    good["result"] |= {"mcnemar_p": 0.5, "facts": good["result"]["n"]}
    assert any(line.startswith("result.mcnemar_p: 0.5 is not") for line in find_problems(good))
    good["result"]["facts"] //= 3
    assert find_problems(good) == []
