"""A quick hash of a tensor, computed on its device, that tells whether its values have changed."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by bytes of a value."""
CACHE_BYTES = 2**20
"""Bytes that a CPU works on at a time, so that what lies between two steps stays in its cache."""


@torch.no_grad()
def quick_hash(tensor: Tensor) -> str:
    """Return a hash of a tensor's shape and dtype and of sums of its values' bits along rows and columns.

    Sums of integers do not depend on their order or on the device. Only the sums leave the device. Two tensors with the
    same hash can be constructed on purpose, so use it within a process, and the sha256 of all bytes for what is stored.

    Args:
        tensor: of any shape; more than two axes count as rows of the last one.
    """
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor.detach()
    integers = INTEGERS[values.element_size()]
    bits = values.view(integers)
    if bits.ndim > 1:
        rows = bits.flatten(0, -2)  # (m, n)
        at_once = len(rows) if rows.device.type != "cpu" else max(1, CACHE_BYTES // max(1, rows.shape[1] * rows.element_size()))
        sums = [_sums(part) for part in rows.split(at_once)]
        columns = torch.stack([of_columns for of_columns, _ in sums]).sum(0, dtype=integers)
        # The first row and column show an equal change of all values of a matrix whose values are equal.
        bits = torch.cat([columns, *(of_rows for _, of_rows in sums), rows[:1].flatten(), rows[:, :1].flatten()])
    digest.update(bits.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums of the integers (m, n) along columns and rows, (n,) and (m,), in their own width.

    Sums wrap around at that width, where equal changes of many values (a sign, an exponent) could cancel. Mixing the upper
    half of the bits into the lower one makes a change depend on the value.
    """
    mixed = (rows >> 4 * rows.element_size()).bitwise_xor_(rows)
    return mixed.sum(0, dtype=rows.dtype), mixed.sum(1, dtype=rows.dtype)
