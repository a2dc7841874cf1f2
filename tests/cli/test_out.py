"""Where ``--out`` cannot be written, one sentence says so, and nothing is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from laserlm import export
from laserlm.models import load
from laserlm.store import Store

Run = Callable[..., tuple[int, str, str]]
COMMANDS = {
    "report": ("report", "last"),
    "export": ("runs", "export", "last"),
    "submit": ("leaderboard", "submit", "last"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_an_unusable_place_is_named_with_the_next_step(
    run: Run, finished_search: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    store = ("--store", finished_search[1])
    notes, fresh = tmp_path / "notes.txt", tmp_path / "new.out"
    notes.write_text("mine")
    for out, message in (
        ("", f"{Path.cwd()} is a folder; give a file"),
        ("/", "/ is a folder; give a file"),
        (tmp_path, f"{tmp_path} is a folder; give a file"),
        (notes, f"{notes} exists and is not"),
        (notes / "deeper", str(notes)),
    ):
        code, printed, err = run(*command, "--out", out, *store)
        assert (code, printed) == (1, "")
        assert err.startswith("Error: ")
        assert message in err
        assert len(err.splitlines()) == 1
    assert notes.read_text() == "mine"
    assert run(*command, "--out", fresh, *store)[0] == 0
    before = fresh.read_bytes()
    code, printed, err = run(*command, "--out", fresh, *store)
    assert (code, printed) == (1, "")
    assert err == f"Error: {fresh} exists already; give another file, or --overwrite (overwrite=True)\n"
    assert fresh.read_bytes() == before
    assert run(*command, "--out", fresh, "--overwrite", *store)[0] == 0
    before = fresh.read_bytes()

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = run(*command, "--out", fresh, "--overwrite", *store)
    assert (code, err) == (
        1,
        f"Error: cannot write {fresh}: No space left on device; free space on its disk, or give a path on another one\n",
    )
    assert fresh.read_bytes() == before


def test_a_leaderboard_replaces_no_folder_above(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in ("", ".", ".."):
        code, _, err = run("leaderboard", "build", "--out", out)
        assert code == 1
        assert "is the current folder or one above it" in err or "was not built by" in err
    assert os.getcwd() == str(tmp_path / "here")


@pytest.mark.parametrize("command", [("save", "--reduce", "1.mlp@0.5"), ("compress", "--ratio", "0.9")])
def test_a_saved_model_replaces_no_folder_that_is_in_use(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    name, *options = command
    (folder / "laser.json").write_text("{}")  # so that laserlm would take it for its own
    files = sorted(path.name for path in folder.iterdir())
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("laserlm.models.load", None)  # the refusal comes before the model is loaded
    current = "is the current folder or one above it; give a new folder"
    holds = f"holds the model that is loaded, {folder}, and is not replaced; give another folder"
    for out, reason in (
        ("", current),
        (".", current),
        ("..", current),
        ("/", current),
        (folder, holds),
        (f"{folder}/", holds),
        (tmp_path / "link", holds),
        (f"{folder}/../model", holds),
    ):
        code, printed, err = run(name, folder, *options, "--out", out, "--overwrite")
        assert (code, printed) == (1, ""), out
        assert reason in err, out
        assert len(err.splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == files
    assert Path.cwd().is_dir()


def test_a_mistyped_store_is_named_and_not_created(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.open(tmp_path / "runs.db"):
        pass
    mistyped = tmp_path / "rums.db"
    commands: list[tuple[object, ...]] = [
        ("runs", "list"),
        ("runs", "show", "last"),
        ("runs", "export", "last"),
        ("runs", "delete", "last", "--yes"),
        ("report", "last"),
        ("leaderboard", "submit", "last"),
        ("leaderboard", "build", "--out", tmp_path / "site"),
        ("save", folder, "--run", "last", "--out", tmp_path / "out"),
        ("analyze", "flips", "last"),
        ("analyze", "matrices", folder, "--run", "last"),
    ]
    monkeypatch.setenv("LASER_STORE", str(mistyped))
    for command in commands:
        code, printed, err = run(*command)
        assert (code, printed) == (1, ""), command
        assert f"there is no results database {mistyped}; near it: {tmp_path / 'runs.db'}" in err, command
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("r")) == ["runs.db"]


def test_a_data_folder_that_does_not_exist_is_named(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("LASER_DATA", str(tmp_path / "dota"))
    code, printed, err = run("evaluate", folder, "--task", "counterfact")
    assert (code, printed) == (1, "")
    assert f"there is no folder {tmp_path / 'dota'} with data sets; near it: {tmp_path / 'data'}; correct LASER_DATA" in err
    assert run("tasks", "show", "worldfacts", "--model", folder)[0] == 0  # which comes with laserlm


def test_a_home_is_read_in_every_path(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "q.csv").write_text("question,answer\n" + "".join(f"The capital {i} is,Rome\n" for i in range(20)))
    command = ("evaluate", "~/model", "--cache", "~/c", "--limit", "2", "--split", "all", "--json")
    for task in ("~/q.csv", "jsonl:~/q.csv", "perplexity:~/q.csv"):
        assert run(*command, "--task", task)[0] == 0, task
    assert run("save", "~/model", "--reduce", "1.mlp@0.5", "--out", "~/out")[0] == 0
    assert (tmp_path / "out" / "laser.json").is_file()
    export.save(load("~/model", cache="~/own"), "1.mlp@0.5", "~/again")
    assert (tmp_path / "again" / "laser.json").is_file()
    assert load("~/model", cache="~/own").cache == tmp_path / "own"
