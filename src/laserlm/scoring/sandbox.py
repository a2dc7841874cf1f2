"""Test generated programs. The tests run in another process than the program, and both processes are confined."""

from __future__ import annotations

import json
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from laserlm.errors import ScoringError
from laserlm.scoring.confined import READY

log = logging.getLogger(__name__)
CONFINED = Path(__file__).with_name("confined.py")
START_SECONDS = 30.0
"""Longest time until a process is ready."""
MAX_ANSWER_BYTES = 4096
"""Largest verdict."""
NOBODY = 65534
"""The user without rights."""
FOLDER_BYTES = 64 * 2**20
"""Size of a program's folder, which lies in memory."""
MACHINE = "Score this task on another machine."


@dataclass(frozen=True)
class Program:
    """A program that a model wrote, and the tests of one of its functions.

    Args:
        source: the program. Nothing of it is trusted.
        function: name of the tested function.
        reference: trusted source of what the tests may use next to the function. Its own definition of the function is not
            tested.
        tests: trusted source that calls the function, and raises an error if the function is wrong. Arguments and results
            are copied; they are numbers, texts, bytes, None, and collections of these.
    """

    source: str
    function: str
    reference: str
    tests: str


@dataclass(frozen=True)
class Confinement:
    """How processes are confined: the start of a command, and the user that the process has to become, if any."""

    command: tuple[str, ...]
    user: int | None = None

    @property
    def has_own_files(self) -> bool:
        """Whether a process sees a file system of its own."""
        return bool(self.command)


def run_programs(programs: Sequence[Program], *, seconds: int = 10, memory: int = 2**30, allow_weak: bool = False) -> list[str]:
    """Run the tests of programs in parallel. Return for each why they fail, or an empty text if they pass.

    A program has a process of its own, which answers calls of its function. The tests and their verdict are in a second
    process, which the program cannot reach. With bubblewrap a process has no network, no rights and no other processes. It
    sees the Python library and an empty folder in memory, and nothing else of the file system. Both have limits of time,
    memory, processes, open files and file size.

    Args:
        programs: the programs, and their tests.
        seconds: limit of processor time and of wall time.
        memory: limit of the address space in bytes, if the system has such a limit.
        allow_weak: whether programs may run where only the interpreter confines them.

    Raises:
        ScoringError: if this system cannot confine processes and ``allow_weak`` is false, or a process does not start.
    """
    way = confinement(allow_weak=allow_weak)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(processors) as pool:
        return list(pool.map(lambda program: _run(program, seconds, memory, way), programs))


def confinement(*, allow_weak: bool = False) -> Confinement:
    """Return how this system confines processes.

    Raises:
        ScoringError: if it cannot, and ``allow_weak`` is false or it has no limits for processes.
    """
    if os.name != "posix":
        raise ScoringError(f"programs run only on Linux and macOS, where a process can be limited. {MACHINE}")
    way = bubblewrap()
    if isinstance(way, Confinement):
        return way
    if not allow_weak:
        raise ScoringError(
            f"this system confines no programs: {way}. Install bubblewrap on Linux (apt-get install bubblewrap), use a "
            "virtual machine, or accept with --allow-weak-sandbox (allow_code_execution='weakly') that a malicious program "
            "could read and change your files."
        )
    log.warning("only the interpreter confines programs here (%s); a malicious program could read and change your files", way)
    return Confinement(())


