"""Compare a saved model with the checkpoint that it was made from: all that no reduction touched must be the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laserlm.models.quantised import SKIPPED
from laserlm.models.source import side_files
from laserlm.models.weight_files import read_tensor, stored_tensors

CHANGED_SETTINGS = {"dtype", "torch_dtype", "quantization_config"}
"""Settings of a config that may differ from the source's: they describe how the weights are stored."""
NAMES_IN_4 = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes of tokenizers in transformers 5, and those of transformers 4 that read the same files."""


def differences(source: Path, folder: Path, written: Mapping[str, Any], *, config_file: str = "config.json") -> list[str]:
    """Return one line for each thing that a saved model lacks or has otherwise than its source, without what was meant.

    Args:
        source: folder of the checkpoint that was reduced.
        folder: folder of the saved model.
        written: names of the tensors that the reduction changed, dropped and added, and the dtype that others were cast to.
        config_file: name of the saved model's config.

    Raises:
        ModelError: if a weight file of either folder is damaged or missing.
    """
    return [
        *_other_tensors(source, folder, written),
        *_other_settings(_json(source / "config.json"), _json(folder / config_file)),
        *_other_quantisation(source, folder, written, _json(folder / config_file).get("quantization_config")),
        *_other_files(source, folder),
    ]


def tokenizer_config_for_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's config with what transformers 4 cannot read under the names that both versions know."""
    adapted = dict(config)
    if adapted.get("tokenizer_class") in NAMES_IN_4:
        adapted["tokenizer_class"] = NAMES_IN_4[adapted["tokenizer_class"]]
    if isinstance(adapted.get("extra_special_tokens"), list):
        adapted["additional_special_tokens"] = adapted.pop("extra_special_tokens")
    return adapted


def _other_tensors(source: Path, folder: Path, written: Mapping[str, Any]) -> list[str]:
    theirs, ours = stored_tensors(source), stored_tensors(folder)
    changed, cast = set(written["changed"]), written["dtype"]
    expected = (theirs.keys() - set(written["dropped"])) | set(written["added"])
    lines = [f"the tensor {name} is missing" for name in sorted(expected - ours.keys())]
    lines += [f"the tensor {name} is not in the source" for name in sorted(ours.keys() - expected)]
    for name in sorted(theirs.keys() & ours.keys() - changed):
        a, b = theirs[name], ours[name]
        if a.shape != b.shape:
            lines.append(f"the tensor {name} is {b.shape}, in the source {a.shape}")
        elif a.dtype != b.dtype and (cast is None or a.float_dtype is None or b.float_dtype is None):
            lines.append(f"the tensor {name} is {b.dtype}, in the source {a.dtype}")
        elif not _same_bits(read_tensor(a.file, name), read_tensor(b.file, name)):
            lines.append(f"the tensor {name} has other values than in the source")
    return lines


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, bit by bit, once the first is in the dtype of the second."""
    a, b = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (a.to(b.dtype), b))
    return torch.equal(a, b)


def _other_settings(source: Any, saved: Any, path: str = "") -> list[str]:
    """Return a line for each setting of the source's config that is missing or another; settings may be added."""
    if not isinstance(source, dict) or not isinstance(saved, dict):
        return [] if source == saved else [f"{path} of the config is {saved!r}, in the source {source!r}"]
    lines = []
    for name, value in source.items():
        where = f"{path}.{name}" if path else name
        if name in CHANGED_SETTINGS:
            continue
        lines += _other_settings(value, saved[name], where) if name in saved else [f"{where} of the config is missing"]
    return lines


def _other_quantisation(source: Path, folder: Path, written: Mapping[str, Any], saved: dict[str, Any] | None) -> list[str]:
    """Return a line for each layer that is stored as floats and read as packed, and for each setting that is another."""
    before = _json(source / "config.json").get("quantization_config") or {}
    method = before.get("quant_method")
    if method not in SKIPPED:
        return []
    theirs, ours = stored_tensors(source), stored_tensors(folder)
    if saved is None:
        packed = sorted(name for name, tensor in ours.items() if tensor.float_dtype is None and len(tensor.shape) > 1)
        return [f"quantization_config of the config is missing, and {packed[0]} is packed"] if packed else []
    skipped = saved.get(SKIPPED[method]) or []
    unpacked = [n for n in (*written["changed"], *written["added"]) if n not in theirs or theirs[n].float_dtype is None]
    lines = [
        f"{name} is stored as floats, and the config says that it is packed" for name in unpacked if not _names(skipped, name)
    ]
    others = before.keys() - {SKIPPED[method]}
    lines += [f"{name} of quantization_config is another" for name in sorted(others) if saved.get(name) != before[name]]
    lost = set(before.get(SKIPPED[method]) or []) - set(skipped)
    return lines + [f"{name} is not in floats any more in quantization_config" for name in sorted(lost)]


def _names(modules: Iterable[str], tensor: str) -> bool:
    """Return whether one of some modules holds a stored tensor, whose name may begin otherwise than in the model."""
    module = tensor.rpartition(".")[0]
    end = re.split(r"\D\.(?=\d+\.)", f".{module}", maxsplit=1)[-1]  # from the number of the block on
    return any(f".{name}".endswith(f".{end.removeprefix('.')}") for name in modules)


def _other_files(source: Path, folder: Path) -> list[str]:
    lines = []
    for name in side_files(source)[0]:
        theirs, ours = source / name, folder / name
        if not ours.is_file():
            lines.append(f"the file {name} is missing")
        elif name == "tokenizer_config.json":
            if _json(ours) != tokenizer_config_for_transformers_4(_json(theirs)):
                lines.append(f"the file {name} is another")
        elif theirs.read_bytes() != ours.read_bytes():
            lines.append(f"the file {name} is another")
    return lines


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
