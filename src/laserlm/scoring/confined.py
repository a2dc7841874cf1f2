"""Run one untrusted program. ``sandbox`` starts this file as a script; it uses the standard library only.

The script reads a JSON object from standard input. It writes to standard output that it is ready, and then how the program
ended. The program's own output is discarded. With namespaces, its folder is a small file system in memory, and all other
file systems are read-only. In any case the script sets limits, and a hook refuses everything that a function and its tests
do not need: processes, sockets, signals, foreign code, and writing outside the folder. The hook by itself stops programs
that models generate. It does not stop an expert in the interpreter's internals.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

__all__ = ["READY", "main"]

MB = 2**20
READY = b"ready\n"
REFUSED_EVENTS = (
    "os.fork os.forkpty os.system os.exec os.posix_spawn os.startfile subprocess.Popen pty.spawn os.kill os.killpg "
    "signal.pthread_kill resource.setrlimit resource.prlimit sys.addaudithook os.putenv os.unsetenv"
).split()
REFUSED_EVENT_PREFIXES = ("socket.", "ctypes.", "urllib.", "http.", "sqlite3.")
FILE_EVENTS = (
    "os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.truncate os.chmod os.chown os.lchown os.chflags os.utime "
    "os.setxattr os.removexattr shutil.rmtree shutil.move shutil.copyfile shutil.chown"
).split()
REFUSED_MODULES = ("_ctypes", "_posixsubprocess", "_testcapi", "_testinternalcapi", "_xxsubinterpreters", "_interpreters")
RDONLY, AT_RECURSIVE, AT_FDCWD, MOUNT_SETATTR = 1, 0x8000, -100, 442


def mount_read_only_except(folder: str) -> None:
    """Make all mounts of this namespace read-only, except for a new one in memory in place of a folder.

    Raises:
        OSError: if the kernel refuses.
    """
    import ctypes  # here, so that a program cannot find it

    libc = ctypes.CDLL(None, use_errno=True)
    mount_point = folder.encode()

    def check(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), "cannot make the file system read-only")

    def set_attributes(path: bytes, flags: int, added: int, removed: int) -> None:
        attributes = (ctypes.c_uint64 * 4)(added, removed)  # struct mount_attr
        check(libc.syscall(MOUNT_SETATTR, AT_FDCWD, path, flags, attributes, ctypes.sizeof(attributes)))

    libc.mount(b"proc", b"/proc", b"proc", 0, None)  # shows no other processes; containers may refuse it
    check(libc.mount(b"tmpfs", mount_point, b"tmpfs", 0, b"size=64m,mode=700"))
    set_attributes(b"/", AT_RECURSIVE, RDONLY, 0)
    set_attributes(mount_point, 0, 0, RDONLY)
    os.chdir(folder)  # the current folder lies below the mount


def set_limits(seconds: int, memory: int) -> None:
    """Limit time, memory, file size, open files and processes. The sandbox ends the process a second before these limits."""
    for name, value in (
        ("RLIMIT_CPU", seconds + 1),
        ("RLIMIT_AS", memory),
        ("RLIMIT_FSIZE", MB),
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 0),
    ):
        if hasattr(resource, name):
            with suppress(ValueError, OSError):  # macOS has RLIMIT_AS and refuses it
                resource.setrlimit(getattr(resource, name), (value, value))
    signal.alarm(seconds + 1)


def install_hook(folder: str) -> None:
    """Refuse from now on every operation that has an effect outside the folder."""
    inside = os.path.realpath(folder) + os.sep
    # A program may change this module, so the hook uses its own references.
    refused, file_events = frozenset(REFUSED_EVENTS), frozenset(FILE_EVENTS)
    refused_prefixes, refused_modules = tuple(REFUSED_EVENT_PREFIXES), frozenset(REFUSED_MODULES)
    realpath, isdir, decode, separator, null_device = os.path.realpath, os.path.isdir, os.fsdecode, os.sep, os.devnull
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def is_outside(path: Any) -> bool:
        if isinstance(path, int):
            return False  # an open file was allowed before
        return not (realpath(decode(path)) + separator).startswith(inside)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in refused or event.startswith(refused_prefixes) or (event == "import" and arguments[0] in refused_modules):
            raise PermissionError(f"{event if event != 'import' else arguments[0]} is not allowed here")
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & writing) or any(letter in (mode or "") for letter in "wax+")
            # An open folder could be the start of a relative path.
            if path != null_device and is_outside(path) and (writes or isdir(path)):
                raise PermissionError(f"opening {path!r} is not allowed here")
        elif event in file_events and any(is_outside(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)):
            raise PermissionError(f"{event} is not allowed outside the folder")

    for name in [n for n in sys.modules if n.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]  # otherwise a program could use it without an import
    for module, name in ((os, "pidfd_open"), (signal, "pidfd_send_signal")):  # these call no hook
        if hasattr(module, name):
            delattr(module, name)
    sys.addaudithook(hook)


def main() -> None:
    """Run the program from standard input, and write how it ended."""
    request = json.load(sys.stdin)
    output = os.dup(1)
    null_device = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null_device, stream)
    if request["namespaces"]:
        mount_read_only_except(request["folder"])
    set_limits(request["seconds"], request["memory"])
    install_hook(request["folder"])
    os.write(output, READY)
    error = ""
    try:
        exec(compile(request["program"], "program.py", "exec", dont_inherit=True), {"__name__": "__main__"})
    except BaseException as caught:  # noqa: BLE001 - SystemExit too ends the program before its tests are done
        error = f"{type(caught).__name__}: {caught}"[:500]
    os.write(output, json.dumps({"token": request["token"], "error": error}).encode())
    os._exit(0)  # do not wait for threads of the program


if __name__ == "__main__":
    main()
