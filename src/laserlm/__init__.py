"""Layer-selective rank reduction (LASER, arXiv 2312.13558) for any Hugging Face transformer."""

from __future__ import annotations

from laserlm import interrupt as _interrupt

if _interrupt.is_command():  # before anything that takes long to import
    _interrupt.install()

import importlib
import warnings
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:  # for type checkers: the same names as in the table below
    from laserlm.edit import applied as applied
    from laserlm.errors import LaserError as LaserError
    from laserlm.export import compress as compress
    from laserlm.export import load_check as load_check
    from laserlm.export import reproduce as reproduce
    from laserlm.export import save as save
    from laserlm.models import LanguageModel as LanguageModel
    from laserlm.models import load as load
    from laserlm.reductions import Grid as Grid
    from laserlm.reductions import Intervention as Intervention
    from laserlm.reductions import Reduction as Reduction
    from laserlm.scoring.evaluate import Comparison as Comparison
    from laserlm.scoring.evaluate import compare as compare
    from laserlm.scoring.evaluate import evaluate as evaluate
    from laserlm.scoring.records import Evaluation as Evaluation
    from laserlm.searching import Ray as Ray
    from laserlm.searching import SearchResult as SearchResult
    from laserlm.searching import search as search
    from laserlm.tasks import Example as Example
    from laserlm.tasks import Split as Split
    from laserlm.tasks import Task as Task
    from laserlm.tasks import task as task

__version__ = _version("laserlm")

_MODULES = {
    "Comparison": "laserlm.scoring.evaluate",
    "Evaluation": "laserlm.scoring.records",
    "Example": "laserlm.tasks",
    "Grid": "laserlm.reductions",
    "Intervention": "laserlm.reductions",
    "LanguageModel": "laserlm.models",
    "LaserError": "laserlm.errors",
    "Ray": "laserlm.searching",
    "Reduction": "laserlm.reductions",
    "SearchResult": "laserlm.searching",
    "Split": "laserlm.tasks",
    "Task": "laserlm.tasks",
    "applied": "laserlm.edit",
    "compare": "laserlm.scoring.evaluate",
    "compress": "laserlm.export",
    "evaluate": "laserlm.scoring.evaluate",
    "load": "laserlm.models",
    "load_check": "laserlm.export",
    "reproduce": "laserlm.export",
    "save": "laserlm.export",
    "search": "laserlm.searching",
    "task": "laserlm.tasks",
}
"""Modules of the public names. A module is imported when its name is first used, because torch takes seconds to import."""
_RENAMED = {"Found": "SearchResult"}
"""Names of version 0.1.0 and their present names."""

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warnings.warn(f"laserlm.{name} is now laserlm.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _MODULES:
        raise AttributeError(f"module 'laserlm' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


@when_imported("transformers.quantizers.auto")
def _register_low_rank_layers(_module: Any) -> None:
    # Plain from_pretrained then loads checkpoints with low-rank layers, in whatever order the two are imported.
    importlib.import_module("laserlm.low_rank")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
