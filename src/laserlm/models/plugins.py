"""Read a checkpoint's config; packages add model types through the entry points ``laserlm.models``.

An entry point's name is a ``model_type``. Its module registers the type with transformers when it is imported. This happens
only for a checkpoint of that type.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

GROUP = "laserlm.models"


def read_config(source: str | Path, **options: Any) -> Any:
    """Return a checkpoint's config; import the module of its model type first if transformers does not know the type."""
    try:
        return AutoConfig.from_pretrained(source, **options)
    except ValueError:
        settings, _ = PreTrainedConfig.get_config_dict(source, **options)
        plugins = entry_points(group=GROUP, name=str(settings.get("model_type")))
        if not plugins:
            raise
    for plugin in plugins:
        importlib.import_module(plugin.module)
    return AutoConfig.from_pretrained(source, **options)
