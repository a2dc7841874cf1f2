from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from laserlm.cli import progress


def bar_output(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, seconds: float, advances: bool) -> str:
    out = io.StringIO()
    monkeypatch.setattr(progress, "stderr", Console(file=out, force_terminal=terminal, width=120))
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.05)
    with progress.progress_bar("scoring") as advance:
        time.sleep(seconds)
        if advances:
            advance(3, 12, "best 1.fc_in@0.5")
            time.sleep(0.3)
    return out.getvalue()


def test_a_bar_appears_after_a_while_and_shows_count_rate_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scoring" in bar_output(monkeypatch, terminal=True, seconds=0.3, advances=False)
    text = bar_output(monkeypatch, terminal=True, seconds=0.3, advances=True)
    assert "3/12" in text
    assert "examples/s" in text
    assert "best 1.fc_in@0.5" in text


def test_fast_work_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scoring" not in bar_output(monkeypatch, terminal=True, seconds=0, advances=False)


def test_no_bar_appears_if_stderr_is_not_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bar_output(monkeypatch, terminal=False, seconds=0.3, advances=True) == ""
