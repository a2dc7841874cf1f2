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


def test_a_search_is_submitted_added_and_shown(run: Run, finished_search: tuple[str, Path], tmp_path: Path) -> None:
    run_id, store = finished_search
    path = tmp_path / "result.json"
    code, out, err = run("leaderboard", "submit", "last", "--credit", "Ann", "--out", path, "--store", store)
    assert (code, out) == (0, "")
    assert str(path) in err
    document = json.loads(path.read_text())
    assert str(tmp_path) not in path.read_text()
    assert (document["credit"], document["model"]["name"], document["task"]["name"]) == ("Ann", "model", "jsonl:questions")
    code, out, _ = run("leaderboard", "submit", run_id[:6], "--store", store)
    assert (code, json.loads(out) | {"credit": "Ann"}) == (0, document)

    subs = tmp_path / "submissions"
    code, out, _ = run("leaderboard", "add", path, "--to", subs)
    (copied,) = subs.iterdir()
    assert (code, out) == (0, f"{path}: added as {copied}\n")
    (tmp_path / "wrong.json").write_text(json.dumps(document | {"format": 2}))
    code, out, err = run("leaderboard", "add", path, tmp_path / "wrong.json", "--to", subs, "--json")
    assert code == 1
    refused = json.loads(out)
    assert [r["target"] for r in refused] == [None, None]
    assert refused[1]["problems"] == ["format: 2 is not allowed; write 1"]
    assert "2 of 2 files were refused" in err
    code, out, err = run("leaderboard", "add", tmp_path / "wrong.json", "--to", subs)
    assert (code, out) == (1, "")
    assert f"{tmp_path / 'wrong.json'}: format: 2 is not allowed; write 1" in err

    site = tmp_path / "site"
    command = ("leaderboard", "build", "--out", site, "--store", store)
    code, out, err = run(*command, "--submissions", subs, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "folder": str(site),
        "rows": len(published()) + 1,
        "verified": 0,
        "tables": 10,
        "reports": 0,
    }
    page = (site / "index.html").read_text()
    assert f"run {run_id}; Ann<small>own run" in page
    assert str(tmp_path) not in page
    code, out, _ = run(*command)
    assert code == 0
    assert out == f"{site / 'index.html'}: {len(published()) + 1} rows, 0 verified, in 10 tables\n"
    assert f"run {run_id}" in (site / "index.html").read_text()


def test_a_submission_is_verified_by_measuring_it_again(
    run: Run, finished_search: tuple[str, Path], folder: Path, tmp_path: Path
) -> None:
    _, store = finished_search
    file, forged = tmp_path / "result.json", tmp_path / "subs" / "forged.json"
    assert run("leaderboard", "submit", "last", "--out", file, "--store", store)[0] == 0
    document = json.loads(file.read_text())
    document["result"]["edited"]["loss"] -= 0.5
    del document["result"]["loss_interval"]
    forged.parent.mkdir()
    forged.write_text(json.dumps(document))
    other = tmp_path / "other.db"
    inputs = ("--model", folder, "--task", f"jsonl:{tmp_path / 'questions.jsonl'}", "--store", other)
    code, _, err = run("leaderboard", "verify", forged, *inputs)
    assert code == 1
    assert "the figures do not hold: edited loss is" in err
    code, _, err = run("leaderboard", "verify", file, "--model", folder, "--task", "worldfacts", "--store", other)
    assert code == 1
    assert "the test examples here have sha256" in err
    code, out, err = run("leaderboard", "verify", file, *inputs)
    assert code == 0, err
    assert out.startswith(f"{file}: verified; test: ")
    assert run("leaderboard", "verify", file, *inputs, "--json")[0] == 0
    assert run("runs", "show", "last", "--store", other)[0] == 0
    (forged.parent / "true.json").write_bytes(file.read_bytes())
    code, out, _ = run(
        "leaderboard", "build", "--out", tmp_path / "site", "--submissions", forged.parent, "--store", other, "--json"
    )
    assert (code, json.loads(out)["verified"]) == (0, 1)
    page = (tmp_path / "site" / "index.html").read_text()
    assert page.count("&#10003; verified") == 1
    assert page.count("<tr data-claim") == 1
    document["model"]["sha256"] = "0" * 64
    forged.write_text(json.dumps(document))
    code, _, err = run("leaderboard", "verify", forged, *inputs)
    assert (code, "the weights here have sha256" in err) == (1, True)


def test_reports_are_asked_for_by_run(
    run: Run, finished_search: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, store = finished_search
    calls: list[str] = []

    def write_report(results: Any, run: str, out: Path) -> Path:
        assert isinstance(results, Store)
        calls.append(run)
        out.write_text("a report")
        return out

    module = ModuleType("laserlm.web.report")
    module.write_report = write_report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "laserlm.web.report", module)
    site = tmp_path / "site"
    code, out, err = run("leaderboard", "build", "--out", site, "--store", store, "--reports")
    assert (code, err) == (0, "")
    assert calls == [run_id]
    assert (site / "reports" / f"{run_id}.html").read_text() == "a report"
    assert f'href="reports/{run_id}.html"' in (site / "index.html").read_text()
    assert f"1 reports in {site / 'reports'}" in out


def test_what_cannot_be_done_ends_in_an_error(run: Run, tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    with Store.open(store):
        pass
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
