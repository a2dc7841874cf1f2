"""What cells of a user's table hold: numbers as texts, lists of texts, and missing values."""

from __future__ import annotations

import ast
import datetime
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from io import StringIO
from itertools import pairwise
from tokenize import NL, STRING, TokenError, generate_tokens
from typing import Any

from laserlm.errors import TaskError
from laserlm.tasks.files import field

MISSING = re.compile(r"nan|none|null|n/a|#(n/a|ref!|value!|div/0!|name\?|null!|num!)", re.IGNORECASE)
"""What programs write for a missing value, and a model could answer."""


def unless_nan(value: Any) -> Any:
    """Return a value, or None for the NaN that pandas writes for a missing one, and for an infinite number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number_as_text(value: Any) -> Any:
    """Return a number as text, and any other value as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def check_text(value: Any, name: str, origin: str) -> None:
    """Raise a TaskError for a truth value or a date, which several texts could mean, and for a number that is none."""
    if isinstance(value, bool | datetime.date | datetime.time) or (isinstance(value, float) and unless_nan(value) is None):
        raise TaskError(
            f"{origin}: the field '{name}' must be text that is not empty, got {value!r:.60}. Write the text that is meant, "
            "such as 'yes' or '1 March 2024'."
        )


def list_of(text: str) -> Any:
    """Return the list that a cell of a table writes: JSON, Python, an array of NumPy, or texts with a separator."""
    if (value := literal_of(text)) is not None:
        return value
    separator = next((s for s in ("|", "\n", ";") if s in text), None)
    return text if separator is None else [part.strip() for part in text.split(separator)]


def literal_of(text: str) -> list[Any] | dict[str, Any] | None:
    """Return the list or dictionary that a text writes as JSON, as Python or as an array of NumPy; None for another text."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text if read is json.loads else _with_commas(text))
        except (ValueError, SyntaxError, MemoryError, RecursionError, TokenError):
            continue
        if isinstance(value, list | dict):
            return value
    return None


def _with_commas(text: str) -> str:
    """Return a list of Python with commas between texts: an array of NumPy has none, and Python would join its texts."""
    tokens = [t for t in generate_tokens(StringIO(text.strip()).readline) if t.type != NL]  # NumPy breaks long lines
    return "".join(f"{a.string}," if a.type == b.type == STRING else f"{a.string} " for a, b in pairwise(tokens))


def popularity_of(value: Any, origin: str) -> float | None:
    """Return a popularity as a number.

    Raises:
        TaskError: if it is none.
    """
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value) if math.isfinite(float(value)) else value
    if value is not None and not (type(value) in (int, float) and math.isfinite(value)):
        raise TaskError(f"{origin}: the field 'popularity' must be a finite number, got {value!r:.60}")
    return None if value is None else float(value)


def texts_of(values: Mapping[str, Any], name: str, origin: str, *, different: bool = False) -> tuple[str, ...]:
    """Return the list of texts that a field holds; an empty tuple without the field.

    Raises:
        TaskError: if it holds something else.
    """
    if isinstance(values.get(name), str) and name == "aliases":
        values = {name: list_of(values[name])}
        values = values if isinstance(values[name], list) else {name: [values[name]]}
    texts = tuple(field(values, name, list, origin)) if name in values else ()
    if not all(isinstance(t, str) and t.strip() for t in texts) or (different and len(set(texts)) != len(texts)):
        raise TaskError(f"{origin}: the field '{name}' must be a list of {'different ' * different}texts, got {texts!r:.80}")
    return texts
