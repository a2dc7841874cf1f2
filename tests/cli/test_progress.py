from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from laserlm.cli import progress
from laserlm.cli.terminal import escaped_output
from laserlm.searching import SearchProgress


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


def test_without_a_terminal_a_line_comes_every_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    seen = threading.Event()

    def print_line(text: str) -> None:
        lines.append(text)
        seen.set()

    assert bar_output(monkeypatch, terminal=False, seconds=0, advances=False) == ""
    monkeypatch.setattr(progress, "print_stderr", print_line)
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.001)
    with progress.progress_bar("scoring") as advance:
        advance(3, 12, "best 1.fc_in@0.5", label="rung 1 of 2")
        while not any(line.startswith("rung 1 of 2: 25%") for line in lines):
            seen.clear()
            assert seen.wait(10)
    assert "left, best 1.fc_in@0.5; 3/12, " in lines[-1]


def test_a_bar_keeps_its_colours_and_messages_are_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    monkeypatch.setattr(progress, "stderr", Console(stderr=True, force_terminal=True, width=80, highlight=False))
    monkeypatch.setattr("threading.Timer", ImmediateTimer)
    with escaped_output(), progress.progress_bar("scoring") as advance:
        advance(3, 12, "a \x1b[31mred\x1b[0m note")
        progress.print_stderr("WARNING: \x1b[31mred\x1b[0m")
    text = out.getvalue()
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).count("\\u001b[31mred") >= 2
    assert "\\u001b[2K" not in text
    assert "\x1b[2K" in text


class ImmediateTimer:
    def __init__(self, _: float, function: Callable[[], None]) -> None:
        self.start = function

    def cancel(self) -> None: ...

    join = cancel


def test_a_search_fits_into_80_columns_with_stage_percentage_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(progress, "stderr", Console(file=out, force_terminal=True, width=80, color_system=None))
    monkeypatch.setattr("threading.Timer", ImmediateTimer)
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    best: Any = SimpleNamespace(accuracy_interval=(0.3, 0.5), accuracy=0.4, loss=1.5, n=64, intervention="27.fc_up@0.05")
    with progress.search_progress_bar() as on_step:
        on_step(SearchProgress("guards", 0, 0.0, 0.0, 0, None, ""))
        clock[0] += 100.0  # the model writes its text
        on_step(SearchProgress("test", 1, 0.0, 200.0, 0, None, ""))
        clock[0] += 60.0
        on_step(SearchProgress("rung 2 of 5", 9, 50.0, 200.0, 50, best, ""))
        clock[0] += 30.0
    lines = [line for line in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|\s*\r|\s*\n", out.getvalue()) if line]
    assert lines[0].startswith("search: preparing")
    assert max(map(len, lines)) <= 80, lines
    assert re.fullmatch(r"search: rung 2 of 5 \S+ +\S* +25% 0:02:30 left *", lines[-2])
    assert lines[-1].startswith("9 alive; best 27.fc_up@0.05 40.0% [30.0%, 50.0%], loss 1.500, of 64; 50/200,")
