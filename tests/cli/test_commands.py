from __future__ import annotations

import csv
import inspect
import io
import json
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf

from laserlm.models import LanguageModel, load
from laserlm.scoring.evaluate import evaluate, evaluate_rows
from laserlm.tasks import task

Make = Callable[..., LanguageModel]
Run = Callable[..., tuple[int, str, str]]

QUESTIONS = [
    {"id": f"{a}{b}", "prompt": f"The capital of {a} and {b} is", "answer": answer, "group": answer}
    for a in "abcde"
    for b, answer in zip("vwxyz", ["Paris", "Rome", "true", "false", "Paris"], strict=True)
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return file


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "runs.db")


def test_matrices_as_json_csv_and_table(run: Run, folder: Path) -> None:
    code, out, _ = run("matrices", folder, "--json")
    rows = json.loads(out)
    assert code == 0
    assert len(rows) == 21
    assert rows[4] == {
        "layer": 0,
        "matrix": "fc_in",
        "path": "model.layers.0.mlp.gate_proj.weight",
        "shape": [48, 32],
        "max_rank": 32,
    }
    _, out, _ = run("matrices", folder, "--csv")
    assert [r["path"] for r in csv.DictReader(io.StringIO(out))] == [r["path"] for r in rows]
    _, out, _ = run("matrices", folder)
    assert "model.layers.2.mlp.down_proj.weight" in out
    assert "48 x 32" in out
    assert run("matrices", folder, "--csv", "--json")[0] == 2


def test_a_gguf_file_and_a_config_alone_list_the_matrices_of_the_model(
    run: Run, folder: Path, llama: LanguageModel, tmp_path: Path
) -> None:
    listed = run("matrices", folder, "--json")
    llama.model.config.save_pretrained(tmp_path / "config alone")
    file = write_gguf(llama, tmp_path / "tiny.gguf")
    assert run("matrices", tmp_path / "config alone", "--json") == run("matrices", file, "--json") == listed
    cache = tmp_path / "converted"
    assert run("generate", file, "The capital of", "--cache", cache, "--json")[0] == 0
    assert json.loads(run("clear-cache", "--cache", cache, "--json")[1])["freed_bytes"]["models"] > 100_000
    assert list((cache / "models").iterdir()) == []


def test_fused_matrices_are_listed_with_their_parts(run: Run, make: Make, tmp_path: Path) -> None:
    make("gpt2").model.save_pretrained(tmp_path / "gpt2")
    make("gpt2").require_tokenizer().save_pretrained(tmp_path / "gpt2")
    rows = json.loads(run("matrices", tmp_path / "gpt2", "--json")[1])
    assert rows[0] | {"path": ""} == {
        "layer": 0,
        "matrix": "qkv",
        "path": "",
        "shape": [96, 32],
        "max_rank": 32,
        "part_of": None,
        "parts": ["q_proj", "k_proj", "v_proj"],
    }
    assert (rows[1]["matrix"], rows[1]["part_of"], rows[1]["shape"]) == ("q_proj", "qkv", [32, 32])


