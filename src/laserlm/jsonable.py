"""Turn results into plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any


def to_json(value: Any) -> Any:
    """Return a value as plain JSON values: dicts with text keys, lists, texts, numbers, booleans and None.

    A dataclass becomes a dict of its fields. A field with the metadata ``{"json": KEY}`` is written under that key. A class
    with a method ``as_dict`` decides for itself, so that it can add derived values. What can be parsed from text
    (interventions, sizes, grids) becomes that text. A number that is not finite becomes None, and so does an interval
    (``low``, ``high``) with such an end.

    Raises:
        TypeError: if a value of another type is in it.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "as_dict"):
        return to_json(value.as_dict())
    if hasattr(value, "parse"):
        return str(value)
    if is_dataclass(value):
        return fields_to_json(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        items = [to_json(item) for item in (value if isinstance(value, Sequence) else sorted(value))]
        return None if getattr(value, "_fields", ()) == ("low", "high") and None in items else items
    raise TypeError(f"a {type(value).__name__} is not a JSON value")


def fields_to_json(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as plain JSON values: what an ``as_dict`` that adds values starts with."""
    return {f.metadata.get("json", f.name): to_json(getattr(value, f.name)) for f in fields(value)}
