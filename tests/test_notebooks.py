"""The notebooks run from top to bottom. Their stored outputs are complete, portable and equal to what is measured here."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest

import laserlm as laser

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = ("ten_minutes", "one_reduction")
LARGEST = 1_000_000
"""Bytes of a stored notebook at most."""
STORED = {"ten_minutes": 300, "one_reduction": 1000}
"""Questions of a notebook as it is stored."""
FEW = 24
"""Questions of a notebook that is run here."""
NARROWER = {
    "20-29.all@": "28-29.all@",
    "max_harm=0.02, store": 'max_harm=0.02, strategy="strengths", grid="29.all@0.5", store',
}
"""What a notebook searches, and the part of it that it searches here."""
SHORT_GUARD = "from laserlm.searching import guard\nguard.PASSAGES, guard.PASSAGE_TOKENS = 8, 16\n"
"""Makes the text short that the model writes for a search, on which the harm of a reduction is measured."""
BASE = re.compile(r"worldfacts/test base: accuracy (\S+)% \[\S+%, \S+%\], loss (\S+) nats/token, n (\d+)")
MACHINE = re.compile(r"/(?:tmp|home|root|work|usr|opt|var|private|Users)/|[A-Z]:\\|site-packages|localhost|127\.0\.0\.1")

Execute = Callable[..., Any]


def stored(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code(notebook) for output in cell.outputs]


def texts(notebook: Any) -> str:
    """Return all that the cells print or show as text."""
    shown = [
        output.text if output.output_type == "stream" else "".join(v for k, v in output.data.items() if k.startswith("text/"))
        for output in outputs(notebook)
        if output.output_type != "error"
    ]
    return "\n".join(shown)


pytestmark = pytest.mark.xdist_group("notebooks")  # the tests compare one evaluation


@pytest.fixture(scope="session")
def base(bundled: laser.LanguageModel) -> laser.Evaluation:
    """The unchanged model on the first questions, which serve for all that ask for fewer."""
    return laser.evaluate(bundled, laser.task("worldfacts").test.limit(max(STORED.values())))


@pytest.fixture
def execute(bundled: laser.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Execute:
    """Run a notebook on the running Python in a temporary folder, some cells more at its end, and return it as it is then."""
    from nbclient import NotebookClient

    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        pytest.skip("no Chromium is installed, which draws the notebooks' figures")
    # A kernel of this Python, whatever kernels are installed, that finds the converted model where the fixture has it.
    kernel = tmp_path / "jupyter" / "kernels" / "running"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "running", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    assert bundled.cache.name == "laserlm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundled.cache.parent))
    monkeypatch.setenv("LASER_NOTEBOOK_QUESTIONS", str(FEW))
    working = tmp_path / "working"
    working.mkdir()

    def execute(name: str, *more: str) -> Any:
        notebook = copy.deepcopy(stored(name))
        for cell in code(notebook):
            cell.outputs, cell.execution_count = [], None
            for wide, narrow in NARROWER.items():
                cell.source = cell.source.replace(wide, narrow)
        code(notebook)[0].source = SHORT_GUARD + code(notebook)[0].source
        notebook.cells += [nbformat.v4.new_code_cell(source) for source in more]
        options: dict[str, Any] = {"resources": {"metadata": {"path": str(working)}}, "store_widget_state": False}
        NotebookClient(notebook, timeout=1800, kernel_name="running", **options).execute()
        assert list(working.iterdir()) == []  # what it writes, it writes in a folder of its own
        return notebook

    return execute


def check_base(notebook: Any, base: laser.Evaluation) -> int:
    """Compare the first evaluation that a notebook shows with one that is made here, and return its number of questions."""
    accuracy, loss, n = BASE.findall(texts(notebook))[0]
    here = replace(base, scores=base.scores[: int(n)])
    assert f"{here.accuracy:.1%}" == f"{accuracy}%"
    assert here.loss == pytest.approx(float(loss), abs=1.1e-3)
    return int(n)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_stored_notebook_holds_its_outputs_in_order_and_nothing_from_elsewhere(name: str) -> None:
    file = EXAMPLES / f"{name}.ipynb"
    assert file.stat().st_size < LARGEST
    notebook = stored(name)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    # Imports and clean-up apart, every cell shows something.
    assert sum(not cell.outputs for cell in cells) <= 3
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name", "stdout") == "stdout"  # no warnings, no progress bars
        # What needs a script, or a kernel, is not stored.
        assert set(output.get("data", {})) <= {"text/plain", "text/markdown", "image/png"}
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    printed = "\n".join([texts(notebook), *(cell.source for cell in notebook.cells)])
    assert not re.search(r"https?://|//cdn|<script|src=|\r", printed)
    assert not MACHINE.search(printed)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in notebook.cells)


@pytest.mark.bundled
@pytest.mark.slow
@pytest.mark.parametrize(("name", "questions"), STORED.items())
def test_the_stored_base_is_what_is_measured_here(name: str, questions: int, base: laser.Evaluation) -> None:
    assert check_base(stored(name), base) == questions


@pytest.mark.bundled
@pytest.mark.slow
def test_ten_minutes_runs_from_top_to_bottom(execute: Execute, bundled: laser.LanguageModel, base: laser.Evaluation) -> None:
    facts = """print(json.dumps({
        "best": str(race.best) in lowest,
        "counts": [race.candidates, race.validation.n, race.test.n],
        "default": [result.strategy, result.candidates, len(result.harms)],
        "mapped": [len(loss_map), race.scored],
        "questions": [s.answer for s in own_base.scores],
        "figures": [first.loss_change.value, race.validation.edited_loss - race.validation.base_loss],
        "saved": [dense.parameters, dense.base_parameters, factored.parameters],
        "gone": not folder.exists(),
        "same": lm.hash == before and not lm.active,
    }))"""
    lowest = """full = [m for m in loss_map if m.loss_change.n == race.validation.n]
