"""The checks of a GPU, with the CPU in its place: they pass where nothing is wrong, and each fails where something is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from laserlm.models import LanguageModel
from laserlm.searching.device_check import (
    DTYPES,
    DeviceCheck,
    check_mixed_placement,
    check_model,
    check_out_of_memory,
    small_llama,
)

Make = Callable[..., LanguageModel]
CHOICES, SCREEN, PADDED_GRADIENT, PADDED_SCREEN, REPEATED = range(5)


def failed(checks: list[DeviceCheck]) -> list[int]:
    return [number for number, check in enumerate(checks) if not check.passed]


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float16)], ids=str
)
def test_a_device_that_is_the_cpu_passes(family: str, dtype: torch.dtype, make: Make) -> None:
    checks = check_model(make(family), "cpu", dtype)
    assert failed(checks) == [], checks
    assert [check.name.partition(": ")[2] for check in checks] == [
        "choices",
        "screen",
        "padding in the backward pass",
        "padding in the screen",
        "two screens",
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_on_two_devices_pass(family: str, make: Make) -> None:
    checks = check_mixed_placement(make(family), "cpu")
    assert len(checks) == 4
    assert failed(checks) == [], checks


def test_a_device_without_memory_passes() -> None:
    (check,) = check_out_of_memory("cpu")
    assert check.passed, check


def in_half_precision(lm: LanguageModel, change: Callable[[torch.Tensor], torch.Tensor]) -> LanguageModel:
    """Change what comes out of an MLP in the copy that plays the device, which alone is not in float32."""
    layer = lm.model.get_submodule("model.layers.1.mlp")
    layer.register_forward_hook(lambda _module, _args, y: y if y.dtype == torch.float32 else change(y))
    return lm


def wrong(y: torch.Tensor) -> torch.Tensor:
    return y * 0.5


def noisy(y: torch.Tensor) -> torch.Tensor:
    return y + torch.randn_like(y)


def nan_gradient_beside_padding(y: torch.Tensor) -> torch.Tensor:
    """Play an attention kernel whose gradient is not a number where a row is padded."""
    if y.requires_grad and len(y) > 1:
        y.register_hook(lambda gradient: gradient * float("nan"))
    return y


def wrong_gradient(y: torch.Tensor) -> torch.Tensor:
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * torch.linspace(-1, 1, gradient.shape[-1], dtype=gradient.dtype))
    return y


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (wrong, {CHOICES}),
        (noisy, {CHOICES, REPEATED}),
        (wrong_gradient, {SCREEN}),
        (nan_gradient_beside_padding, {PADDED_GRADIENT}),
    ],
)
def test_a_device_that_computes_something_else_fails(change: Any, expected: set[int]) -> None:
    result = failed(check_model(in_half_precision(small_llama(), change), "cpu", torch.float16))
    assert expected <= set(result)


def test_a_reduced_layer_that_is_not_where_its_input_is_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Expected all tensors to be on the same device")

    monkeypatch.setattr("laserlm.low_rank.LowRankLinear.forward", refuse)
    with pytest.raises(RuntimeError, match="same device"):
        check_mixed_placement(small_llama(), "cpu")


def test_no_bound_is_wide_enough_for_a_model_of_other_weights() -> None:
    assert all(tolerance.correlation >= 0.95 and tolerance.logprob <= 0.5 for tolerance in DTYPES.values())
