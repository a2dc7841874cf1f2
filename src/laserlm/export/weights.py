"""Write the weights, the config and the tokenizer of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laserlm.edit.factors import StoredMatrix
from laserlm.errors import ExportError
from laserlm.export.load_in_subprocess import REPORTS, compute_in_float32
from laserlm.export.record import FLOAT32_TOLERANCE, recorded_outputs, relative_difference
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

CAST_TOLERANCE = 3e-2
"""Largest difference of outputs, as a share of the largest, where weights of few bits are multiplied out in another dtype."""


def write_model(
    lm: LanguageModel, folder: Path, dtype: torch.dtype, shard_size: str, *, required: bool = False
) -> list[list[float]] | None:
    """Write weights, config and tokenizer. Return some outputs of the written weights, computed in float32.

    Return None if the model takes no tokens, or if transformers does not know the names of its weights.

    Args:
        lm: the reduced model.
        folder: the folder to write to.
        dtype: dtype of the written weights.
        shard_size: maximum size of a file, such as ``5GB``.
        required: whether the unchanged model computes outputs from tokens.

    Raises:
        ExportError: if a weight is not finite in the dtype, or the written model does not compute what the one in memory does.
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
        outputs, buffers = (None, {}) if info["missing_keys"] else _outputs(loaded, required)
        del loaded
        _check_outputs(lm, outputs, buffers, _rounded(lm, dtype), FLOAT32_TOLERANCE)
        return outputs


def write_from_source(
    lm: LanguageModel,
    source: Source,
    folder: Path,
    matrices: Sequence[StoredMatrix],
    cast: torch.dtype | None,
    shard_size: str,
    *,
    required: bool = False,
) -> tuple[list[list[float]] | None, dict[str, Any]]:
    """Write the source's checkpoint with the reduced matrices. Return some outputs, and what the record says of the source.

    Args:
        lm: the reduced model.
        source: the checkpoint of the unchanged model.
        folder: the folder to write to.
        matrices: the reduced matrices.
        cast: dtype in place of the model's; None keeps the dtypes of the source.
        shard_size: maximum size of a file, such as ``5GB``.
        required: whether the unchanged model computes outputs from tokens.

    Raises:
        ExportError: if a weight is not finite in the dtype, the folder lacks something of the source, or the written model does
            not compute what the one in memory does.
    """
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
        if not source.in_parts and not source.packed.keys() - {*written.changed, *written.added}:
            del config["quantization_config"]  # nothing is packed any more, and transformers fails where it finds nothing
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
        outputs, buffers = _outputs(loaded, required)
    del loaded
    stored = {source.parameters[name]: source.stored[name].float_dtype for name in written.changed}
    rounded = {name: dtype for name, dtype in stored.items() if dtype is not None and name in model.state_dict()}
    # Codes and scales are multiplied out in the dtype of the config, which a cast changes.
    tolerance = FLOAT32_TOLERANCE if cast is None or not source.packed else CAST_TOLERANCE
    _check_outputs(lm, outputs, buffers, rounded if cast is None else _rounded(lm, cast), tolerance)
    report = {name: sorted(map(str, info[name])) for name in REPORTS}
    return outputs, {"source": written.as_dict(), "loading_report": report}


def _outputs(model: Any, required: bool) -> tuple[list[list[float]] | None, dict[str, Tensor]]:
    """Return some outputs of a model, computed in float32, and its buffers that no file holds."""
    undo = compute_in_float32(model)
    with full_precision():
        outputs = recorded_outputs(model.eval(), required=required)
    undo()
    stored = model.state_dict().keys()
    return outputs, {name: buffer for name, buffer in model.named_buffers() if name not in stored}


def _rounded(lm: LanguageModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype of the tensors that are cast, by name."""
    return {name: dtype for name, tensor in lm.model.state_dict().items() if tensor.dtype == lm.model.dtype}


def _check_outputs(
    lm: LanguageModel,
    outputs: list[list[float]] | None,
    buffers: Mapping[str, Tensor],
    rounded: Mapping[str, torch.dtype],
    tolerance: float,
) -> None:
    """Raise an ExportError unless the reduced model in memory computes what the written one does.

    Args:
        lm: the reduced model.
        outputs: outputs of the written model; None if it takes no tokens.
        buffers: buffers of the written model that no file holds. They are computed on loading, in a dtype of their own.
        rounded: dtypes that tensors of the model were cast to, by name.
        tolerance: largest difference, as a share of the largest output.
    """
    if outputs is None:
        return
    mine = {name: buffer for name, buffer in lm.model.named_buffers() if name in buffers}
    before = {name: buffer.data for name, buffer in mine.items()}
    undo = compute_in_float32(lm.model, rounded)
    try:
        for name, buffer in mine.items():
            buffer.data = buffers[name].to(buffer.device)
        with full_precision():
            expected = recorded_outputs(lm.model, required=True)
    finally:
        undo()
        for name, buffer in mine.items():
            buffer.data = before[name]
    difference = relative_difference(*(torch.tensor(values).nan_to_num() for values in (outputs, expected)))
    if difference > tolerance:
        raise ExportError(
            f"{lm.name} cannot be saved as it is: what was written gives other outputs than the reduced model in memory (the "
            f"largest difference is {difference:.2%} of the largest output, allowed are {tolerance:.2%}); report this"
        )


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
