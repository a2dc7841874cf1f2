"""The quickest way of computing a forward pass on this machine that is still exact to float32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["fast_cpu_kernels", "onednn_is_exact"]

SHORT = 128
"""Tokens up to which attention by plain matrix products is quicker on a CPU than its tiled form."""
TURNS = threading.RLock()
"""The settings are the whole process's: threads that would each put back what they found take turns."""
EXACT = 2e-6
"""Relative error of a float32 product in norm; one of bfloat16 operands has a thousand times as much."""


@contextmanager
def fast_cpu_kernels(device: torch.device, length: int) -> Iterator[None]:
    """Compute with the quickest exact kernels until the end of the context; a GPU's are left as they are.

    On a CPU, PyTorch's own choice for float32 products can be half as fast as another that it holds (on AMD processors,
    for one). That one may also round its operands, which is measured once, and it is taken only where it does not.

    Args:
        device: where the model is.
        length: tokens of the longest sequence.
    """
    if device.type != "cpu":
        yield
        return
    settings = _products()
    with TURNS:
        before = settings.fp32_precision
        try:
            if before == "none" and onednn_is_exact():
                settings.fp32_precision = "bf16"
            if length <= SHORT:
                with sdpa_kernel(SDPBackend.MATH):
                    yield
            else:
                yield
        finally:
            settings.fp32_precision = before


def _products() -> Any:
    """Return PyTorch's settings of float32 products on a CPU (typed loosely: the module adds them as it is imported)."""
    return cast(Any, torch.backends.mkldnn).matmul


@lru_cache(maxsize=1)
def onednn_is_exact() -> bool:
    """Find out whether the products that may round their operands to bfloat16 do so here."""
    settings = _products()
    before = settings.fp32_precision
    generator = torch.Generator().manual_seed(0)
    try:
        settings.fp32_precision = "bf16"
        for rows in (1, 16, 512):
            x = torch.randn(rows, 576, generator=generator)
            w = torch.randn(768, 576, generator=generator)
            exact = x.double() @ w.double().T
            if float((torch.nn.functional.linear(x, w) - exact).norm() / exact.norm()) > EXACT:
                return False
    finally:
        settings.fp32_precision = before
    return True
