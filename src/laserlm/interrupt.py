"""Ctrl-C on the command line: one line and exit code 130, also while modules are imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
CLEAR = b"\r\x1b[K\x1b[?25h"
"""Clears a line with a part of a bar, and shows the cursor that a bar hides."""


def is_command() -> bool:
    """Return whether this process is the command ``laser`` or ``python -m laserlm``, and no program that imports laserlm."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name == "-m":  # Python looks for the module to run
        return any(pair == ("-m", "laserlm") for pair in zip(sys.orig_argv, sys.orig_argv[1:], strict=False))
    return name in ("laser", "laser.exe")


def install() -> bool:
    """Handle Ctrl-C from here on, unless it is handled or ignored already; return whether it was installed."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, _handle)
    sys.unraisablehook = _end_if_swallowed
    return True


def uninstall() -> None:
    """Undo ``install``."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = sys.__unraisablehook__


def end() -> NoReturn:
    """End the process at once with one line."""
    os.write(2, (CLEAR if os.isatty(2) else b"") + b"Interrupted.\n")
    os._exit(INTERRUPTED)


def _handle(_: int, frame: FrameType | None) -> None:
    """End at once during an import, which could swallow the exception or leave a module half imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            end()
        frame = frame.f_back
    raise KeyboardInterrupt


def _end_if_swallowed(error: UnraisableHookArgs) -> None:
    """End where Python would print and forget the exception, such as in a destructor."""
    if issubclass(error.exc_type, KeyboardInterrupt):
        end()
    sys.__unraisablehook__(error)
