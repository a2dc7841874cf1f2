"""No control character of data, file names, outputs or errors reaches the terminal as such."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from rich.console import Console
from rich.table import Table

from laserlm.cli.terminal import escaped_output, visible

Run = Callable[..., tuple[int, str, str]]
ATTACKS = {
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "link": "\x1b]8;;https://example.com\x1b\\click\x1b]8;;\x1b\\",
    "eight-bit": "\x9b2J\x9d0;owned\x9c",
    "conceal": "\x1b[8msecret\x1b[0m",
    "back": "good\rbad\b\b\b",
    "reorder": "\u202egpj.exe\u2066",
    "device": "\x1bP+q544e\x1b\\\x05\x7f",
}
UNSAFE = set(map(chr, [*range(9), 11, 12, *range(13, 32), *range(0x7F, 0xA0), 0x202E, 0x2066]))


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_every_way_to_print_shows_control_characters(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    with escaped_output():
        print(attack, "end")
        print("stderr", attack, file=sys.stderr)
        click.echo(attack)
        click.echo(attack, err=True)
        sys.stdout.writelines(["a\tb\n", attack, "\n"])
        table = Table(attack, title=attack)
        table.add_row(attack)
        Console(width=200).print(table)
        Console(stderr=True, width=200).print(attack, markup=False, soft_wrap=True)
        handler = logging.StreamHandler()
        handler.emit(logging.LogRecord("x", logging.WARNING, "", 1, attack, (), None))
    out, err = capsys.readouterr()
    assert not UNSAFE & set(out + err)
    assert out.count(visible(attack)) >= 4
    assert "a\tb\n" in out
    assert visible(attack) in err


def test_what_is_escaped_is_still_the_same_json(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"a": "".join(ATTACKS.values()), "ü": "日本語 – ok\n\ttab"}
    with escaped_output():
        print(json.dumps(values, ensure_ascii=False))
    assert json.loads(capsys.readouterr().out) == values


def test_own_styles_and_bars_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with escaped_output():
        Console(stderr=True, force_terminal=True, color_system="standard").print("[bold]good[/bold]", end="")
        for text in ("\r 50%", "\n\x1b[A", "\r\n"):
            sys.stderr.write(text)
    assert sys.stderr.getvalue() == "\x1b[1mgood\x1b[0m\r 50%\n\x1b[A\r\n"


def test_bytes_of_a_file_name_that_is_not_utf_8_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with escaped_output():
        print("file \udcff\udc9b")
    assert capsys.readouterr().out == "file \\udcff\\udc9b\n"


def test_streams_are_as_before_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(KeyboardInterrupt), escaped_output():
        raise KeyboardInterrupt
    assert (sys.stdout, sys.stderr) == before


HOSTILE = "".join(ATTACKS.values())


def test_tasks_show_runs_and_errors_are_escaped(run: Run, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "q\x1b[2J.jsonl"
    rows = [{"id": HOSTILE + str(i), "prompt": f"The capital {i} {HOSTILE} is", "answer": "Rome"} for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = tmp_path / "runs.db"
    for arguments in (
        ("tasks", "show", f"jsonl:{file}", "--model", folder),
        ("search", folder, "--task", f"jsonl:{file}", "--grid", "0.fc_in@0.5", "--store", store),
        ("runs", "list", "--store", store),
        ("runs", "list", "--csv", "--store", store),
        ("runs", "show", "last", "--store", store),
        ("evaluate", "no\x1b]0;x\x07model"),
        ("search", folder, "--grid", HOSTILE),
        ("leaderboard", "add", f"no{HOSTILE}.json", "--to", tmp_path / "to"),
        ("no\x1b[2Jcommand",),
    ):
        code, out, err = run(*arguments)
        assert out + err, arguments
        assert not UNSAFE & set(out + err), arguments
        assert "\\u001b" in out + err or "\\x1b" in out + err or code == 0, arguments  # a quoted value is escaped by repr
    for shown in (run("tasks", "show", f"jsonl:{file}", "--model", folder), run("runs", "list", "--store", store)):
        assert "\\u001b" in shown[1]


def test_a_warning_says_whose_it_is_and_what_it_means(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warns() -> None:
        warnings.simplefilter("always")
        warnings.warn_explicit(f"odd {HOSTILE}", RuntimeWarning, "/x/site-packages/scipy/linalg/a.py", 7)
        sys.exit(0)

    monkeypatch.setattr("laserlm.cli.app", warns)
    code, out, err = run("x")
    assert (code, out) == (0, "")
    assert err.startswith("Warning of scipy: odd \\u001b]0;owned")
    assert "the command goes on; check its result" in err
    assert "RuntimeWarning at /x/site-packages/scipy/linalg/a.py:7" in err


def test_a_home_in_options_and_variables_is_read(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    def app() -> None:
        seen.extend([*sys.argv[1:], os.environ["LASER_STORE"]])
        sys.exit(0)

    monkeypatch.setattr("laserlm.cli.app", app)
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("LASER_STORE", "~/runs.db")
    run("search", "~/not an option", "--out", "~/a", "--cache=~/b", "--grid=~x", "-n", "~/c")
    assert seen == ["search", "~/not an option", "--out", "/h/a", "--cache=/h/b", "--grid=~x", "-n", "~/c", "/h/runs.db"]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["laserlm.cli", "laserlm.cli.save", "torch", "torch.nn"])
def test_ctrl_c_while_the_program_starts_is_one_line(module: str) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['laser', 'search', 'no/such/model']\n"
        "from laserlm.__main__ import main\nmain()"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (process.returncode, process.stdout) == (130, "")
    assert process.stderr.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("start", ["script", "module", "import"])
def test_ctrl_c_in_the_first_import_ends_the_command_in_one_line(start: str, tmp_path: Path) -> None:
    # Stands for the first module that the package imports, and is interrupted.
    (tmp_path / "wrapt.py").write_text("import signal; signal.raise_signal(signal.SIGINT); print('it goes on')")
    script = tmp_path / "laser"
    script.write_text("import sys\nfrom laserlm.__main__ import main\nsys.exit(main())")
    arguments = {"script": [script], "module": ["-m", "laserlm"], "import": ["-c", "import laserlm"]}[start]
    # A shell lets a process in the background ignore the signal.
    (tmp_path / "sitecustomize.py").write_text("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)")
    process = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    if start == "import":  # in a program of another, Ctrl-C is the program's own matter
        assert "KeyboardInterrupt" in process.stderr
        return
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "Interrupted.\n")


@pytest.mark.slow
def test_ctrl_c_in_a_destructor_is_not_forgotten() -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from laserlm import interrupt; interrupt.install()\n"
        "class A:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "A(); print('it goes on')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "Interrupted.\n")


def test_ctrl_c_in_a_command_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("laserlm.store.Store.open", interrupted)
    assert run("runs", "list") == (130, "", "Interrupted.\n")


@pytest.mark.slow
def test_ctrl_c_during_an_import_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow_module.py").write_text(
        "import time\nprint('importing', flush=True)\ntry: time.sleep(60)\nexcept BaseException: pass\ntime.sleep(60)\n"
    )
    code = (
        # A shell lets a process in the background ignore the signal.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import laserlm.cli as cli\ndef app(): import slow_module\ncli.app = app\ncli.main()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "Interrupted.\n")
