"""Hostile programs end as failures and harm nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from laserlm.errors import ScoringError
from laserlm.scoring import sandbox
from laserlm.scoring.sandbox import namespaces, run_program, run_programs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs are run where a process can be limited")

GOOD = "import math, typing, collections, hashlib, re, itertools\ndef one(): return 1\nassert one() == 1\n"


def test_a_program_that_passes_has_no_failure() -> None:
    assert run_program(GOOD) == ""


def test_a_program_that_does_not_reach_its_end_fails() -> None:
    reasons = {
        "assert 1 == 2, 'no'": "AssertionError: no",
        "def f(:": "SyntaxError",
        "import nothing_of_this_name": "ModuleNotFoundError",
        "import sys; sys.exit(0)": "SystemExit",
        "import os; os._exit(0)": "ended before its tests were done",
        "import os; os.abort()": "ended before its tests were done",
        "raise KeyboardInterrupt": "KeyboardInterrupt",
        "def f(): f()\nf()": "RecursionError",
        "input()": "EOFError",
    }
    for (program, reason), failure in zip(reasons.items(), run_programs(list(reasons)), strict=True):
        assert reason in failure, program


def test_a_program_without_end_is_ended() -> None:
    programs = {
        "endless loop": "while True: pass",
        "sleep": "import time; time.sleep(60)",
        "huge output": "while True: print('x' * 10000)",
        "huge number": "x = 10 ** 10 ** 10",
        "ignores signals": "import signal, time\nfor s in (14, 15, 2, 24): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
    }
    failures = run_programs(list(programs.values()), seconds=1)
    assert dict(zip(programs, failures, strict=True)) == dict.fromkeys(programs, "not done after 1 seconds")


def test_a_sandbox_that_does_not_start_is_an_error_and_not_a_failed_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CONFINED", Path("/nothing/of/this/name.py"))
    with pytest.raises(ScoringError, match="no confined process could be started"):
        run_program(GOOD)


def test_a_program_may_leave_anything_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = "import os\nfor i in range(1200):\n    os.mkdir('a')\n    os.chdir('a')\n"
    assert run_program(program) == ""
    monkeypatch.setattr(sandbox, "namespaces", tuple)
    assert run_program(program) == ""
    assert run_program("import os\nos.mkdir('b')\nos.chmod('b', 0)") == ""
    assert os.listdir(tmp_path) == []


def test_a_program_fills_no_disk() -> None:
    if not namespaces():
        pytest.skip("this system does not allow namespaces")
    fill = "for i in range(200):\n    with open(str(i), 'wb') as f: f.write(b'x' * 1_000_000)"
    assert "No space left" in run_program(fill)


def test_a_memory_bomb_gets_no_memory() -> None:
    assert run_program("x = []\nwhile True: x.append(bytearray(10**7))", seconds=5, memory=2**28) != ""
    assert "MemoryError" in run_program("bytearray(10**9)", memory=2**28)


def test_no_process_is_started() -> None:
    programs = [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.system('true')",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import os\nos.execv('/bin/true', ['true'])",
        "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()\np.join()\nassert p.exitcode == 0",
        "import _posixsubprocess",
    ]
    before = len(os.listdir("/proc")) if os.path.isdir("/proc") else 0
    for program, failure in zip(programs, run_programs(programs, seconds=3), strict=True):
        assert "not allowed here" in failure, program
    after = len(os.listdir("/proc")) if os.path.isdir("/proc") else 0
    assert after < before + 50


def test_nothing_outside_its_folder_is_written(tmp_path: Path) -> None:
    attacks = [
        "open({file!r}, 'w')",
        "open({file!r}, 'a')",
        "open({file!r}, 'r+')",
        "import os; os.open({file!r}, os.O_WRONLY | os.O_TRUNC)",
        "import os; os.remove({file!r})",
        "import os; os.rename({file!r}, {file!r} + '2')",
        "import os; os.link({file!r}, 'inside'); open('inside', 'w')",
        "import os; os.symlink({file!r}, 'inside'); open('inside', 'w')",
        "import os; os.truncate({file!r}, 0)",
        "import os; os.chmod({file!r}, 0)",
        "import shutil; shutil.rmtree({folder!r})",
        "import pathlib; pathlib.Path({folder!r}, 'new').mkdir()",
        "open('../new', 'w')",
        "import sqlite3; sqlite3.connect({folder!r} + '/new.db').execute('create table t (a)')",
    ]
    programs, files = [], []
    for number, attack in enumerate(attacks):
        file = tmp_path / str(number) / "precious.txt"
        file.parent.mkdir()
        file.write_text("kept")
        files.append(file)
        programs.append(attack.format(file=str(file), folder=str(file.parent)))
    for attack, file, failure in zip(attacks, files, run_programs(programs), strict=True):
        assert failure, attack
        assert file.read_text() == "kept", attack
        assert os.access(file, os.R_OK), attack
        assert os.listdir(file.parent) == ["precious.txt"], attack


def test_its_own_folder_is_its_own_but_not_for_huge_files() -> None:
    assert run_program("open('a', 'w').write('x')\nassert open('a').read() == 'x'\nimport os\nos.remove('a')") == ""
    assert "File too large" in run_program("with open('a', 'wb') as f:\n    while True: f.write(b'x' * 100000)")


def test_the_folder_is_empty_and_gone_afterwards(tmp_path: Path) -> None:
    message = run_program("import os\nassert False, os.getcwd() + str(os.listdir())")
    folder = message.removeprefix("AssertionError: ").removesuffix("[]")
    assert "laser-" in folder
    assert not os.path.exists(folder)


def test_it_can_end_no_other_process() -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for attack in (
            f"import os\nos.kill({victim.pid}, 9)",
            "import os\nos.kill(os.getppid(), 9)",
            "import os\nos.killpg(0, 9)",
            "import signal, threading\nsignal.pthread_kill(threading.get_ident(), 9)",
        ):
            assert "not allowed here" in run_program(attack)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_it_reaches_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "not allowed here" in run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))")
        assert run_program(f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')") != ""


def test_foreign_code_is_not_loaded_and_limits_stay() -> None:
    assert "_ctypes is not allowed here" in run_program("import ctypes\nctypes.CDLL(None)")
    assert (
        run_program("import sys\nassert 'ctypes' not in sys.modules\nimport __main__\nassert not hasattr(__main__, 'ctypes')")
        == ""
    )
    assert run_program("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))") != ""


def test_it_inherits_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    allowed = {"PATH", "HOME", "LANG", "LC_CTYPE", "PWD"}
    assert run_program(f"import os\nassert set(os.environ) <= {allowed}, os.environ") == ""


def test_a_program_cannot_say_that_it_passed() -> None:
    message = (
        'import os\nfor fd in range(64):\n    try: os.write(fd, b\'{"token": "x", "error": ""}\')\n    except OSError: pass\n'
    )
    assert run_program(message + "os._exit(0)") != ""


def test_threads_left_behind_are_not_waited_for() -> None:
    start = time.monotonic()
    assert run_program("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()") == ""
    assert time.monotonic() - start < 10


def test_many_programs_run_side_by_side_and_keep_their_order() -> None:
    assert [bool(f) for f in run_programs([GOOD, "assert False", GOOD, "1/0"])] == [False, True, False, True]


CONFINED = """
import os, socket, sys
sys.path.insert(0, {scripts!r})
import confined
confined.mount_read_only_except({folder!r})
failed = []
for name, attack in [
    ("write", lambda: open({outside!r}, "w")),
    ("network", lambda: socket.create_connection(("127.0.0.1", {port}), 1)),
    ("kill", lambda: os.kill({victim}, 9)),
]:
    try: attack()
    except OSError: failed.append(name)
