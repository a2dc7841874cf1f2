"""Where ``--out`` cannot be written, one sentence says so, and nothing is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    for out, said in (
        ("", f"{Path.cwd()} is a folder; give a file"),
        ("/", "/ is a folder; give a file"),
        (tmp_path, f"{tmp_path} is a folder; give a file"),
        (notes, f"{notes} exists and is not"),
        (notes / "deeper", str(notes)),
    ):
        code, printed, err = run(*command, "--out", out, *store)
        assert (code, printed) == (1, "")
        assert err.startswith("Error: ")
        assert said in err
        assert len(err.splitlines()) == 1
    assert notes.read_text() == "mine"
    for _ in range(2):  # its own file is replaced
        assert run(*command, "--out", fresh, *store)[0] == 0
    before = fresh.read_bytes()

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = run(*command, "--out", fresh, *store)
    assert (code, err) == (
        1,
        f"Error: cannot write {fresh}: No space left on device; free space on its disk, or give a path on another one\n",
    )
    assert fresh.read_bytes() == before


def test_a_leaderboard_replaces_no_folder_above(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in ("", ".", ".."):
        code, _, err = run("leaderboard", "build", "--out", out, "--store", tmp_path / "runs.db")
        assert code == 1
        assert "is the current folder or one above it" in err or "was not built by" in err
    assert os.getcwd() == str(tmp_path / "here")