def test_evaluate_prints_what_the_library_measures(run: Run, folder: Path, questions: Path) -> None:
    command = ("evaluate", folder, "--task", f"jsonl:{questions}", "--split", "all", "--limit", 9)
    code, out, err = run(*command, "--reduce", "1.fc_in@0.50", "--json")
    values = json.loads(out)
    assert (code, "the 95 % interval of a gain is" in err, len(err.splitlines())) == (0, True, 1)
    from laserlm.edit import applied

    lm = load(folder)
    with applied(lm, "1.fc_in@0.5"):
        expected = evaluate(lm, task(f"jsonl:{questions}").every.limit(9)).as_dict()
    assert {k: v for k, v in values.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    assert (values["intervention"], values["n"], values["task"]) == ("1.fc_in@0.5", 9, "jsonl:questions")
    assert values["accuracy_interval"][0] <= values["accuracy"] <= values["accuracy_interval"][1]
    plain = json.loads(run(*command, "--json")[1])
    assert plain["intervention"] == ""
    assert plain["loss"] != values["loss"]


def test_evaluate_compares_in_pairs_and_writes_scores(run: Run, folder: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    command = ("evaluate", folder, "--task", f"jsonl:{questions}", "--reduce", "0.mlp@0.1", "--reduce", "1.q_proj@r2")
    values = json.loads(run(*command, "--compare", "--scores", out, "--json")[1])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert values["intervention"] == "0.mlp@0.1+1.q_proj@r2"
    assert values["n"] == len(rows) == values["comparison"]["n"] == 20
    assert sum(r["correct"] for r in rows) / 20 == values["accuracy"] == values["comparison"]["edited"]
    assert values["base"]["accuracy"] == values["comparison"]["base"]
    _, text, _ = run(*command, "--compare")
    assert "exact p" in text
    assert "always giving the most frequent answer scores" in text


def test_search_finds_keeps_and_returns_at_once_what_it_found(
    run: Run, folder: Path, questions: Path, store: str, tmp_path: Path
) -> None:
    command = ("search", folder, "--task", f"jsonl:{questions}", "--grid", "0-1.mlp@0.5,0.1", "--store", store, "--json")
    code, out, err = run(*command)
    values = json.loads(out)
    assert code == 0
    assert store in err
    assert values["candidates"] == 12
    assert set(values) >= {"best", "candidates", "seconds", "validation", "test", "strategy", "run"}
    for split in ("validation", "test"):
        assert set(values[split]) >= {"n", "base", "best", "gain", "interval", "mcnemar_p", "corrected", "broken"}
    assert (values["validation"]["n"], values["test"]["n"]) == (5, 20)
    again = json.loads(run(*command)[1])
    assert {**again, "seconds": 0} == {**values, "seconds": 0}
    assert "done earlier, nothing was run" not in err
    assert "done earlier, nothing was run; --restart runs it again" in run(*command)[2]
    assert json.loads(run(*command, "--restart")[1])["run"] != values["run"]
    _, text, _ = run(*command[:-1])
    assert "Best of 12 candidates" in text
    run_id = json.loads(run("runs", "list", "--store", store, "--json")[1])[0]["run"]
    assert f"Run {run_id} in {store}: done earlier, nothing was run; --restart runs it again." in text
    commands = re.findall(r"^  laser (\S+ .*)$", text.partition("Go on with:")[2], re.MULTILINE)
    assert [c.split()[0] for c in commands][:3] == ["report", "runs", "save" if values["best"] else "search"]
    for text in commands[:2]:
        out_option = ["--out", tmp_path / "page.html"] if text.startswith("report") else []
        assert run(*shlex.split(text), *out_option)[0] == 0


def test_the_help_groups_the_commands(run: Run) -> None:
    _, text, _ = run("--help")
    panels = re.split(r"─ (\w+) ─", text)
    groups = dict(zip(panels[3::2], panels[4::2], strict=True))
    assert list(groups) == ["Start", "Search", "Look", "Save", "Research"]
    names = {group: re.findall(r"^│ (\S+) ", lines, re.MULTILINE) for group, lines in groups.items()}
    assert names["Start"][:3] == ["setup", "doctor", "demo"]
    assert {"load-check", "reproduce"} <= set(names["Save"])
    assert {"verify", "analyze", "lab"} <= set(names["Research"])
    helps = [re.sub(r"\W+", " ", re.split(rf"│ {name} ", text)[1].partition(".")[0]) for name in ("load-check", "verify")]
    assert "saved folder loads" in helps[0]
    assert "published table" in helps[1]


def test_runs_are_listed_shown_exported_and_deleted(
    run: Run, folder: Path, questions: Path, store: str, tmp_path: Path
) -> None:
    command = ("search", folder, "--task", f"jsonl:{questions}", "--grid", "1.mlp@0.5", "--store", store, "--json")
    values = json.loads(run(*command)[1])
    listed = json.loads(run("runs", "list", "--store", store, "--json")[1])
    assert [(r["run"], r["status"], r["best"]) for r in listed] == [(values["run"], "done", values["best"])]
    assert values["run"] in run("runs", "list", "--store", store, "--csv")[1]
    shown = json.loads(run("runs", "show", "last", "--store", store, "--json")[1])
    # The unchanged model and three candidates on validation and on what the guard chooses by; the choice where it is measured.
    assert len(shown["trials"]) == 2 * 4 + 2 * len({"", values["best"]})
    text = run("runs", "show", values["run"][:5], "--store", store)[1]
    assert f"run {values['run']} (search, done)" in text
    test = values["test"]
    assert f"accuracy on test: {test['base']:.1%} to {test['best']:.1%}, {100 * test['gain']:+.1f} points [" in text
    guard = next(line for line in text.splitlines() if "guard 0" in line)
    assert "%" not in guard  # a text has no accuracy
    assert f" {100 * test['gain']:+.1f} " in run("runs", "list", "--store", store)[1]
    assert len(run("runs", "show", "last", "--store", store, "--csv")[1].splitlines()) == 1 + len(shown["trials"])
    assert run("runs", "export", "last", "--out", tmp_path / "run.json", "--store", store)[0] == 0
    exported = json.loads((tmp_path / "run.json").read_text())
    assert exported == json.loads(run("runs", "export", "last", "--store", store)[1])
    asked = [e for e in exported["examples"] if e["prompt"]]  # the passages of the guard have no prompt
    assert (len(asked), len(exported["examples"])) == (25, 33)
    assert {e["prompt"] for e in asked} == {q["prompt"] for q in QUESTIONS}
    assert json.loads(run("runs", "delete", "last", "--yes", "--store", store, "--json")[1]) == {"deleted": values["run"]}
    assert json.loads(run("runs", "list", "--store", store, "--json")[1]) == []
    code, _, err = run("runs", "show", "last", "--store", store)
    assert code == 1
    assert "laser runs list" in err


def test_generate_shows_base_edited_and_bottom_only(run: Run, folder: Path) -> None:
    command = ("generate", folder, "The capital of France is", "--max-new-tokens", 4)
    values = json.loads(run(*command, "--reduce", "0-2.mlp@0.1", "--json")[1])["generations"]
    assert [g["variant"] for g in values] == ["base", "edited", "removed part"]
    assert values[2]["intervention"].startswith("0.fc_in@r29:bottom+0.fc_out@r29:bottom+")
    assert len({g["text"] for g in values}) > 1
    assert [g["variant"] for g in json.loads(run(*command, "--json")[1])["generations"]] == ["base"]
    assert "removed part" in run(*command, "--reduce", "1.fc_in@0.5")[1]


def test_what_is_typed_by_others_shows_as_text(run: Run, folder: Path) -> None:
    _, out, _ = run("generate", folder, "[red]Oslo[/red] is [/nonsense]", "--max-new-tokens", 2)
    assert "[red]Oslo[/red] is [/nonsense]" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["evaluate", "MODEL", "--reduce", "1.fc_in"], 1, "cannot read the reduction '1.fc_in'"),
        (["evaluate", "MODEL", "--reduce", "1.fc_in@2"], 1, "rho 2 is out of range"),
        (["evaluate", "MODEL", "--reduce", "9.fc_in@0.5"], 1, "no layer 9: this model's layers are 0 to 2"),
        (["evaluate", "MODEL", "--reduce", "1.fc_x@0.5"], 1, "no matrix 'fc_x' in layer 1"),
        (["evaluate", "MODEL", "--task", "jsonl:/no/file"], 1, "no data file '/no/file'"),
        (["evaluate", "MODEL", "--task", "nothing"], 1, "no task 'nothing'; there are worldfacts"),
        (["evaluate", "MODEL", "--split", "train"], 1, "no split 'train'; there are validation, test and all"),
        (["evaluate", "MODEL", "--scorer", "f1"], 1, "cannot take 'f1'. Write one of next_token"),
        (["evaluate", "MODEL", "--limit", "0"], 2, "--limit"),
        (["evaluate", "MODEL", "--scores", "/no/folder/scores.jsonl"], 2, "no folder /no/folder"),
        (["evaluate", "/no/model", "--reduce", "1.fc_in"], 1, "cannot read the reduction"),
        (["evaluate", "MODEL", "--device", "gpu"], 1, "no device 'gpu' here"),
        (["evaluate", "/no/model"], 1, "cannot load '/no/model'"),
        (["search", "MODEL", "--metric", "luck"], 1, "no metric 'luck'; there are accuracy, loss"),
        (["search", "MODEL", "--store", "/dev/null/runs.db"], 1, "--store"),
        (["runs", "show", "last", "--store", "MODEL/config.json"], 1, "not a database"),
        (["matrices"], 2, "Missing argument"),
        (["nothing"], 2, "No such command"),
    ],
)
def test_errors_say_the_next_step_and_leave_their_code(
    arguments: list[str], code: int, message: str, run: Run, folder: Path
) -> None:
    left, out, err = run(*(a.replace("MODEL", str(folder)) for a in arguments))
    assert left == code
    assert message in err
    assert out == ""
    assert "Traceback" not in err


