"""A model to run the command line on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from families import build

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk; nothing may change it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    lm = build("llama")
    lm.model.save_pretrained(folder)
    lm.require_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A tiny model on disk, which the test may change."""
    capsys.readouterr()  # transformers shows a bar while it writes
    return Path(shutil.copytree(saved_llama, tmp_path / "model"))


@pytest.fixture
def finished_search(run: Run, folder: Path, tmp_path: Path) -> tuple[str, Path]:
    """A finished search of a tiny model, and the store that holds it."""
    questions = tmp_path / "questions.jsonl"
    answers = ["Paris", "Rome", "true", "false"] * 5
    questions.write_text(
        "".join(json.dumps({"prompt": f"The capital number {i} is", "answer": a}) + "\n" for i, a in enumerate(answers))
    )
    store = tmp_path / "runs.db"
    command = ("--task", f"jsonl:{questions}", "--grid", "all.all@0.2,0.5", "--metric", "loss", "--strategy", "exhaustive")
    code, out, err = run("search", folder, *command, "--store", store, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["best"]
    return str(result["run"]), store
