"""Layer-selective rank reduction (LASER, arXiv 2312.13558) for any Hugging Face transformer."""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:
    from laserlm.edit import applied
    from laserlm.errors import LaserError
    from laserlm.export import compress, load_check, reproduce, save
    from laserlm.models import LanguageModel, load
    from laserlm.reductions import Grid, Intervention, Reduction
    from laserlm.scoring.evaluate import Comparison, compare, evaluate
    from laserlm.scoring.records import Evaluation
    from laserlm.searching import Ray, SearchResult, search
    from laserlm.tasks import Example, Split, Task, task

__version__ = _version("laserlm")

__all__ = [
    "Comparison",
    "Evaluation",
    "Example",
    "Grid",
    "Intervention",
    "LanguageModel",
    "LaserError",
    "Ray",
    "Reduction",
    "SearchResult",
    "Split",
    "Task",
    "applied",
    "compare",
    "compress",
    "evaluate",
    "load",
    "load_check",
    "reproduce",
    "save",
    "search",
    "task",
]

_HOMES = {
    "laserlm.edit": ("applied",),
    "laserlm.errors": ("LaserError",),
    "laserlm.export": ("compress", "load_check", "reproduce", "save"),
    "laserlm.models": ("LanguageModel", "load"),
    "laserlm.scoring.evaluate": ("Comparison", "compare", "evaluate"),
    "laserlm.scoring.records": ("Evaluation",),
    "laserlm.searching": ("Ray", "SearchResult", "search"),
    "laserlm.reductions": ("Grid", "Intervention", "Reduction"),
    "laserlm.tasks": ("Example", "Split", "Task", "task"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_RENAMED = {"Found": "SearchResult"}
"""Names of 0.1.0, and those of today."""


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; nobody pays for what they do not use.
    if name in _RENAMED:
        warnings.warn(f"laserlm.{name} is now laserlm.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _HOME_OF:
        raise AttributeError(f"module 'laserlm' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


@when_imported("transformers.quantizers.auto")
def _register_low_rank_layers(_module: Any) -> None:
    # Whoever imports both loads checkpoints with low-rank layers by plain from_pretrained, in whatever order they do.
    importlib.import_module("laserlm.low_rank")


@when_imported("laserlm.models.loading")
def _register_lab_models(_module: Any) -> None:
    # A folder with a model that the lab trained loads as any other.
    importlib.import_module("laserlm.lab.sokoban.model")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
