"""Find weights that are not finite, such as those of a damaged checkpoint, and say what to do about them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_NAMED = 4
"""Number of parameters that an error names."""


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite. Tensors that are not in memory count as finite.

    This takes a small part of the time of ``isfinite().all()``, which writes a mask of every value.
    """
    if tensor.dtype not in FLOATS:
        if "float8" not in str(tensor.dtype):
            return True
        tensor = tensor.float()  # no reduction is defined on eight bits
    if tensor.device.type == "meta" or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())  # NaN is both the least and the greatest


@torch.no_grad()
def not_finite(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return the parameters with values that are not finite: the number of NaNs, of infinite values and of all values."""
    bad = {name: p for name, p in model.named_parameters() if not is_finite(p)}
    return {name: (int(p.isnan().sum()), int(p.isinf().sum()), p.numel()) for name, p in bad.items()}


def describe(counts: Mapping[str, tuple[int, int, int]]) -> str:
    """Return the names and counts of parameters that ``not_finite`` found, as text for an error."""
    items = [
        f"{name} ({', '.join(f'{n:,} {kind}' for n, kind in ((nan, 'NaN'), (inf, 'infinite')) if n)} of {size:,} values)"
        for name, (nan, inf, size) in counts.items()
    ]
    more = f" and {len(items) - MAX_NAMED:,} other tensors" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + more


def overflow(model: nn.Module, dtype: torch.dtype) -> str:
    """Return why outputs of a model are not finite, and what to do, as text for an error.

    Args:
        model: the model as it is now.
        dtype: dtype of its weights.
    """
    if counts := not_finite(model):
        return f"the weights are not finite: {describe(counts)}. Load the model again, or another copy of it."
    name = str(dtype).removeprefix("torch.")
    if not dtype.is_floating_point:
        return f"the weights are finite, but the model in {name} is not. Load it with dtype float32 (--dtype float32)."
    most = torch.finfo(dtype).max
    if dtype in (torch.float32, torch.float64):
        return f"the model overflows {name}, which ends at {most:.3g}. Check its weights, which are finite but too large."
    wider = "float32 or bfloat16" if dtype == torch.float16 else "float32"
    return f"the model overflows {name}, which ends at {most:.3g}. Load it with dtype {wider} (--dtype float32)."
