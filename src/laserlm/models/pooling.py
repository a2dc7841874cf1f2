"""How an embedding model makes one vector of a text, as sentence-transformers saves it next to the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers.utils.hub import cached_file

from laserlm.errors import ModelError

Mode = Literal["mean", "cls", "max", "lasttoken"]
MODES: dict[str, Mode] = {
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean",  # the same direction, and vectors are normalised
    "cls_token": "cls",
    "max_tokens": "max",
    "lasttoken": "lasttoken",
}
"""Modes of sentence-transformers."""


@dataclass(frozen=True)
class Pooling:
    """How the vectors of tokens become the vector of a text.

    Args:
        mode: ``mean`` of all tokens, the first one (``cls``), the largest values (``max``) or the last one (``lasttoken``).
        max_length: largest number of tokens of a text; None takes the model's.
        problem: why laserlm does not compute the vectors of this model; empty if it does.
    """

    mode: Mode = "mean"
    max_length: int | None = None
    problem: str = ""


def read_pooling(source: str | Path, revision: str | None = None) -> Pooling | None:
    """Return the pooling of a sentence-transformers folder or hub id; None for any other checkpoint.

    Raises:
        ModelError: if a file of it cannot be read.
    """
    modules = _read(source, revision, "modules.json")
    listed = [module for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    types = {str(module.get("type")).rpartition(".")[2]: str(module.get("path", "")) for module in listed}
    if "Pooling" not in types:
        return None
    settings = _read(source, revision, f"{types['Pooling']}/config.json") or {}
    limit = (_read(source, revision, "sentence_bert_config.json") or {}).get("max_seq_length")
    own = settings.get("pooling_mode")  # one name, as sentence-transformers 5 writes it
    names = [own] if isinstance(own, str) else [n.removeprefix("pooling_mode_") for n, on in settings.items() if on is True]
    modes = [MODES.get(n, n) for n in names if n in (*MODES, *MODES.values()) or n.startswith("weightedmean")]
    others = sorted(types.keys() - {"Transformer", "Pooling", "Normalize"})
    problem = f"its modules.json has the module {others[0]}" if others else ""
    if not problem and (len(modes) != 1 or modes[0] not in MODES.values()):
        problem = f"its pooling is {' and '.join(modes) or 'not known'}"
    return Pooling(modes[0] if not problem else "mean", limit, problem)  # type: ignore[arg-type]


def _read(source: str | Path, revision: str | None, name: str) -> Any:
    """Return the JSON of a file of a checkpoint; None if it has no such file."""
    options: dict[str, Any] = {
        f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    try:
        file = cached_file(str(source), name, revision=revision, **options)
    except (OSError, ValueError):  # no name of a folder or of a hub's model, which loading it reports
        return None
    try:
        return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {name} of {str(source)!r}: {error}; copy or download it again") from error
