"""A model to run the command line on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from laserlm.models import LanguageModel

Make = Callable[..., LanguageModel]


@pytest.fixture
def folder(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    lm = make("llama")
    lm.model.save_pretrained(tmp_path / "model")
    lm.need_tokenizer().save_pretrained(tmp_path / "model")
    capsys.readouterr()  # transformers shows a bar while it writes
    return tmp_path / "model"
