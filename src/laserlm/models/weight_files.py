"""Find tensors in the safetensors files of a folder, from the headers of the files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import PreTrainedModel

from laserlm.errors import ModelError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes whose values are the weights, by their names in safetensors."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, as the file's header describes it.

    Args:
        file: the file.
        dtype: its name in safetensors, such as ``BF16``.
        shape: the shape.
        bytes: size in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def float_dtype(self) -> torch.dtype | None:
        """The dtype, or None for integers and for eight-bit floats, whose values are weights only with their scales."""
        return FLOATS.get(self.dtype)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor in the safetensors files of a folder, by name; empty if it has none.

    Raises:
        ModelError: as ``tensor_files``.
    """
    files = tensor_files(folder)
    headers = {file: _header(file) for file in set(files.values())}
    stored = {}
    for name, file in files.items():
        entry = headers[file][name]
        start, end = entry["data_offsets"]
        stored[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), end - start)
    return stored


def stored_metadata(folder: Path) -> dict[str, str]:
    """Return what the headers of the safetensors files of a folder say beside their tensors.

    Raises:
        ModelError: as ``tensor_files``.
    """
    metadata: dict[str, str] = {}
    for file in sorted(set(tensor_files(folder).values())):
        metadata |= _header(file).get("__metadata__") or {}
    return metadata


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return header


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor, by the tensor's name; empty if the folder has no safetensors.

    Raises:
        ModelError: if a file is damaged, or the index names a file that does not exist.
    """
    index = folder / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read ({error}); copy or download it again") from error
    files: dict[str, Path] = {}
    for file in sorted(map(folder.joinpath, shards)) or _single_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is damaged or was cut short ({error}); copy or download it again") from error
    return files


def _single_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder without an index. transformers reads one name alone, if it is there."""
    file = folder / "model.safetensors"
    others = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("adapter_"))
    return [file] if file.is_file() else others


def read_tensor(file: Path, name: str) -> Tensor:
    """Return a tensor of a safetensors file.

    Raises:
        ModelError: if the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read ({error}); copy or download it again") from error
    return tensor


def parameter_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return what transformers makes of stored tensors: by stored name, the name in the model, and whether it is converted.

    A converted tensor is put together from several stored tensors, or is a part of one. Tensors that the model does not read
    are left out.
    """
    conversions: Any = getattr(model, "_weight_conversions", None)
    conversions = deepcopy(get_model_conversion_mapping(model) if conversions is None else conversions)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    read_as = {}
    for name in sorted(names, key=dot_natural_key):  # the order in which transformers renames them
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if renamed in state:
            read_as[name] = renamed, pattern is not None
    return read_as