def test_defaults_of_the_command_are_those_of_the_library() -> None:
    from laserlm.cli.search import search
    from laserlm.cli.search_options import SearchOptions
    from laserlm.reductions import Grid
    from laserlm.searching import SearchConfig

    settings = {name: p.default for name, p in inspect.signature(search).parameters.items()}
    options = SearchConfig()
    shared = ("strategy", "mode", "delta", "seed", "budget", "metric", "grid")
    assert {name: settings[name] for name in shared} == {name: getattr(options, name) for name in shared}
    assert settings["memory"] * 2**30 == options.memory
    assert settings["effort"] == "normal"
    assert SearchOptions().config(32) == replace(options, grid=Grid.parse("fine"))


def test_race_and_composition_print_how_they_went(run: Run, folder: Path, questions: Path, store: str) -> None:
    command = (
        "search",
        folder,
        "--task",
        f"jsonl:{questions}",
        "--grid",
        "all.mlp@0.5,0.1",
        "--store",
        store,
        "--metric",
        "loss",
    )
    code, out, err = run(*command, "--width", "6")
    assert code == 0, err
    assert "The screen ranked 18 candidates" in out
    assert "Race" in out
    assert "Best of 18 candidates" in out
    code, out, err = run(*command, "--strategy", "compose", "--mode", "greedy")
    assert code == 0, err
    assert "Accepted steps" in out
    code, out, _ = run(*command, "--width", "6", "--json")
    values = json.loads(out)
    assert (values["strategy"], values["complete"], values["candidates"]) == ("race", True, 18)
    assert [r["examples"] for r in values["rungs"]][-1] == values["validation"]["n"]
    assert {"n", "base", "best", "gain", "interval", "mcnemar_p", "corrected", "broken"} <= set(values["test"])
    code, out, _ = run(*command, "--strategy", "exhaustive", "--budget", "0", "--json")
    assert (code, json.loads(out)["complete"], json.loads(out)["best"]) == (0, False, "")


