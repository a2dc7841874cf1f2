from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from laserlm.cli.save import FolderOptions
from laserlm.export.export_plan import ExportPlan, plan_save
from laserlm.models import load
from laserlm.searching.memory_plan import PhaseMemory

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The capital of France is Paris and the capital of Italy is Rome in Italy or Oslo. " * 120)
    return file


def test_a_plan_is_printed_in_gib(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gib = 2**30
    phases = {"gradients": PhaseMemory(3 * gib, activations=gib // 2), "writing": PhaseMemory(3 * gib, work=5 * gib)}
    FolderOptions(out=Path("out")).print_plan(ExportPlan(phases, 2 * gib, gib // 4, 7 * gib), tmp_path, json=False)
    assert capsys.readouterr().out.splitlines() == [
        "Memory of a process, without PyTorch's own: 8.00 GiB.",
        "Peak of each phase: gradients 3.50 GiB, writing 8.00 GiB. The model's weights take 3.00 GiB of it.",
        "out takes 2.00 GiB of its disk, and 0.25 GiB more until it is done.",
        "The cache folder grows by up to 7.00 GiB.",
    ]


def test_a_plan_is_printed_and_nothing_is_written(run: Run, folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run("save", folder, "--reduce", "all.mlp@0.2", "--form", "factored", "--out", out, "--dry-run", "--json")
    assert code == 0
    assert json.loads(printed) == plan_save(load(folder), "all.mlp@0.2", form="factored").as_dict()
    code, printed, _ = run("compress", folder, "--ratio", 0.8, "--calibration", text, "--out", out, "--dry-run")
    assert code == 0
    assert "Peak of each phase: gradients" in printed
    code, _, err = run("compress", folder, "--form", "adapter", "--calibration", text, "--out", out, "--dry-run")
    assert code == 1
    assert "no small adapter" in err
    assert not out.exists()
