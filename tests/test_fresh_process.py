"""What only a fresh interpreter can show: what an import brings with it, and who can load a folder after which imports.

Each process answers several questions, in the order in which an earlier answer does not change a later one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build

import laserlm
from laserlm.export import load_in_subprocess
from laserlm.lab.sokoban.levels import generate
from laserlm.lab.sokoban.model import SokobanConfig, SokobanForCausalLM, tokenizer
from laserlm.tasks import Example, Task

pytestmark = pytest.mark.xdist_group("fresh_process")  # so that each process runs once

QUESTIONS = [{"id": str(i), "prompt": f"The capital number {i} is", "answer": "Paris"} for i in range(8)]
TYPED = "laser search bundled --task w"
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "channels": 4, "depth": 1}
LEVELS = [level.text + moves for level, moves in generate(3, seed=5, boxes=1, room=4)]


def fresh(code: str, inputs: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter of its own, which reads its inputs as JSON in its environment."""
    env = os.environ | {"INPUTS": json.dumps(inputs), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved models: a whole one, and reduced ones of both forms, that of the lab among them."""
    path = tmp_path_factory.mktemp("fresh")
    llama = build("llama")
    llama.model.save_pretrained(path / "llama")
    llama.require_tokenizer().save_pretrained(path / "llama")
    laserlm.save(llama, "all.mlp@0.2", path / "dense")
    laserlm.save(llama, "all.mlp@0.2", path / "factored", form="factored")
    laserlm.save(build("gpt2"), "1.v_proj@0.2", path / "fused", form="factored")  # one matrix of one block is enough
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SokobanForCausalLM(SokobanConfig(**SMALL)).save_pretrained(path / "lab")
    tokenizer().save_pretrained(path / "lab")
    laserlm.save(laserlm.load(path / "lab"), "1.fc_in@0.2", path / "lab-dense")
    return {folder.name: str(folder) for folder in path.iterdir()}


COMMAND = f"""
import importlib, io, json, os, sys
from contextlib import redirect_stdout

inputs, report = json.loads(os.environ["INPUTS"]), {{"heavy": {{}}}}

def heavy(after):
    report["heavy"][after] = [name for name in ("torch", "transformers") if name in sys.modules]

for name in ("laserlm", "laserlm.reductions", "laserlm.store", "laserlm.cli"):
    importlib.import_module(name)
    heavy(name)
sys.modules["laserlm.reductions"].Grid.parse("paper")
heavy("reading a grid")

cli = sys.modules["laserlm.cli"]
os.environ |= {{"_LASER_COMPLETE": "complete_bash", "COMP_WORDS": {TYPED!r}, "COMP_CWORD": "4"}}
with redirect_stdout(io.StringIO()) as out:
    try:
        cli.app(prog_name="laser")
    except SystemExit:
        pass
del os.environ["_LASER_COMPLETE"]
report["proposed"] = out.getvalue().split()
heavy("completing")

sys.argv = inputs["command"]
try:
    cli.main()
except SystemExit as left:
    report["code"] = left.code
sys.stdout.flush()
report["lab after an ordinary model"] = [name for name in sys.modules if name.startswith("laserlm.lab")]

import laserlm
from laserlm.tasks import Example, Task

examples = [Example(id=f"q{{i}}", prompt=f"p{{i}}", answer="a") for i in range(40)]
report["validation"] = [e.id for e in Task.of("t", examples).validation]
lm = laserlm.load(inputs["lab"])
ids = [lm.tokenizer(text, return_tensors="pt").input_ids for text in inputs["levels"]]
report["logits"] = [lm.model(i).logits[0, -3].tolist() for i in ids]
with open(inputs["report"], "w") as file:
    json.dump(report, file)
"""


@pytest.fixture(scope="module")
def command(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a process that imported laserlm, ran a command, and used what comes with laserlm."""
    place = tmp_path_factory.mktemp("command")
    (place / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    options = {
        "command": ["laser", "evaluate", folders["llama"], "--json", "--task", f"jsonl:{place / 'questions.jsonl'}"],
        "lab": folders["lab"],
        "levels": LEVELS,
        "report": str(place / "report.json"),
    }
    cache = {"XDG_CACHE_HOME": str(place / "cache"), "XDG_DATA_HOME": str(place / "data")}
    done = fresh(COMMAND, options, PYTHONHASHSEED="1", **cache)
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads((place / "report.json").read_text())
    return values | {"stdout": done.stdout, "stderr": done.stderr}


@pytest.mark.parametrize(
    "after", ["laserlm", "laserlm.reductions", "laserlm.store", "laserlm.cli", "reading a grid", "completing"]
)
def test_neither_torch_nor_transformers_is_imported(after: str, command: dict[str, Any]) -> None:
    assert command["heavy"][after] == []


def test_the_shell_learns_what_there_is(command: dict[str, Any]) -> None:
    assert set(command["proposed"]) == {"web-of-lies", "wikidata-qa", "worldfacts"}


def test_stdout_holds_nothing_but_the_result_and_no_bar_where_stderr_is_no_terminal(command: dict[str, Any]) -> None:
    assert command["code"] in (0, None)
    assert json.loads(command["stdout"])["n"] > 0
    assert [line for line in command["stderr"].splitlines() if not line.startswith("WARNING: the task jsonl:")] == []


def test_the_shuffled_split_does_not_depend_on_the_hash_seed(command: dict[str, Any]) -> None:
    task = Task.of("t", [Example(id=f"q{i}", prompt=f"p{i}", answer="a") for i in range(40)])
    assert command["validation"] == [e.id for e in task.validation]


def test_loading_an_ordinary_model_imports_nothing_of_the_lab(command: dict[str, Any]) -> None:
    assert command["code"] in (0, None)
    assert command["lab after an ordinary model"] == []


@torch.no_grad()
def test_a_model_of_the_lab_loads_in_a_process_that_knows_nothing_of_the_lab(
    command: dict[str, Any], folders: dict[str, str]
) -> None:
    lm = laserlm.load(folders["lab"])
    for result, text in zip(command["logits"], LEVELS, strict=True):
        expected = lm.model(lm.require_tokenizer()(text, return_tensors="pt").input_ids).logits[0, -3]
        assert result == pytest.approx(expected.tolist(), abs=1e-6)


TRANSFORMERS = """
import io, json, logging, os, runpy, sys
from contextlib import redirect_stdout
import transformers
from transformers import AutoModelForCausalLM

inputs, report, log = json.loads(os.environ["INPUTS"]), {"log": {}, "error": {}, "known": {}}, io.StringIO()
transformers.utils.logging.add_handler(logging.StreamHandler(log))

def known(before):
    report["known"][before] = [name for name in ("laserlm", "laserlm.lab") if name in sys.modules]

def by_script(folder):
    sys.argv = [inputs["script"], folder]
    with redirect_stdout(io.StringIO()) as out:
        runpy.run_path(inputs["script"], run_name="__main__")
    return json.loads(out.getvalue().splitlines()[-1])

report["dense"] = by_script(inputs["dense"])
for name in ("factored", "fused"):
    log.truncate(0)
    try:
        AutoModelForCausalLM.from_pretrained(inputs[name])
    except RuntimeError as error:
        report["error"][name], report["log"][name] = str(error), log.getvalue()
known("laserlm")

import laserlm

known("the lab")
report["low rank"] = type(AutoModelForCausalLM.from_pretrained(inputs["factored"]).model.layers[1].mlp.up_proj).__name__
report["factored"] = by_script(inputs["factored"])
report["lab"] = by_script(inputs["lab-dense"])
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def transformers_first(folders: dict[str, str]) -> dict[str, Any]:
    """The report of a process that imported transformers, and laserlm only after it had loaded without it."""
    done = fresh(TRANSFORMERS, folders | {"script": load_in_subprocess.__file__})
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def test_each_question_is_asked_before_what_would_change_its_answer(transformers_first: dict[str, Any]) -> None:
    assert transformers_first["known"] == {"laserlm": [], "the lab": ["laserlm"]}


def recorded(folder: str) -> Any:
    return json.loads((Path(folder) / "laser.json").read_text())["fingerprint"]


def complete(output: dict[str, Any]) -> bool:
    return not any(output[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_dense_form_loads_with_transformers_alone(transformers_first: dict[str, Any], folders: dict[str, str]) -> None:
    values = transformers_first["dense"]
    assert not values["imported"]
    assert complete(values)
    torch.testing.assert_close(torch.tensor(values["fingerprint"]), torch.tensor(recorded(folders["dense"])))


@pytest.mark.parametrize("name", ["factored", "fused"])
def test_without_laserlm_the_factored_form_does_not_load_at_all(name: str, transformers_first: dict[str, Any]) -> None:
    printed = transformers_first["log"][name] + transformers_first["error"][name]
    assert "Unknown quantization type, got laserlm" in printed
    assert "size mismatch" in printed


def test_the_factored_form_loads_once_laserlm_is_imported_after_transformers(
    transformers_first: dict[str, Any], folders: dict[str, str]
) -> None:
    assert transformers_first["low rank"] == "LowRankLinear"
    assert complete(transformers_first["factored"])
    outputs = torch.tensor(transformers_first["factored"]["fingerprint"])
    torch.testing.assert_close(outputs, torch.tensor(recorded(folders["factored"])), atol=1e-5, rtol=1e-4)


def test_a_reduced_model_of_the_lab_loads_by_what_its_record_says(
    transformers_first: dict[str, Any], folders: dict[str, str]
) -> None:
    assert complete(transformers_first["lab"])
    outputs = torch.tensor(transformers_first["lab"]["fingerprint"])
    torch.testing.assert_close(outputs, torch.tensor(recorded(folders["lab-dense"])), atol=1e-5, rtol=1e-4)


def test_the_command_checks_a_factored_folder_in_a_process_where_laserlm_comes_first(
    run: Callable[..., tuple[int, str, str]], folders: dict[str, str]
) -> None:
    code, printed, err = run("load-check", folders["factored"], "--json")
    assert code == 0, err
    values = json.loads(printed)
    assert values["form"] == "factored"
    assert values["imported_laserlm"]
    assert values["changed"] == []
    assert values["difference"] <= values["tolerance"]
