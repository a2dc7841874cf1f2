"""Find the folder that a model was loaded from, and the files in it that go with the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from laserlm.models import adapter, gguf

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz")
"""Suffixes of weights, and of the state of a training."""
REPLACED = {"config.json", "README.md", "laser.json", adapter.LOCAL, "model.safetensors.index.json"}
"""Files that a saved model has of its own."""


def source_folder(name: str | Path, revision: str | None = None) -> Path | None:
    """Return the folder of a checkpoint, or of the base model of an adapter.

    It is None for GGUF files and the bundled model, which are converted, and for a checkpoint that is not here. Files of a
    hub id other than its weights are downloaded, if the hub can be reached.
    """
    while not (Path(name) / "config.json").is_file() and (base := adapter.base_of(name)) is not None:
        name, revision = base
    if str(name) == "bundled" or gguf.is_gguf(name):
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, ignore_patterns=[f"*{suffix}" for suffix in WEIGHTS]))
    except (OSError, ValueError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError):
        return None


def side_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the files of a checkpoint that go with its weights, and those that do not.

    The second are weights in other formats, the state of a training, and folders with models of their own. Config, index,
    adapter, card and the folder's weights are in neither list, and the modules of a sentence encoder are in the first.
    """
    modules = _modules(folder)
    others = {file.parent.relative_to(folder).parts[0] for file in folder.glob("*/config.json*")} - modules
    kept: list[str] = []
    left_out: list[str] = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if not file.is_file() or any(part.startswith((".", "__")) for part in name.parts[:-1]) or name.name.startswith("."):
            continue
        top = name.parts[0] if len(name.parts) > 1 else ""
        is_weight = file.suffix in WEIGHTS or name.name.endswith(".index.json")
        if not top and (name.name in REPLACED or file.suffix == ".safetensors" or name.name.startswith("adapter_")):
            continue
        is_left_out = top in others or (is_weight and top not in modules)
        (left_out if is_left_out else kept).append(name.as_posix())
    return kept, left_out


def _modules(folder: Path) -> set[str]:
    """Return the folders of the modules of a sentence encoder (``modules.json``), and of those that a router chooses from."""
    listed = _read(folder / "modules.json", [])
    routed = _read(folder / "router_config.json", {})
    try:
        names = [module["path"] for module in listed if module["path"]] + list(routed.get("types", {}))
        return {Path(name).parts[0] for name in names}
    except (AttributeError, KeyError, TypeError):
        return set()


def _read(file: Path, default: Any) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default
