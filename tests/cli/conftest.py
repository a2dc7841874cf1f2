"""A model to run the command line on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from families import build


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
