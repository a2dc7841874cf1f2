"""Model types that a package registers through an entry point."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from laserlm.errors import ModelError
from laserlm.models import load, plugins

MODULE = """
from transformers import AutoConfig, PreTrainedConfig

class ToyConfig(PreTrainedConfig):
    model_type = "laser_toy"
    width: int = 3

AutoConfig.register("laser_toy", ToyConfig)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved config of a type that the module of an entry point registers."""
    (tmp_path / "laser_toy_plugin.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("laser_toy", "laser_toy_plugin", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda **wanted: EntryPoints([point]).select(**wanted))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "laser_toy", "width": 5}), encoding="utf-8")
    return tmp_path


def test_the_module_of_an_unknown_type_is_imported_and_reads_the_config(toy: Path) -> None:
    assert "laser_toy_plugin" not in sys.modules
    try:
        config = plugins.read_config(toy)
        assert (type(config).__name__, config.width) == ("ToyConfig", 5)
        assert "laser_toy_plugin" in sys.modules
    finally:
        sys.modules.pop("laser_toy_plugin", None)
        CONFIG_MAPPING._extra_content.pop("laser_toy", None)


def test_a_type_without_a_module_is_refused_as_transformers_does(toy: Path) -> None:
    (toy / "config.json").write_text(json.dumps({"model_type": "no_such_type"}), encoding="utf-8")
    with pytest.raises(ModelError, match="no_such_type"):
        load(toy)
    assert "laser_toy_plugin" not in sys.modules


def test_the_installed_package_names_the_models_of_its_lab() -> None:
    (point,) = entry_points(group=plugins.GROUP, name="laser_sokoban")
    assert point.load().SokobanConfig.model_type == point.name
