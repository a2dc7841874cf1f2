"""One of the two processes that test a program: one runs the program, the other its tests. Standard library only.

``sandbox`` starts this file as a script. The process that runs the program answers calls of one function over a pipe. The
process that runs the tests calls the function over that pipe and writes the verdict. Only values of literals go through the
pipe, as JSON, so a program gives the tests numbers, texts and collections of them, and never an object with code.

What a process can reach is decided before it starts (see ``sandbox``). In addition the script sets limits, and a hook
refuses what a function and its tests do not need: processes, sockets, signals, foreign code, and files outside of the
folder. The hook by itself stops programs that models generate. It does not stop an expert in the interpreter's internals.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

MB = 2**20
READY = b"ready\n"
MAX_LINE = 16 * MB
"""Longest answer to a call, in bytes."""
REFUSED_EVENTS = (
    "os.fork os.forkpty os.system os.exec os.posix_spawn os.startfile subprocess.Popen pty.spawn os.kill os.killpg "
    "signal.pthread_kill resource.setrlimit resource.prlimit sys.addaudithook os.putenv os.unsetenv"
).split()
REFUSED_EVENT_PREFIXES = ("socket.", "ctypes.", "urllib.", "http.", "sqlite3.")
FILE_EVENTS = (
    "os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.truncate os.chmod os.chown os.lchown os.chflags os.utime "
    "os.setxattr os.removexattr shutil.rmtree shutil.move shutil.copyfile shutil.chown"
).split()
LIST_EVENTS = ("os.listdir", "os.scandir")
REFUSED_MODULES = ("_ctypes", "_posixsubprocess", "_testcapi", "_testinternalcapi", "_xxsubinterpreters", "_interpreters")
FROM_ITEMS: dict[str, Any] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "bytes": bytes.fromhex,
    "complex": complex,
}


def encode(value: Any) -> Any:
    """Return a value of literals as JSON can hold it.

    Raises:
        TypeError: if the value is not None, a number, a text, bytes, or a collection of these.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in value]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": str(value)}
    raise TypeError(f"{type(value).__name__} is no number, text or collection of them")


def decode(plain: Any) -> Any:
    """Return the value that ``encode`` wrote."""
    if isinstance(plain, list):
        return [decode(item) for item in plain]
    if isinstance(plain, dict):
        [(kind, items)] = plain.items()
        return FROM_ITEMS[kind](decode(items))
    return plain


class Calls:
    """The pipes between a program and its tests."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming = os.fdopen(incoming, "rb")
        self._outgoing = os.fdopen(outgoing, "wb")

    def receive(self) -> Any:
        """Return what the other process sent next.

        Raises:
            EOFError: if the other process has ended, or sent too much.
        """
        line = self._incoming.readline(MAX_LINE)
        if not line.endswith(b"\n"):
            raise EOFError(
                "ended before its tests were done" if len(line) < MAX_LINE else f"an answer has over {MAX_LINE} bytes"
            )
        return json.loads(line)

    def send(self, plain: Any) -> None:
        self._outgoing.write(json.dumps(plain).encode() + b"\n")
        self._outgoing.flush()


def answer_calls(source: str, function: str, calls: Calls) -> None:
    """Run a program, and call its function as often as the tests ask for it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}

    def reply(act: Callable[[], Any]) -> None:
        try:
            plain = {"value": encode(act())}
        except BaseException as caught:  # noqa: BLE001 - SystemExit too is an answer
            plain = _error(caught)
        calls.send(plain)

    reply(lambda: exec(compile(source, "program.py", "exec", dont_inherit=True), namespace))
    while True:
        arguments, named = decode(calls.receive())
        reply(lambda: namespace[function](*arguments, **named))  # noqa: B023 - it is called at once


