"""Write the weights, the config and the tokenizer of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laserlm.edit.factors import StoredMatrix
from laserlm.errors import ExportError
from laserlm.export.load_in_subprocess import REPORTS, compute_in_float32
from laserlm.export.record import recorded_outputs
from laserlm.export.source import Source
from laserlm.export.source_check import differences
from laserlm.export.transformers_4 import adapt_tokenizer, config_for_transformers_4
from laserlm.linalg.precision import full_precision
from laserlm.low_rank import LowRankConfig, LowRankLinear
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading_errors import silence_transformers
from laserlm.models.quantised import dequantise, leave_in_floats, with_floats

HIDDEN_CONFIG = "config.json.part"
"""Name of the config until the folder is complete. Without a config.json, the folder of a killed save does not load."""


def write_model(lm: LanguageModel, folder: Path, dtype: torch.dtype, shard_size: str) -> list[list[float]] | None:
    """Write weights, config and tokenizer. Return some outputs of the written weights, computed in float32.

    Return None if the model takes no tokens, or if transformers does not know the names of its weights.
    """
    model = lm.model
    state = _cast(model.state_dict(), model.dtype, dtype)
    _check_finite(lm, state, dtype)
    layers = {path: module.as_dict() for path, module in model.named_modules() if isinstance(module, LowRankLinear)}
    with silence_transformers(), _config_with_layers(model.config, layers):
        _write_weights(lm, dict(state), folder, dtype, shard_size)
        _write_tokenizer(lm, folder)
        # As ``load_check`` does, except that the weights are those in memory, not those on the disk.
        config = type(model.config).from_json_file(folder / HIDDEN_CONFIG)
        loader: Any = type(model)
        loaded, info = loader.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
        compute_in_float32(loaded)
        with full_precision():
            return None if info["missing_keys"] else recorded_outputs(loaded.eval())


def write_from_source(
    lm: LanguageModel,
    source: Source,
    folder: Path,
    matrices: Sequence[StoredMatrix],
    cast: torch.dtype | None,
    shard_size: str,
) -> tuple[list[list[float]] | None, dict[str, Any]]:
    """Write the source's checkpoint with the reduced matrices. Return some outputs, and what the record says of the source."""
    model = lm.model
    _check_finite(lm, _cast(model.state_dict(), model.dtype, cast or model.dtype), cast or model.dtype)
    source.copy_files(folder)
    written = source.write_weights(lm, folder, [m.path for m in matrices], cast, shard_size)
    adapt_tokenizer(folder)
    config = source.read_config()
    if cast is not None:
        config = _with_dtype(config, {dtype_name(lm.dtype), dtype_name(source.dtype)}, dtype_name(cast))
    layers = {path: module.as_dict() for path, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if layers:
        config["quantization_config"] = LowRankConfig(layers).to_dict()
    elif source.packed.keys() & {*written.changed, *written.added}:
        floats = source.modules_in_floats(lm, {*written.changed, *written.added})
        config["quantization_config"] = leave_in_floats(config["quantization_config"], floats)
    file = folder / HIDDEN_CONFIG
    file.write_text(json.dumps(config_for_transformers_4(config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for weights in folder.glob("*.safetensors"):
        weights.chmod(file.stat().st_mode)  # safetensors makes them unreadable for other users
    lost = differences(source.folder, folder, written.as_dict(), config_file=HIDDEN_CONFIG)
    if lost:
        raise ExportError(f"{lm.name} cannot be saved as it is: {lost[0]} (and {len(lost) - 1} more); report this")
    loader: Any = type(model)
    with silence_transformers():
        loaded_config = type(model.config).from_json_file(file)
        dequantise(loaded_config)
        loaded, info = loader.from_pretrained(
            folder, config=loaded_config, dtype="auto", output_loading_info=True, use_safetensors=True
        )
        loaded = with_floats(loaded, loaded_config)
        compute_in_float32(loaded)
        with full_precision():
            outputs = recorded_outputs(loaded.eval())
    report = {name: sorted(map(str, info[name])) for name in REPORTS}
    return outputs, {"source": written.as_dict(), "loading_report": report}


def _write_weights(lm: LanguageModel, state: dict[str, Tensor], folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    lm.model.save_pretrained(folder, state_dict=state, max_shard_size=shard_size)
    file = (folder / "config.json").rename(folder / HIDDEN_CONFIG)
    config = json.loads(file.read_text(encoding="utf-8"))
    if dtype != lm.dtype:
        config = _with_dtype(config, {dtype_name(lm.dtype)}, dtype_name(dtype))
    file.write_text(json.dumps(config_for_transformers_4(config), indent=2) + "\n", encoding="utf-8")
    for weights in folder.glob("*.safetensors"):
        weights.chmod(file.stat().st_mode)  # safetensors makes them unreadable for other users


def _check_finite(lm: LanguageModel, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise an ExportError if a parameter is not finite in the saved dtype."""
    ids = {m.path: m.id for m in lm.matrices if m.part_of is None}
    for name, parameter in lm.model.named_parameters():
        if bool(state[name].isfinite().all()):
            continue
        matrix = ids.get(name) or ids.get(f"{name.rpartition('.')[0]}.weight")
        where = f"{name} ({matrix})" if matrix else name
        if bool(parameter.isfinite().all()):
            raise ExportError(
                f"{where} holds values up to {float(parameter.detach().abs().max()):.3g}, and {dtype_name(dtype)} ends at "
                f"{torch.finfo(dtype).max:.3g}; save it in bfloat16 or float32 (--save-dtype)"
            )
        raise ExportError(
            f"{where} holds {int((~parameter.isfinite()).sum()):,} values that are not finite; load the base model again, "
            "or in bfloat16 or float32"
        )


def _write_tokenizer(lm: LanguageModel, folder: Path) -> None:
    if lm.tokenizer is None:
        return
    lm.tokenizer.save_pretrained(folder)
    adapt_tokenizer(folder)


@contextmanager
def _config_with_layers(config: Any, layers: dict[str, Any]) -> Iterator[None]:
    """List the low-rank layers in the config inside a ``with`` block."""
    if not layers:
        yield
        return
    config.quantization_config = LowRankConfig(layers)
    try:
        yield
    finally:
        del config.quantization_config


def _cast(state: dict[str, Tensor], old: torch.dtype, new: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of dtype ``old`` in dtype ``new`` on the CPU, and the others unchanged.

    Tied tensors stay tied, because safetensors stores them once.
    """
    cast: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride())
        if key not in cast:
            cast[key] = tensor.to("cpu", new) if tensor.dtype == old and tensor.device.type != "meta" else tensor
        result[name] = cast[key]
    return result


def _with_dtype(config: Any, old: set[str], new: str) -> Any:
    """Return a config, and its nested configs, with dtype ``new`` in place of those in ``old``."""
    if not isinstance(config, dict):
        return config
    return {k: new if k in ("dtype", "torch_dtype") and v in old else _with_dtype(v, old, new) for k, v in config.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``float16``."""
    return str(dtype).removeprefix("torch.")
