"""Everything that reaches the terminal: control characters in data, names and errors are shown as text, never obeyed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

import rich.text

UNSAFE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)")
"""C0 and C1 controls except tab and line ends, marks that reorder text, and bytes of file names that are not UTF-8."""
OWN_CURSOR = re.compile(r"\r?\n*(?:\x1b\[A)*")
"""How tqdm, whose bars other libraries show on stderr, begins to draw: back to the start of the line, or lines up."""


def visible(text: str) -> str:
    r"""Return a text with each control character as ``\u001b``, which JSON reads back as that character."""
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class _EscapedStream:
    """A text stream that writes control characters as text. rich, which escapes before it styles, writes past it."""

    def __init__(self, stream: TextIO, *, has_bars: bool) -> None:
        self.rich_proxied_file = stream  # rich looks for this name
        self._has_bars = has_bars

    def write(self, text: str) -> int:
        start = len(OWN_CURSOR.match(text)[0]) if self._has_bars else 0  # type: ignore[index]  # it matches nothing, too
        self.rich_proxied_file.write(text[:start] + visible(text[start:]))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # click would write bytes past this stream
            raise AttributeError(name)
        return getattr(self.rich_proxied_file, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """Let stdout, stderr and rich write control characters as text until the end of the block."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a stream of a test or a notebook
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    text: Any = rich.text
    strip = text.strip_control_codes  # every text passes it before rich measures the text
    text.strip_control_codes = visible
    out, err = _EscapedStream(sys.stdout, has_bars=False), _EscapedStream(sys.stderr, has_bars=True)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        text.strip_control_codes = strip
