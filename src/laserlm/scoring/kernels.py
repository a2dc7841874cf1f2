"""Choose the fastest CPU kernels that are exact to float32 on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from laserlm.linalg.precision import SETTINGS_LOCK

SHORT_SEQUENCE_TOKENS = 128
"""Longest sequence for which attention by plain matrix products is faster on a CPU than tiled attention."""
MAX_RELATIVE_ERROR = 2e-6
"""Largest relative error, in norm, of a float32 product. A product of bfloat16 operands has 1,000 times this error."""


@contextmanager
def fast_cpu_kernels(device: torch.device, length: int) -> Iterator[None]:
    """Compute with the fastest exact kernels until the end of the context. On a GPU, change nothing.

    PyTorch's default for float32 products can be half as fast as another kernel that it has, for example on AMD processors.
    The other kernel may round its operands. This is measured once, and the kernel is used only if it does not round.

    Args:
        device: device of the model.
        length: tokens of the longest sequence.
    """
    if device.type != "cpu":
        yield
        return
    settings = _products()
    with SETTINGS_LOCK:
        before = settings.fp32_precision
        try:
            if before == "none" and onednn_is_exact():
                settings.fp32_precision = "bf16"
            if length <= SHORT_SEQUENCE_TOKENS:
                with sdpa_kernel(SDPBackend.MATH):
                    yield
            else:
                yield
        finally:
            settings.fp32_precision = before


def _products() -> Any:
    """Return PyTorch's settings of float32 products on a CPU. They have no types: the module adds them when imported."""
    return cast(Any, torch.backends.mkldnn).matmul


@lru_cache(maxsize=1)
def onednn_is_exact() -> bool:
    """Return whether products that may round their operands to bfloat16 are exact on this machine."""
    settings = _products()
    before = settings.fp32_precision
    generator = torch.Generator().manual_seed(0)
    try:
        settings.fp32_precision = "bf16"
        for rows in (1, 16, 512):
            x = torch.randn(rows, 576, generator=generator)
            w = torch.randn(768, 576, generator=generator)
            exact = x.double() @ w.double().T
            if float((torch.nn.functional.linear(x, w) - exact).norm() / exact.norm()) > MAX_RELATIVE_ERROR:
                return False
    finally:
        settings.fp32_precision = before
    return True
