"""Say how a number is written that an option cannot read."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import typer
from typer.core import TyperGroup

PARSING_ERRORS = {"float_parsing": "not a number", "int_parsing": "not a whole number"}
"""What is wrong with a text, by the name of Pydantic's error."""
RANGE_ERRORS = {"greater_than_equal": ("ge", "less", "least"), "less_than_equal": ("le", "more", "most")}
"""The key of a bound in Pydantic's error, and how a value is beyond it."""
CLICK_ERROR = re.compile(r"^'(?P<text>.*)' is not a valid (?P<kind>float|integer)")
"""What the parser of older versions of Typer says, which is Click's."""
SHARES = frozenset({"alpha", "delta", "dense_above", "keep", "max_harm", "measure", "ratio"})
"""Options whose value is a share, so that a text in per cent means one."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
"""A number whose commas may stand between thousands."""


class NumberErrorGroup(TyperGroup):
    """Commands whose error for a number that cannot be read names the text, what is needed, and how to write it."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = _number_error(error) or error.message
            raise


def number_hint(value: object, option: str, *, is_whole: bool = False) -> str:
    """Return how a text that means a number is written as one, as the end of a sentence; empty if that is not certain.

    Args:
        value: what was given.
        option: the option's name as a parameter. Only a share may be given in per cent.
        is_whole: whether the option takes whole numbers.
    """
    if not isinstance(value, str):
        return ""  # nested lists of a file may be endless as text
    text = value.strip()
    digits = text.removesuffix("%").rstrip()
    if is_whole:
        return f"; write {text.replace(',', '')}" if THOUSANDS.fullmatch(text) else ""
    if THOUSANDS.fullmatch(digits):
        return "; write it without a comma, and decimals after a point"
    digits = digits.replace(",", ".")
    if digits == text or not NUMBER.fullmatch(digits):
        return ""
    if "%" not in text:
        return f"; write {digits}"
    return f"; a share is written as a fraction: {Decimal(digits).scaleb(-2).normalize():f}" if option in SHARES else ""


def _number_error(error: typer.BadParameter) -> str:
    """Return the message of an error that is about a number; empty if it is about something else."""
    option = str(getattr(error.param, "name", ""))
    if match := CLICK_ERROR.match(error.message):
        return _parsing_error(match["text"], "float_parsing" if match["kind"] == "float" else "int_parsing", option)
    for of_pydantic in getattr(error.__cause__, "errors", list)():
        value, kind = of_pydantic["input"], of_pydantic["type"]
        if kind in PARSING_ERRORS:
            return _parsing_error(str(value), kind, option)
        if kind in RANGE_ERRORS:
            key, beyond, limit = RANGE_ERRORS[kind]
            return f"{value} is {beyond} than {of_pydantic['ctx'][key]:g}, the {limit} that is allowed"
    return ""


def _parsing_error(text: str, kind: str, option: str) -> str:
    return f"{text!r} is {PARSING_ERRORS[kind]}{number_hint(text, option, is_whole=kind == 'int_parsing')}"
