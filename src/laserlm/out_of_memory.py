"""Recognise that memory has run out, whichever library says so, and free some."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from laserlm.errors import LaserError

T = TypeVar("T")
MARKS = (
    "out of memory",  # CUDA, ROCm, XPU, MPS
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuSOLVER, cuDNN
    "can't allocate memory",  # PyTorch's allocator on a CPU
    "not enough memory",  # the same on Windows
)


class OutOfMemoryError(LaserError, torch.OutOfMemoryError):
    """Memory that has run out, as an error of laserlm and of PyTorch."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out. Libraries below PyTorch raise plain RuntimeErrors."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in MARKS)
    )


@contextmanager
def uniform_out_of_memory() -> Iterator[None]:
    """Turn every error that says that memory has run out into ``torch.OutOfMemoryError`` inside a ``with`` block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(str(error) or "out of memory") from None


def retry_with_room(run: Callable[[], T], make_room: Callable[[torch.OutOfMemoryError], None]) -> T:
    """Return the result of ``run``. Where it runs out of memory, call ``make_room`` and run again.

    ``make_room`` frees memory or makes the next run smaller. It raises an error if nothing is left to try.
    """
    while True:
        try:
            with uniform_out_of_memory():
                return run()
        except torch.OutOfMemoryError as error:
            failure = error.with_traceback(None)  # the traceback holds the tensors of the failed run
            failure.__context__ = None  # so does the context of an error that this one replaces
        make_room(failure)
        torch.cuda.empty_cache()
        if torch.backends.mps.is_available():
            torch.mps.empty_cache()


def return_freed_memory() -> None:
    """Return freed memory that the C library keeps for this process to the system (``malloc_trim`` of glibc, else nothing).

    It keeps freed pieces of up to 32 MiB that lie below one in use. After a phase with many of them that is most of the memory
    that the phase took.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
