"""Run generated programs, each in a confined process."""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from laserlm.errors import ScoringError
from laserlm.scoring.confined import READY

__all__ = ["namespaces", "run_program", "run_programs"]

log = logging.getLogger(__name__)
CONFINED = Path(__file__).with_name("confined.py")
NAMESPACES = ("--user", "--map-root-user", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child")
START_SECONDS = 30.0
"""Longest time until a process is ready to run its program."""
MAX_ANSWER_BYTES = 4096
"""Largest answer of a process."""


def run_programs(programs: Sequence[str], *, seconds: int = 10, memory: int = 2**30) -> list[str]:
    """Run programs in parallel, one for each processor that this process may use. See ``run_program``."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(processors) as pool:
        return list(pool.map(lambda program: run_program(program, seconds=seconds, memory=memory), programs))


def run_program(program: str, *, seconds: int = 10, memory: int = 2**30) -> str:
    """Run a program to its end. Return why it failed, or an empty text if it succeeded.

    The program has its own process with limits of time, memory, processes, open files and file size, an empty temporary
    folder, and no environment variables of this process. On Linux, if the kernel lets a user make namespaces, the program
    has no network, reaches no other process, and can write only in its folder. Elsewhere the interpreter refuses all this.

    Args:
        program: Python source. It fails if it raises an error, exits early, or reaches a limit.
        seconds: limit of processor time and of wall time.
        memory: limit of the address space in bytes, if the system has such a limit.

    Raises:
        ScoringError: if this system has no limits for processes, or the confined process does not start.
    """
    return _run(program, seconds, memory, namespaces())


def _run(program: str, seconds: int, memory: int, unshare: tuple[str, ...]) -> str:
    if os.name != "posix":
        raise ScoringError(
            "programs run only on Linux and macOS, where a process can be limited. Use another task or scorer here."
        )
    token = secrets.token_hex(16)
    with _folder() as folder:
        request = {
            "program": program,
            "folder": folder,
            "seconds": seconds,
            "memory": memory,
            "namespaces": bool(unshare),
            "token": token,
        }
        process = subprocess.Popen(
            [*unshare, sys.executable, "-I", "-S", "-B", str(CONFINED)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        if process.stdin is None or process.stdout is None:
            raise AssertionError("both streams are pipes")
        try:
            with suppress(BrokenPipeError), process.stdin as stdin:  # closing it writes, too
                stdin.write(json.dumps(request).encode())
            with process.stdout as stdout:
                ready = _read_pipe(stdout.fileno(), len(READY), time.monotonic() + START_SECONDS)
                end = time.monotonic() + seconds
                output = _read_pipe(stdout.fileno(), MAX_ANSWER_BYTES, end) if ready == READY else b""
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if ready != READY:
        raise ScoringError(
            f"no confined process could be started with {sys.executable}, so programs cannot be graded. Score this task on "
            "another machine."
        )
    try:
        answer = json.loads(output)
    except ValueError:
        return f"not done after {seconds} seconds" if time.monotonic() >= end else "ended before its tests were done"
    if not isinstance(answer, dict) or answer.get("token") != token:
        return "wrote something that only the tests may write"
    return str(answer["error"])


def _read_pipe(pipe: int, max_bytes: int, deadline: float) -> bytes:
    """Return the content of a pipe until its end, a number of bytes, or a deadline."""
    content = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(content) < max_bytes and selector.select(max(0.0, deadline - time.monotonic())):
            part = os.read(pipe, max_bytes - len(content))
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


@cache
def namespaces() -> tuple[str, ...]:
    """Return the command that starts a process in its own namespaces, or nothing if this system does not allow it."""
    command = shutil.which("unshare")
    if command is not None:
        with suppress(ScoringError):
            if not _run("pass", 10, 2**30, (command, *NAMESPACES)):
                return (command, *NAMESPACES)
    log.warning("this system does not allow namespaces: only the interpreter confines programs")
    return ()
