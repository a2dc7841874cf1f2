"""The command that serves the app."""

from __future__ import annotations

import importlib
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from laserlm.store import Store

Run = Callable[..., tuple[int, str, str]]
CODE = "from laserlm.cli import main\nmain()"


@pytest.mark.slow
def test_the_app_is_served_until_it_is_interrupted(folder: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "runs.db"):
        pass
    arguments = [str(folder), "--port", "0", "--store", str(tmp_path / "runs.db"), "--cache", str(tmp_path / "cache")]
    with subprocess.Popen(
        [sys.executable, "-c", CODE, "app", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            assert url.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(url, timeout=60) as page:
                assert b"laserlm" in page.read()
        finally:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert err.splitlines() == [f"loading {folder}", "Press Ctrl-C to stop."]


def test_a_port_that_is_taken_is_reported_before_anything_is_loaded(run: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code, out, err = run("app", "no/such/model", "--port", port, "--store", tmp_path / "runs.db")
    assert (code, out) == (1, "")
    assert f"cannot listen on 127.0.0.1:{port}" in err
    assert "give another port with --port" in err
    assert not (tmp_path / "runs.db").exists()


def test_without_gradio_the_command_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("laserlm.cli.serve"), "find_spec", lambda _: None)
    code, _, err = run("app")
    assert code == 1
    assert "pip install 'laserlm[app]'" in err
