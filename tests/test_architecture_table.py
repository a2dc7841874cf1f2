"""The table of families in docs/architectures.md is the one that its script makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from laserlm.export import save
from laserlm.models import load
from laserlm.models.matrices import default_matrices

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("architecture_table", ROOT / "scripts" / "architecture_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look it up
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


def test_the_page_has_the_columns_and_the_families_of_the_script(script: Any) -> None:
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    table = page.split(script.START)[1].split(script.END)[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert tuple(cells[0]) == script.COLUMNS
    assert [row[0] for row in cells[2:]] == [f"`{family.type}`" for family in script.families()]
    assert len(cells) == 2 + 22


def test_a_row_is_what_its_family_does(script: Any, tmp_path: Path) -> None:
    family = next(f for f in script.families() if f.type == "distilbert")
    row = script.row(family, tmp_path)
    assert tuple(row) == script.COLUMNS
    del row["opens in 4.57"]
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith("| `distilbert` ")]
    assert all(f" {value} " in line for value in row.values())


def test_the_script_replaces_the_table_alone(script: Any) -> None:
    page = f"before\n{script.START}\nold\n{script.END}\nafter\n"
    table = script.table([{"type": "a", "loads": "yes"}])
    assert script.page_with(table, page) == (
        f"before\n{script.START}\n\n| type | loads |\n| --- | --- |\n| a | yes |\n\n{script.END}\nafter\n"
    )


@pytest.mark.slow
def test_models_saved_here_open_in_transformers_4_57_with_the_same_logits(script: Any, tmp_path: Path) -> None:
    expected = {}
    for family in script.families():
        folder = tmp_path / family.type
        script.save_source(family, folder)
        lm = load(folder / "source", dtype=None)
        reduction = f"{default_matrices(lm.matrices)[0].id}@r4"
        save(lm, reduction, folder / "out")
        expected[folder / "out"] = script.reduced_logits(lm, reduction)
    script.install_old(tmp_path / "library")
    answers = script.open_in_old(expected, tmp_path / "library")
    assert dict(zip(expected, answers, strict=True)) == dict.fromkeys(expected, "yes (4.57.6)")
    one, *_ = expected
    assert script.open_in_old({one: expected[one] + 1}, tmp_path / "library") == ["no: logits differ by 1"]
