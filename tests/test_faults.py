"""The faults that ``scripts/inject_faults.py`` puts into the source still mean something there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inject_faults", ROOT / "scripts" / "inject_faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _loaded()
FAULTS: list[Any] = SCRIPT.faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_applies_once_and_leaves_valid_python(fault: Any) -> None:
    source = (ROOT / "src" / "laserlm" / fault.file).read_text(encoding="utf-8")
    mutated = fault.put_into(source)
    assert mutated != source
    compile(mutated, fault.file, "exec")
    for file, _, test in (named.partition("::") for named in fault.tests):
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8") if test else (ROOT / file).exists()


def test_faults_go_by_different_names() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 48


@pytest.mark.parametrize(("old", "message"), [("x", "2 times"), ("z", "0 times"), ("y", "the new text is the old one")])
def test_a_fault_that_does_not_apply_is_reported(old: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCRIPT.Fault("a fault", "file.py", old, "y", ("tests",)).put_into("x = y + x")


def test_a_fault_is_in_the_copy_alone(tmp_path: Path) -> None:
    file = tmp_path / "src" / "laserlm" / "file.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1\n")
    with SCRIPT.copied(tmp_path, SCRIPT.Fault("a fault", "file.py", "1", "2", ("tests",))) as source:
        assert (source / "laserlm" / "file.py").read_text() == "x = 2\n"
        assert file.read_text() == "x = 1\n"
    assert not source.exists()
