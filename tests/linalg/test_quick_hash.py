"""Equal tensors have one quick hash, and any change gives another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laserlm.linalg.quick_hash import quick_hash

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.complex64]


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10
    return drawn.abs().to(dtype) if not dtype.is_floating_point and not dtype.is_complex else drawn.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (6, 4), (3, 6, 4)], ids=str)
def test_every_changed_value_changes_the_hash(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = values(dtype, *shape)
    expected = quick_hash(tensor)
    assert quick_hash(tensor.clone()) == expected
    for i in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[i] += 1
        assert quick_hash(changed) != expected


def test_a_bit_of_one_value_is_enough() -> None:
    weight = values(torch.float32, 200, 300)
    expected = quick_hash(weight)
    for bit in (0, 22, 31):  # the last of the mantissa, the first of it, and the sign
        changed = weight.clone()
        changed.view(torch.int32)[17, 4] ^= 1 << bit if bit < 31 else -(2**31)
        assert quick_hash(changed) != expected


@pytest.mark.parametrize("kind", ["drawn", "of bfloat16", "equal"])
@pytest.mark.parametrize("factor", [-1, 2, 0.5, 4, -8, 3])
def test_a_change_of_all_values_alike_does_not_cancel_in_the_sums(factor: float, kind: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        weight = values(dtype, 512, 1024)
        weight = {"drawn": weight, "of bfloat16": weight.bfloat16().to(dtype), "equal": torch.ones_like(weight)}[kind]
        assert quick_hash(weight * factor) != quick_hash(weight)
        assert quick_hash(torch.cat([weight[:256] * factor, weight[256:]])) != quick_hash(weight)
        if kind != "equal":
            changed = weight.clone()
            changed[64:128, 64:192] *= factor
            assert quick_hash(changed) != quick_hash(weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda W: W.flip(0),
        lambda W: W.flip(1),
        lambda W: -W,
        lambda W: W * 2,
        lambda W: W.roll(1),
        lambda W: W.T.contiguous().view(W.shape),
        lambda W: W.view(W.shape[::-1]),
        lambda W: W.view(torch.int32),
    ],
    ids=["rows", "columns", "sign", "scale", "shift", "layout", "shape", "dtype"],
)
def test_the_same_numbers_in_another_order_shape_or_dtype_have_another_hash(change: object) -> None:
    weight = values(torch.float32, 32, 48)
    assert callable(change)
    assert quick_hash(change(weight)) != quick_hash(weight)


def test_a_view_has_the_hash_of_its_copy() -> None:
    weight = values(torch.float32, 32, 48)
    for view in (weight.T, weight[3:9, 2:40:3], weight[:, 5]):
        assert quick_hash(view) == quick_hash(view.clone(memory_format=torch.contiguous_format))
