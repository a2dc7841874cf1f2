from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from laserlm.export.export_plan import plan_save
from laserlm.models import load

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The capital of France is Paris and the capital of Italy is Rome in Italy or Oslo. " * 120)
    return file


def test_a_plan_is_printed_and_nothing_is_written(run: Run, folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run("save", folder, "--reduce", "all.mlp@0.2", "--form", "factored", "--out", out, "--dry-run", "--json")
    assert code == 0
    assert json.loads(printed) == plan_save(load(folder), "all.mlp@0.2", form="factored").as_dict()
    code, printed, _ = run("compress", folder, "--ratio", 0.8, "--calibration", text, "--out", out, "--dry-run")
    assert code == 0
    assert "Peak of each phase: gradients 0.0" in printed
    assert "The cache folder grows by up to 0.00 GiB." in printed
    assert not out.exists()