def run_tests(reference: str, tests: str, function: str, calls: Calls) -> str:
    """Run the tests of a function of the other process; return why they fail, or an empty text."""

    def candidate(*arguments: Any, **named: Any) -> Any:
        calls.send([encode(arguments), encode(named)])
        return received()

    def received() -> Any:
        reply = calls.receive()
        if "error" not in reply:
            return decode(reply["value"])
        kind = getattr(builtins, str(reply["error"]), None)
        ends_loops = (StopIteration, StopAsyncIteration)  # a loop of the tests would end early and count as passed
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ends_loops):
            raise kind(str(reply["text"]))
        raise RuntimeError(f"{reply['error']}: {reply['text']}")

    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        received()  # the program has run
        exec(compile(reference, "reference.py", "exec", dont_inherit=True), namespace)
        namespace[function] = candidate
        exec(compile(tests, "tests.py", "exec", dont_inherit=True), namespace)
    except BaseException as caught:  # noqa: BLE001 - whatever the tests raise, they did not pass
        return "{error}: {text}".format(**_error(caught))
    return ""


def _error(caught: BaseException) -> dict[str, str]:
    return {"error": type(caught).__name__, "text": str(caught)[:500]}


def become(user: int) -> None:
    """Give up the rights of root for those of a user without any."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def set_limits(seconds: int, memory: int) -> None:
    """Limit time, memory, file size, open files and processes. The sandbox ends the process a second before these limits."""
    for name, value in (
        ("RLIMIT_CPU", seconds + 1),
        ("RLIMIT_AS", memory),
        ("RLIMIT_FSIZE", MB),
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 64),  # threads count too, and a solution may use some
    ):
        if hasattr(resource, name):
            with suppress(ValueError, OSError):  # macOS has RLIMIT_AS and refuses it
                resource.setrlimit(getattr(resource, name), (value, value))
    signal.alarm(seconds + 1)


def install_hook(folder: str) -> None:
    """Refuse from now on every operation that has an effect outside the folder, and reading what is not of the interpreter."""
    inside = os.path.realpath(folder) + os.sep
    library = os.path.dirname(os.path.realpath(os.__file__)) + os.sep
    # A program may change this module, so the hook uses its own references.
    refused, changing, listing = frozenset(REFUSED_EVENTS), frozenset(FILE_EVENTS), frozenset(LIST_EVENTS)
    refused_prefixes, refused_modules = tuple(REFUSED_EVENT_PREFIXES), frozenset(REFUSED_MODULES)
    realpath, isdir, decoded, separator, null_device = os.path.realpath, os.path.isdir, os.fsdecode, os.sep, os.devnull
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def is_outside(path: Any, *allowed: str) -> bool:
        if isinstance(path, int):
            return False  # an open file was allowed before
        return not (realpath(decoded(path)) + separator).startswith((inside, *allowed))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in refused or event.startswith(refused_prefixes) or (event == "import" and arguments[0] in refused_modules):
            raise PermissionError(f"{event if event != 'import' else arguments[0]} is not allowed here")
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & writing) or any(letter in (mode or "") for letter in "wax+")
            # An open folder could be the start of a relative path.
            allowed = () if writes or isdir(path) else (library,)
            if path != null_device and is_outside(path, *allowed):
                raise PermissionError(f"opening {path!r} is not allowed here")
        elif event in listing or event in changing:
            allowed = (library,) if event in listing else ()  # imports list the library
            paths = [a or "." for a in arguments if a is None or isinstance(a, str | bytes | os.PathLike)]
            if any(is_outside(path, *allowed) for path in paths):
                raise PermissionError(f"{event} is not allowed outside the folder")

    for name in [n for n in sys.modules if n.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]  # otherwise a program could use it without an import
    for module, name in ((os, "pidfd_open"), (signal, "pidfd_send_signal")):  # these call no hook
        if hasattr(module, name):
            delattr(module, name)
    sys.addaudithook(hook)


def main() -> None:
    """Do one part of a test: run the program, or run the tests and write why they fail."""
    request = json.load(sys.stdin)
    output = os.dup(1)
    null_device = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null_device, stream)
    calls = Calls(*request["calls"])
    if request["user"] is not None:
        become(request["user"])
    set_limits(request["seconds"], request["memory"])
    install_hook(os.getcwd())
    os.write(output, READY)
    if request["part"] == "program":
        os.close(output)
        with suppress(EOFError, BrokenPipeError):
            answer_calls(request["source"], request["function"], calls)
    else:
        failure = run_tests(request["reference"], request["tests"], request["function"], calls)
        os.write(output, json.dumps({"failure": failure}).encode())
    os._exit(0)  # do not wait for threads of the program


if __name__ == "__main__":
    main()
