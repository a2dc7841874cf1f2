"""Say how a number is written that an option cannot read."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperGroup

UNREAD = {"float_parsing": "not a number", "int_parsing": "not a whole number"}
"""What is wrong with a text, by the name of Pydantic's error."""
BOUNDS = {"greater_than_equal": ("ge", "less", "least"), "less_than_equal": ("le", "more", "most")}
"""The key of a bound in Pydantic's error, and how a value is beyond it."""
CLICK = re.compile(r"^'(?P<text>.*)' is not a valid (?P<kind>float|integer)")
"""What the parser of older versions of Typer says, which is Click's."""


class Commands(TyperGroup):
    """Commands whose error for a number that cannot be read names the text, what is needed, and how to write it."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = _of_number(error) or error.message
            raise


def number_hint(value: object) -> str:
    """Return how a text that means a number is written as one, as the end of a sentence; empty if it means none."""
    text = str(value).strip()
    digits = text.removesuffix("%").rstrip().replace(",", ".")
    if digits == text or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", digits):
        return ""
    return f"; a share is written as a fraction: {float(digits) / 100:g}" if "%" in text else f"; write {digits}"


def _of_number(error: typer.BadParameter) -> str:
    """Return the message of an error that is about a number; empty if it is about something else."""
    if match := CLICK.match(error.message):
        kind = "float_parsing" if match["kind"] == "float" else "int_parsing"
        return _unread(match["text"], kind)
    for of_pydantic in getattr(error.__cause__, "errors", list)():
        value, kind = of_pydantic["input"], of_pydantic["type"]
        if kind in UNREAD:
            return _unread(str(value), kind)
        if kind in BOUNDS:
            key, beyond, limit = BOUNDS[kind]
            return f"{value} is {beyond} than {of_pydantic['ctx'][key]:g}, the {limit} that is allowed"
    return ""


def _unread(text: str, kind: str) -> str:
    return f"{text!r} is {UNREAD[kind]}{number_hint(text) if kind == 'float_parsing' else ''}"
