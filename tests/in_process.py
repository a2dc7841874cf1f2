"""Checking a saved model in the process of the test, where a process of its own would take seconds to import PyTorch."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from laserlm.export import check


def run_script(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
    """Stand for ``subprocess.run`` where a command is an interpreter, options of one letter, a script and its arguments."""
    interpreter, *rest = command
    assert interpreter == sys.executable
    while rest[0].startswith("-"):
        rest.pop(0)
    error = ""
    with redirect_stdout(io.StringIO()) as out, patch.object(sys, "argv", rest):
        try:
            runpy.run_path(rest[0], run_name="__main__")
        except Exception:  # noqa: BLE001  as an interpreter does with what a script raises
            error = traceback.format_exc()
    return subprocess.CompletedProcess(list(command), int(bool(error)), out.getvalue(), error)


def check_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``load_check`` run its script here; laserlm counts as imported there, for it is."""
    monkeypatch.setattr(check, "subprocess", SimpleNamespace(run=run_script))
