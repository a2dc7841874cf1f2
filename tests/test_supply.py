"""The source reads no pickle and runs no text as code, except where it says so."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "laserlm"
FILES = sorted(SOURCE.rglob("*.py"))
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
RUNS_TEXT = {"scoring/confined.py"}
"""The process that is confined to run programs."""


def dotted(node: ast.expr) -> str:
    """Return a name such as ``torch.load`` as it is written."""
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def options(call: ast.Call) -> dict[str | None, object]:
    return {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in call.keywords}


def unsafe(source: str, name: str) -> Iterator[str]:
    """Yield what a source does that could run code of a file or a text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.partition(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            yield from (f"from {node.module} import {a.name}" for a in node.names if not a.name.endswith("Error"))
        elif isinstance(node, ast.Call):
            called, arguments = dotted(node.func), options(node)
            if called == "torch.load" and arguments.get("weights_only") is not True:
                yield called
            if any(arguments.get(name) is True for name in ("allow_pickle", "trust_remote_code", "shell")):
                yield f"{called} with {arguments}"
            if called in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load") and name not in RUNS_TEXT:
                yield called


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_no_source_unpickles_or_runs_text(file: Path) -> None:
    assert list(unsafe(file.read_text(encoding="utf-8"), file.relative_to(SOURCE).as_posix())) == []


UNSAFE = """import pickle
from marshal import loads
torch.load(f)
torch.load(f, weights_only=False)
numpy.load(f, allow_pickle=True)
subprocess.run(x, shell=True)
f(trust_remote_code=True)
yaml.load(f)
eval(x)"""


@pytest.mark.parametrize("source", UNSAFE.splitlines())
def test_what_is_unsafe_is_found(source: str) -> None:
    assert list(unsafe(source, "a.py"))
    assert not list(unsafe("torch.load(f, weights_only=True); numpy.load(f); from pickle import PicklingError", "a.py"))


def test_weights_are_read_from_safetensors_unless_asked_otherwise() -> None:
    loading = (SOURCE / "models" / "loading.py").read_text(encoding="utf-8")
    assert re.search(r'\{\} if allow_pickle else \{"use_safetensors": True\}', loading)


def test_nothing_is_downloaded_without_encryption() -> None:
    addresses = [a for file in FILES for a in re.findall(r"http://[\w.-]+", file.read_text(encoding="utf-8"))]
    assert set(addresses) <= {"http://127.0.0.1", "http://localhost", "http://www.w3.org"}


WEIGHTS_READERS = {"models/loading.py": ["options"]}
"""Files that read weights with options that hold ``use_safetensors`` unless a flag allows pickles."""


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_every_reader_of_weights_asks_for_safetensors(file: Path) -> None:
    name = file.relative_to(SOURCE).as_posix()
    for call in (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
        called, arguments = dotted(call.func).removeprefix("transformers."), options(call)
        if not called.endswith(".from_pretrained") or called.startswith(("AutoConfig.", "AutoTokenizer.", "PeftModel.")):
            continue
        is_from_memory = bool(call.args) and isinstance(call.args[0], ast.Constant) and call.args[0].value is None
        bags = [k.value.id for k in call.keywords if k.arg is None and isinstance(k.value, ast.Name)]
        is_allowed = bags == WEIGHTS_READERS.get(name)
        assert is_from_memory or is_allowed or arguments.get("use_safetensors") is True, f"{name}:{call.lineno}"