with open(os.path.join({folder!r}, "inside"), "w") as f: f.write("x")
print(*failed, *os.listdir({folder!r}))
"""


def test_namespaces_hold_also_where_the_interpreter_refuses_nothing(tmp_path: Path) -> None:
    if not namespaces():
        pytest.skip("this system does not allow namespaces")
    (tmp_path / "own").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = CONFINED.format(
            scripts=str(sandbox.CONFINED.parent),
            folder=str(tmp_path / "own"),
            outside=str(tmp_path / "outside"),
            port=server.getsockname()[1],
            victim=os.getpid(),
        )
        done = subprocess.run([*namespaces(), sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["write", "network", "kill", "inside"]
    assert not (tmp_path / "outside").exists()


def test_without_namespaces_the_interpreter_still_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox, "namespaces", tuple)
    file = tmp_path / "file"
    assert run_program(GOOD) == ""
    for attack in (
        f"open({str(file)!r}, 'w')",
        f"import sqlite3\nsqlite3.connect({str(file)!r})",
        f"import os\nos.open({str(tmp_path)!r}, os.O_RDONLY)",
        "import os\nos.fork()",
        "import socket\nsocket.socket()",
        "import os\nos.kill(1, 9)",
        "import __main__, os\n__main__.REFUSED_EVENTS.clear()\n__main__.FILE_EVENTS.clear()\nos.kill(1, 9)",
    ):
        assert "not allowed here" in run_program(attack), attack
    assert "AttributeError" in run_program("import os\nos.pidfd_open(1)")
    assert not file.exists()
    assert run_program("while True: pass", seconds=1) == "not done after 1 seconds"


def test_a_system_without_namespaces_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    namespaces.cache_clear()
    try:
        assert namespaces() == ()
        assert "only the interpreter confines programs" in caplog.text
    finally:
        namespaces.cache_clear()


def test_ending_one_program_ends_no_other() -> None:
    failures: list[str] = []
    good = threading.Thread(target=lambda: failures.append(run_program("import time; time.sleep(2)")))
    good.start()
    assert run_program("while True: pass", seconds=1)
    good.join()
    assert failures == [""]
