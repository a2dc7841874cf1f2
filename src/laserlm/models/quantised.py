"""Quantised checkpoints: which are loaded as floats and edited, which are refused, and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from laserlm.low_rank import METHOD

SKIPPED = {
    "fp8": "modules_to_not_convert",
    "bitsandbytes": "llm_int8_skip_modules",
    "compressed-tensors": "ignore",
    "torchao": "modules_to_not_convert",
}
"""Methods whose weights are loaded as floats, and the setting of each that lists the modules which it leaves in floats."""
MULTIPLIED_OUT = ("fp8", "compressed-tensors")
"""Methods whose weights transformers turns into floats while it loads them."""
PACKAGES = ("bitsandbytes", "compressed-tensors", "torchao")
"""Methods that need the package of their name."""
COPIES = {
    "mxfp4": "(NAME).save_pretrained(FOLDER, save_original_format=False)",
}
"""How AutoModelForCausalLM.from_pretrained makes a dequantised copy."""


def method_of(config: Any) -> str:
    """Return the method by which a checkpoint's weights are stored in few bits, or as factors; empty if there is none."""
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method", "") if isinstance(settings, dict) else getattr(settings, "quant_method", "")
    return str(getattr(method, "value", method)) or ("an unnamed method" if settings else "")


def way_out(config: Any) -> str:
    """Return what to do with a checkpoint whose packed weights are not reduced; empty if it has none."""
    method = method_of(config)
    if not method or method in (*SKIPPED, METHOD):
        return ""
    copy = f": AutoModelForCausalLM.from_pretrained{COPIES[method]}" if method in COPIES else " with the tool that quantised it"
    return (
        f"The checkpoint is quantised by {method}, and packed weights are not reduced. Reduce the unquantised checkpoint that "
        f"it comes from, and quantise the result. Without that checkpoint, save a dequantised copy{copy}."
    )


def step_of(config: Any) -> str:
    """Return what to do if a quantised checkpoint does not load; empty if it is not quantised."""
    method = method_of(config)
    if method in PACKAGES:
        return f"The checkpoint is quantised by {method}, whose package turns its weights into floats: pip install {method}"
    return way_out(config)


def dequantise(config: Any) -> bool:
    """Let transformers turn weights of few bits into floats while it loads them. Return whether it does for this config."""
    if method_of(config) not in MULTIPLIED_OUT:
        return False
    settings = config.quantization_config
    if isinstance(settings, dict):
        settings["dequantize"] = True
    else:
        settings.dequantize = True
    return True


def with_floats(model: Any, config: Any) -> Any:
    """Return a loaded model whose weights are floats, if its checkpoint is quantised by a method that allows it.

    Args:
        model: the model, as transformers has loaded it.
        config: the config that it was loaded with.
    """
    method = method_of(config)
    if method == "bitsandbytes":
        model = _without_bitsandbytes(model)
    if method == "torchao":
        for module in model.modules():
            weight: Any = module._parameters.get("weight")
            is_packed = is_traceable_wrapper_subclass(weight)
            if is_packed:
                module.weight = nn.Parameter(weight.dequantize().to(model.dtype), requires_grad=False)
        model.hf_quantizer.remove_quantization_config(model)
    if method in SKIPPED:
        model._weight_conversions = None  # they would save the floats as codes and scales
    return model


def _without_bitsandbytes(model: Any) -> Any:
    """Return a model with each layer of bitsandbytes as the layer that it was: linear, or a Conv1D, as in GPT-2."""
    packed = {path: m for path, m in model.named_modules() if type(m).__module__.partition(".")[0] == "bitsandbytes"}
    if not packed:  # all layers are stored as floats, and transformers fails where it finds nothing to do
        return model
    model = model.dequantize()  # all layers become linear
    for path in [path for path, old in packed.items() if issubclass(getattr(old, "source_cls", nn.Linear), Conv1D)]:
        linear = model.get_submodule(path)
        with torch.device("meta"):
            conv = Conv1D(linear.out_features, linear.in_features)
        conv.weight, conv.bias = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False), linear.bias
        model.set_submodule(path, conv.train(linear.training))
    return model


def leave_in_floats(settings: dict[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """Return the settings of a quantisation that leaves these modules in floats too."""
    name = SKIPPED[str(settings["quant_method"])]
    return settings | {name: list(dict.fromkeys([*(settings.get(name) or []), *modules]))}


def companions(key: str, names: Iterable[str]) -> list[str]:
    """Return those of some tensors that hold a packed weight together: its codes, scales and shape.

    Args:
        key: the name that the weight has, or would have as floats, such as ``0.q_proj.weight``.
        names: names of tensors.
    """
    module, _, last = key.rpartition(".")
    start = f"{module}." if last == "weight" else f"{key}_"
    return [name for name in names if name == key or (name.startswith(start) and not name.endswith("bias"))]


def candidates(name: str) -> list[str]:
    """Return the names of the weights that a stored tensor may belong to, the likeliest first."""
    parts = name.split(".")
    return [name, *(f"{'.'.join(parts[:i])}.weight" for i in range(len(parts) - 1, 0, -1))]


def packed_weights(packed: Iterable[str], stored: Mapping[str, Any], known: Iterable[str]) -> dict[str, list[str]]:
    """Return the tensors of each packed weight, by the name that it has, or would have as floats.

    Args:
        packed: names of stored tensors that are no floats.
        stored: all stored tensors.
        known: names of weights that the model has.
    """
    weights = set(known)
    keys = dict.fromkeys(next((c for c in candidates(name) if c in weights), "") for name in packed)
    return {key: companions(key, stored) for key in keys if key}