@cache
def bubblewrap() -> Confinement | str:
    """Return how to start a process with bubblewrap, or why that fails here."""
    command = shutil.which("bwrap")
    if command is None:
        return "bubblewrap (bwrap) is not installed"
    # Root can become another user, which keeps it out of root's files. Others need a user namespace.
    rights = ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    namespaces = ("--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY))
    ways = [Confinement((command, *_view(), *rights), NOBODY)] if os.geteuid() == 0 else []
    ways.append(Confinement((command, *_view(), *namespaces)))
    probe = Program("import hashlib, math, random\ndef f(): return 1", "f", "", "import math\nassert f() == 1")
    failures = []
    for way in ways:
        try:
            if not (failure := _run(probe, 10, 2**30, way)):
                return way
        except ScoringError as error:
            failure = str(error)
        failures.append(failure)
    return f"bubblewrap does not work ({failures[-1]})"


def _view() -> tuple[str, ...]:
    """Return the options of bubblewrap for what a process sees: the interpreter, and an empty folder."""
    library = Path(sysconfig.get_path("stdlib"))
    own = library if library.parent.parent == Path("/usr") else library.parent  # of another Python: with its shared libraries
    triplet = sysconfig.get_config_var("MULTIARCH") or ""
    seen = [f"/usr/lib/{triplet}", f"/lib/{triplet}", "/lib64", "/usr/lib64", "/etc/ld.so.cache", str(own)]
    seen += [os.path.realpath(sys.executable)]
    options = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    options += ["--die-with-parent", "--new-session", "--dev", "/dev"]
    for folder in sorted({str(parent) for path in seen for parent in Path(path).parents if parent.name}):
        options += ["--perms", "0755", "--dir", folder]  # bubblewrap makes them for root alone
    for path in seen:
        options += ["--ro-bind-try", path, path]
    options += ["--ro-bind", str(CONFINED), "/confined.py"]
    options += ["--perms", "1777", "--size", str(FOLDER_BYTES), "--tmpfs", "/tmp"]
    return (*options, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp")


def _run(program: Program, seconds: int, memory: int, way: Confinement) -> str:
    """Test a program. Two pipes lead from process to process: calls go through one, and answers through the other."""
    common = {"seconds": seconds, "memory": memory, "user": way.user, "function": program.function}
    with ExitStack() as stack:
        with _pipes() as (calls, call, answers, answer):
            request = common | {"part": "program", "source": program.source}
            solver = stack.enter_context(_process(way, request, calls, answer))
            request = common | {"part": "tests", "reference": program.reference, "tests": program.tests}
            tester = stack.enter_context(_process(way, request, answers, call))
        start = time.monotonic()
        for process in (solver, tester):
            if _read_pipe(process.stdout, len(READY), start + START_SECONDS) != READY:
                process.kill()
                output = _read_pipe(process.stderr, MAX_ANSWER_BYTES, start + START_SECONDS).decode(errors="replace").strip()
                raise ScoringError(f"no confined process could be started with {sys.executable} ({output[-300:]}). {MACHINE}")
        end = time.monotonic() + seconds
        verdict = _read_pipe(tester.stdout, MAX_ANSWER_BYTES, end)
    if not verdict:
        return f"not done after {seconds} seconds" if time.monotonic() >= end else "ended before its tests were done"
    return str(json.loads(verdict)["failure"])


@contextmanager
def _pipes() -> Iterator[tuple[int, int, int, int]]:
    """Yield the ends of two pipes, the reading one first; both processes inherit theirs, and this process closes all."""
    ends = (*os.pipe(), *os.pipe())
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


@contextmanager
def _process(way: Confinement, request: Mapping[str, Any], incoming: int, outgoing: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a confined process with its request and its ends of the pipes; end it and all its threads."""
    script = "/confined.py" if way.has_own_files else str(CONFINED)
    with _folder() as folder:
        process = subprocess.Popen(
            [*way.command, os.path.realpath(sys.executable), "-I", "-S", "-B", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": "/tmp" if way.has_own_files else folder, "LANG": "C.UTF-8"},
            pass_fds=(incoming, outgoing),
            start_new_session=True,
        )
        try:
            with suppress(BrokenPipeError), process.stdin as stdin:  # type: ignore[union-attr]  # closing it writes, too
                stdin.write(json.dumps({**request, "calls": (incoming, outgoing)}).encode())
            yield process
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdout, process.stderr):
                stream.close()  # type: ignore[union-attr]


def _read_pipe(pipe: IO[bytes] | None, max_bytes: int, deadline: float) -> bytes:
    """Return the content of a pipe until its end, a number of bytes, or a deadline."""
    if pipe is None:
        raise AssertionError("the streams of a confined process are pipes")
    content = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(content) < max_bytes and selector.select(max(0.0, deadline - time.monotonic())):
            part = os.read(pipe.fileno(), max_bytes - len(content))
            if not part:
                break
            content += part
    return content


@contextmanager
def _folder() -> Iterator[str]:
    """Yield an empty folder, and remove it with all that a program put there."""
    folder = tempfile.mkdtemp(prefix="laser-")
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except RecursionError:  # deeply nested folders
            subprocess.run(["rm", "-rf", folder], check=False)
