from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_matrices_as_json_csv_and_figure(run: Run, folder: Path, tmp_path: Path) -> None:
    code, out, _ = run("analyze", "matrices", folder, "--json")
    assert code == 0
    rows = json.loads(out)
    assert len(rows) == 21
    assert {"matrix", "effective_rank", "rank_beyond", "gavish_donoho", "shared"} <= rows[0].keys()
    code, out, _ = run("analyze", "matrices", folder, "--csv", "--type", "fc_up", "--figure", tmp_path / "f.html")
    assert code == 0
    table = list(csv.DictReader(io.StringIO(out)))
    assert [r["matrix"] for r in table] == ["0.fc_up", "1.fc_up", "2.fc_up"]
    assert (table[0]["shared@0.06"], table[1]["shared@0.06"] != "") == ("", True)
    assert (tmp_path / "f.html").stat().st_size > 1_000_000
    code, out, _ = run("analyze", "matrices", folder)
    assert code == 0


def test_metrics_are_held_against_what_a_search_measured(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laserlm.studies.matrices.RESAMPLES", 200)
    questions = tmp_path / "questions.jsonl"
    answers = ["Paris", "Rome", "true", "false"] * 5
    questions.write_text(
        "".join(json.dumps({"prompt": f"The capital number {i} is", "answer": a}) + "\n" for i, a in enumerate(answers))
    )
    store = tmp_path / "runs.db"
    search = ("search", folder, "--task", f"jsonl:{questions}", "--grid", "all.all@0.2,0.5", "--store", store)
    assert run(*search, "--strategy", "exhaustive")[0] == 0
    code, out, _ = run("analyze", "matrices", folder, "--run", "last", "--store", store, "--json")
    assert code == 0
    values = json.loads(out)
    assert {c["matrices"] for c in values["correlations"]} == {21}
    assert all(c["low"] <= c["spearman"] <= c["high"] for c in values["correlations"])
    code, _, err = run("analyze", "matrices", folder, "--run", "nothing", "--store", store)
    assert code == 1
    assert "nothing" in err


@pytest.mark.parametrize("inputs", [("--type", "wheel"), ("--side", "upper")])
def test_what_cannot_be_studied_is_an_error(run: Run, folder: Path, inputs: tuple[str, str]) -> None:
    code, _, err = run("analyze", "matrices", folder, *inputs)
    assert code == 1
    assert inputs[1] in err


def test_flips_of_a_run_and_of_a_reduction(run: Run, folder: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    answers = ["Paris", "Rome", "true", "false"] * 8
    questions.write_text(
        "".join(
            json.dumps({"prompt": f"The capital number {i} is", "answer": a, "group": a[0]}) + "\n"
            for i, a in enumerate(answers)
        )
    )
    store = tmp_path / "runs.db"
    task = ("--task", f"jsonl:{questions}", "--store", store)
    command = ("search", folder, *task, "--grid", "all.all@0.2,0.5", "--metric", "loss", "--strategy", "exhaustive", "--json")
    code, out, _ = run(*command)
    best = json.loads(out)["best"]
    assert best
    questions.unlink()  # a run needs no data any more
    code, out, err = run("analyze", "flips", "last", "--store", store, "--json")
    assert code == 0, err
    of_run = json.loads(out)
    assert of_run["intervention"] == best
    assert sum(of_run["counts"].values()) == of_run["comparison"]["n"] == len(of_run["flips"])
    assert {g["group"] for g in of_run["groups"]} == {"P", "R", "t", "f"}
    questions.write_text(
        "".join(
            json.dumps({"prompt": f"The capital number {i} is", "answer": a, "group": a[0]}) + "\n"
            for i, a in enumerate(answers)
        )
    )
    code, out, _ = run("analyze", "flips", folder, *task, "--reduce", best, "--json")
    assert code == 0
    assert json.loads(out)["comparison"] == of_run["comparison"]
    code, out, _ = run("analyze", "flips", folder, *task, "--reduce", best, "--limit", 8, "--top", 2)
    assert code == 0
    assert "outside of all answers" in out
    code, _, err = run("analyze", "flips", "nothing", "--store", store)
    assert code == 1
    assert "nothing" in err
    code, out, _ = run("analyze", "controls", folder, *task, "--reduce", best, "--limit", 8, "--draws", 2, "--json")
    assert code == 0
    rows = json.loads(out)["controls"]
    assert [r["control"] for r in rows][:2] == ["low rank", "removed part alone"]
    assert {r["n"] for r in rows} == {8}
    # "last" is the last search, not the scores that were made since.
    code, out, err = run("analyze", "controls", "last", "--store", store, "--draws", 1, "--json")
    assert code == 0, err
    low_rank = json.loads(out)["controls"][0]
    assert (low_rank["n"], low_rank["gain"]) == (of_run["comparison"]["n"], of_run["comparison"]["gain"])
    code, out, err = run("analyze", "matrices", "bundled", "--run", "last", "--store", store)
    assert code == 1
    assert "study that model" in err