@pytest.mark.parametrize(
    ("kills", "grid", "inputs"),
    [
        pytest.param(1, "all.mlp@0.5,0.1", ["--strategy", "exhaustive"], id="once"),
        pytest.param(3, "all.all@0.5,0.1", ["--strategy", "exhaustive"], id="exhaustive", marks=pytest.mark.slow),
        pytest.param(3, "all.all@0.5,0.1", ["--width", "12"], id="race", marks=pytest.mark.slow),
    ],
)
def test_a_search_that_is_killed_ends_as_an_undisturbed_one(
    kills: int,
    grid: str,
    inputs: list[str],
    run: Run,
    folder: Path,
    questions: Path,
    tmp_path: Path,
    short_own_text: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, size in short_own_text.items():  # as in the process that is killed
        monkeypatch.setattr(f"laserlm.searching.guard.{name}", size)
    arguments = [
        "search",
        str(folder),
        "--task",
        f"jsonl:{questions}",
        "--grid",
        grid,
        "--metric",
        "loss",
        *inputs,
        "--json",
    ]
    expected = json.loads(run(*arguments, "--store", tmp_path / "whole.db")[1])
    full = json.loads(run("runs", "export", "last", "--store", tmp_path / "whole.db")[1])
    command = [sys.executable, "-c", "from laserlm.cli import main; main()", *arguments, "--store", str(tmp_path / "runs.db")]
    seen = 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and _scores(tmp_path / "runs.db") <= seen:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        seen = _scores(tmp_path / "runs.db")
    values = json.loads(run(*arguments, "--store", tmp_path / "runs.db")[1])
    assert len(json.loads(run("runs", "list", "--store", tmp_path / "runs.db", "--json")[1])) == 1
    for key in ("best", "failed", "rungs", "validation", "test", "scored"):
        assert values[key] == pytest.approx(expected[key]) if key == "scored" else values[key] == expected[key]
    after = json.loads(run("runs", "export", "last", "--store", tmp_path / "runs.db")[1])

    def kept(export: dict[str, Any]) -> dict[tuple[str, str], list[tuple[str, float]]]:
        ids = [e["id"] for e in export["examples"]]
        return {
            (t["split"], t["intervention"]): [(ids[s["example"]], s["logprob"]) for s in t["scores"]] for t in export["trials"]
        }

    assert kept(after) == kept(full)


def _scores(file: Path) -> int:
    """Return the number of scores that another process has written so far."""
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
            return int(connection.execute("select count(*) from scores").fetchone()[0])
    except sqlite3.OperationalError:  # no file or no table yet
        return 0


def test_an_interruption_leaves_130_and_says_how_to_go_on(
    run: Run, folder: Path, questions: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from laserlm.searching import scorer

    calls: list[str] = []

    def interrupted(lm: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        calls.append(lm.intervention)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate_rows(lm, *args, **kwargs)

    monkeypatch.setattr(scorer, "evaluate_rows", interrupted)
    command = ("search", folder, "--task", f"jsonl:{questions}", "--grid", "1.mlp@0.5", "--strategy", "exhaustive")
    command = (*command, "--store", store, "--json")
    code, out, err = run(*command)
    assert (code, out) == (130, "")
    assert "Best so far on validation: " in err
    assert "Run the same command without --restart to resume" in err
    assert [r["status"] for r in json.loads(run("runs", "list", "--store", store, "--json")[1])] == ["interrupted"]
    assert run(*command)[0] == 0
    # The unchanged model on test and on validation, then the candidates; then the harm of all four. The winner is the last to
    # meet the test split, and its harm is measured in the end.
    assert calls[:6] == ["", "", "1.fc_in@0.5", "1.fc_up@0.5", "1.fc_out@0.5", "1.fc_out@0.5"]
    assert len(calls) in (7 + 4, 9 + 4)
    assert "without --restart" in err


def test_setup_says_where_the_bundled_model_is(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from laserlm import models
    from laserlm.models import bundled

    monkeypatch.setattr(bundled, "install", lambda: tmp_path / "file.gguf")
    monkeypatch.setattr(models, "set_up_bundled", lambda cache: cache / "models")
    code, out, _ = run("setup", "--cache", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["folder"] == str(tmp_path / "models")


def test_a_password_in_a_database_url_is_not_shown() -> None:
    from laserlm.provenance import mask_credentials

    assert mask_credentials("postgresql://me:se/cr@et@host/db") == "postgresql://***@host/db"
    assert (
        mask_credentials("postgresql://host/db?user=me&password=secret&x=1") == "postgresql://host/db?user=me&password=***&x=1"
    )
    assert mask_credentials("/home/me@work/runs.db") == "/home/me@work/runs.db"


def test_one_example_gives_json_that_any_reader_takes(run: Run, folder: Path, questions: Path) -> None:
    command = (
        "evaluate",
        folder,
        "--task",
        f"jsonl:{questions}",
        "--limit",
        1,
        "--reduce",
        "1.fc_in@0.5",
        "--compare",
        "--json",
    )
    values = json.loads(run(*command)[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["comparison"]["loss_interval"] is None
