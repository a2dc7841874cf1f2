"""Float32 products at full precision, whatever precision the caller allows for the sake of speed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch

SETTINGS_LOCK = threading.RLock()
"""The settings belong to the process. The lock keeps threads from restoring each other's settings."""
BACKENDS = ("cuda", "mkldnn")
"""GPUs and CPUs."""
EXACT = ("none", "ieee")
"""Precisions that do not round the operands: PyTorch's default, and full precision set by hand."""


def matmul_settings(backend: str) -> Any:
    """Return PyTorch's settings of matrix products on ``cuda``, or on CPUs, ``mkldnn``. They have no types."""
    return cast(Any, getattr(torch.backends, backend)).matmul


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products without rounding their operands until the end of the context.

    It overrides TF32 on GPUs, bfloat16 on CPUs and autocast. An edit would otherwise depend on these settings, with errors
    of 1e-3 instead of 1e-7, while the cached decompositions have the same keys. The settings are restored at the end.
    """
    with ExitStack() as settings:
        for device in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device):
                settings.enter_context(torch.autocast(device, enabled=False))
        if not _is_exact():  # the lock is held only where something changes, so that other threads can go on
            settings.enter_context(SETTINGS_LOCK)
            settings.enter_context(_highest())
        yield


def allowed_precision() -> list[str]:
    """Return the precision of float32 products that the caller allows on each backend, by PyTorch's names; full is ``ieee``."""
    with SETTINGS_LOCK:  # a pass in another thread may have changed one of them for its time
        settings = [matmul_settings(backend).fp32_precision for backend in BACKENDS]
    return ["ieee" if precision in EXACT else precision for precision in settings]


def _is_exact() -> bool:
    return all(matmul_settings(backend).fp32_precision in EXACT for backend in BACKENDS)


@contextmanager
def _highest() -> Iterator[None]:
    before = [matmul_settings(backend).fp32_precision for backend in BACKENDS]
    try:
        summary = torch.get_float32_matmul_precision()
    except RuntimeError:  # the settings of the backends do not belong together
        summary = "highest"
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(summary)
        for backend, precision in zip(BACKENDS, before, strict=True):
            matmul_settings(backend).fp32_precision = precision
