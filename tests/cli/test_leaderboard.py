from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from laserlm.store import Store
from laserlm.studies.published import published

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def found(run: Run, folder: Path, tmp_path: Path) -> tuple[str, Path]:
    """A finished search of a tiny model, and the store that holds it."""
    questions = tmp_path / "questions.jsonl"
    answers = ["Paris", "Rome", "true", "false"] * 5
    questions.write_text(
        "".join(json.dumps({"prompt": f"The capital number {i} is", "answer": a}) + "\n" for i, a in enumerate(answers))
    )
    store = tmp_path / "runs.db"
    asked = ("--task", f"jsonl:{questions}", "--grid", "all.all@0.2,0.5", "--metric", "loss", "--strategy", "exhaustive")
    code, out, err = run("search", folder, *asked, "--store", store, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["best"]
    return str(result["run"]), store


def test_a_search_is_submitted_added_and_shown(run: Run, found: tuple[str, Path], tmp_path: Path) -> None:
    run_id, store = found
    made = tmp_path / "result.json"
    code, out, err = run("leaderboard", "submit", "last", "--credit", "Ann", "--out", made, "--store", store)
    assert (code, out) == (0, "")
    assert str(made) in err
    document = json.loads(made.read_text())
    assert str(tmp_path) not in made.read_text()
    assert (document["credit"], document["model"]["name"], document["task"]["name"]) == ("Ann", "model", "jsonl:questions")
    code, out, _ = run("leaderboard", "submit", run_id[:6], "--store", store)
    assert (code, json.loads(out) | {"credit": "Ann"}) == (0, document)

    subs = tmp_path / "submissions"
    code, out, _ = run("leaderboard", "add", made, "--to", subs)
    (copied,) = subs.iterdir()
    assert (code, out) == (0, f"{made}: added as {copied}\n")
    (tmp_path / "wrong.json").write_text(json.dumps(document | {"format": 2}))
    code, out, err = run("leaderboard", "add", made, tmp_path / "wrong.json", "--to", subs, "--json")
    assert code == 1
    refused = json.loads(out)
    assert [r["target"] for r in refused] == [None, None]
    assert refused[1]["problems"] == ["format: 2 is not allowed; write 1"]
    assert "2 of 2 files were refused" in err
    code, out, err = run("leaderboard", "add", tmp_path / "wrong.json", "--to", subs)
    assert (code, out) == (1, "")
    assert f"{tmp_path / 'wrong.json'}: format: 2 is not allowed; write 1" in err

    site = tmp_path / "site"
    asked = ("leaderboard", "build", "--out", site, "--store", store)
    code, out, err = run(*asked, "--submissions", subs, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "folder": str(site),
        "rows": len(published()) + 1,
        "verified": 1,
        "tables": 10,
        "reports": 0,
    }
    page = (site / "index.html").read_text()
    assert "Ann<small>submitted" in page
    assert str(tmp_path) not in page
    code, out, _ = run(*asked)
    assert code == 0
    assert out == f"{site / 'index.html'}: {len(published()) + 1} rows, 1 verified, in 10 tables\n"
    assert f"run {run_id}" in (site / "index.html").read_text()


def test_reports_are_asked_for_by_run(
    run: Run, found: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, store = found
    made: list[str] = []

    def write_report(results: Any, run: str, out: Path) -> Path:
        assert isinstance(results, Store)
        made.append(run)
        out.write_text("a report")
        return out

    module = ModuleType("laserlm.web.report")
    module.write_report = write_report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "laserlm.web.report", module)
    site = tmp_path / "site"
    code, out, err = run("leaderboard", "build", "--out", site, "--store", store, "--reports")
    assert (code, err) == (0, "")
    assert made == [run_id]
    assert (site / "reports" / f"{run_id}.html").read_text() == "a report"
    assert f'href="reports/{run_id}.html"' in (site / "index.html").read_text()
    assert f"1 reports in {site / 'reports'}" in out


def test_what_cannot_be_done_ends_in_an_error(run: Run, tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    code, out, err = run("leaderboard", "submit", "nothing", "--store", store)
    assert (code, out) == (1, "")
    assert "no run 'nothing'" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    code, _, err = run("leaderboard", "build", "--out", tmp_path / "mine", "--store", store)
    assert code == 1
    assert "was not built by 'laser leaderboard build'" in err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    code, _, err = run("leaderboard", "add", tmp_path / "nothing.json", "--to", tmp_path / "subs")
    assert code == 1
    assert "is not a file" in err
