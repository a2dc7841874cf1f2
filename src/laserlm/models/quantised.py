"""Quantised checkpoints: which are refused, and the way out."""

from __future__ import annotations

from typing import Any

from laserlm.low_rank import METHOD

EDITED = ("fp8", METHOD)
"""Methods whose weights are numbers once they are loaded."""
COPIES = {
    "bitsandbytes": "(NAME).dequantize(torch.bfloat16).save_pretrained(FOLDER, save_original_format=False)",
    "compressed-tensors": "(NAME, quantization_config=CompressedTensorsConfig(dequantize=True)).save_pretrained(FOLDER)",
}
"""How AutoModelForCausalLM.from_pretrained makes a dequantised copy."""


def packing_of(config: Any) -> str:
    """Return the method by which a checkpoint's weights are packed, so that they are no matrices; empty if there is none."""
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method", "") if isinstance(settings, dict) else getattr(settings, "quant_method", "")
    name = str(getattr(method, "value", method))
    return "" if name in EDITED else name or ("an unnamed method" if settings else "")


def way_out(config: Any) -> str:
    """Return what to do with a checkpoint of packed weights; empty if it has none."""
    method = packing_of(config)
    if not method:
        return ""
    copy = f": AutoModelForCausalLM.from_pretrained{COPIES[method]}" if method in COPIES else " with the tool that quantised it"
    return (
        f"The checkpoint is quantised by {method}, and packed weights are not reduced. Reduce the unquantised checkpoint that "
        f"it comes from, and quantise the result. Without that checkpoint, save a dequantised copy{copy}."
    )
