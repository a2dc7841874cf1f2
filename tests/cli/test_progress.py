from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from laserlm.cli import progress


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, seconds: float, told: bool) -> str:
    out = io.StringIO()
    monkeypatch.setattr(progress, "errors", Console(file=out, force_terminal=terminal, width=120))
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.05)
    with progress.bar("scoring") as advance:
        time.sleep(seconds)
        if told:
            advance(3, 12, "best 1.fc_in@0.5")
            time.sleep(0.3)
    return out.getvalue()


def test_a_bar_appears_by_itself_after_a_while_and_tells_count_rate_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scoring" in shown(monkeypatch, terminal=True, seconds=0.3, told=False)
    text = shown(monkeypatch, terminal=True, seconds=0.3, told=True)
    assert "3/12" in text
    assert "examples/s" in text
    assert "best 1.fc_in@0.5" in text


def test_what_is_done_at_once_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scoring" not in shown(monkeypatch, terminal=True, seconds=0, told=False)


def test_where_stderr_is_no_terminal_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, terminal=False, seconds=0.3, told=True) == ""