first = min(full, key=lambda m: m.loss_change.value)
# Nothing is left of two small matrices, and it is the same whichever of them it is.
lowest = [f"{m.matrix}@{m.size}" for m in full if m.loss_change.value == first.loss_change.value]"""
    notebook = execute("ten_minutes", lowest, facts)
    assert check_base(notebook, base) == FEW
    values = json.loads(outputs(notebook)[-1].text)
    # 7 matrices at 6 sizes of each block; the map shows all that was scored, and the best of those that met every question.
    assert values["counts"] == [7 * 6 * 2, FEW, FEW]
    # Block 29 has two matrices with 192 singular values, and five with 576.
    assert values["default"] == ["strengths", 2 * 192 + 5 * 576, 1]
    assert values["mapped"][0] == values["mapped"][1] >= 40
    assert values["best"]
    assert values["figures"][0] == pytest.approx(values["figures"][1])
    assert values["questions"][:2] == ["Oslo", "Tokyo"]
    dense = sum(p.numel() for p in bundled.model.parameters())
    # 76 = floor(0.4 x 192) rows of 192 x 576, and the coefficients of the others.
    assert values["saved"] == [dense, dense, dense - 192 * 576 + 76 * (192 + 576 - 76)]
    assert values["gone"]
    assert values["same"]
    printed = texts(notebook)
    assert "loads as dense with transformers alone" in printed
    assert "loads as factored with laserlm imported" in printed
    assert printed.count("The capital of France is Paris") == 2


@pytest.mark.bundled
@pytest.mark.slow
def test_one_reduction_runs_from_top_to_bottom_and_its_sliders_move(execute: Execute, base: laser.Evaluation) -> None:
    facts = """import json
    print(json.dumps({
        "rank": [edit.rank, edit.max_rank, len(S)],
        "curve": [points[0].loss_change.value, {p.size: p.loss_change.value for p in points}["r144"]],
        "base": {p.size: p.loss_change.value for p in points}["r192"],
        "zero": [{p.size: p.loss_change.value for p in points}["r0"], results[-1].loss_change],
        "energy": sum(c.energy for c in chunks),
        "control": [results[0].control, results[0].loss_change, reduced.loss - base.loss],
        "unchanged": not lm.active,
    }))""".replace("\n    ", "\n")
    move = """prompt, block, matrix, kept = sliders.children[:4]
    said = [sliders.result.data]
    for slider, value in ((kept, 0.0), (matrix, "fc_up"), (block, 10), (prompt, "Water consists of oxygen and")):
        slider.value = value
        said.append(sliders.result.data)
    print(json.dumps(said))""".replace("\n    ", "\n")
    notebook = execute("one_reduction", facts, move)
    assert check_base(notebook, base) == FEW
    values, said = (json.loads(output.text) for output in outputs(notebook)[-2:])
    assert values["rank"] == [144, 192, 192]
    assert values["curve"][0] == pytest.approx(values["curve"][1], abs=1e-6)
    assert values["base"] == 0
    assert values["zero"][0] == pytest.approx(values["zero"][1], abs=1e-4)
    assert values["energy"] == pytest.approx(1, abs=1e-4)
    assert values["control"][0] == "low rank"
    assert values["control"][1] == pytest.approx(values["control"][2])
    assert values["unchanged"]
    (sliders,) = [o for o in outputs(notebook) if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert sliders.output_type == "execute_result"
    # Each slider changes what is shown: a table of three versions with five tokens each.
    assert len(set(said)) == len(said) == 5
    for table in said:
        rows = table.splitlines()[2:]
        assert [row.split(" | ")[0] for row in rows] == ["| unchanged", "| reduced", "| removed part alone"]
        assert all(row.count("% |") + row.count("%, ") == 5 for row in rows)
    unchanged, reduced, removed = said[1].splitlines()[2:]
    # With nothing kept, what is removed is the matrix itself.
    assert unchanged.split(" | ", 1)[1] == removed.split(" | ", 1)[1] != reduced.split(" | ", 1)[1]
    assert said[0].splitlines()[2] == said[3].splitlines()[2] != said[4].splitlines()[2]
