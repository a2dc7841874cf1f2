"""Settings that make products quicker and rounder do not reach decompositions and truncations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from laserlm.linalg import decompose, full_precision, reference_truncation
from laserlm.scoring.kernels import fast_cpu_kernels


def settings() -> tuple[str, ...]:
    backends: Any = torch.backends
    return torch.get_float32_matmul_precision(), backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    """Leave the process with PyTorch's defaults."""
    yield
    torch.set_float32_matmul_precision("highest")
    backends: Any = torch.backends
    for backend in (backends.cuda, backends.mkldnn):
        backend.matmul.fp32_precision = "none"


def allow_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


CHOICES: dict[str, Callable[[], None]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": allow_tf32,
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_precision_is_highest_inside_and_the_callers_afterwards(choice: str) -> None:
    CHOICES[choice]()
    before = settings()
    with full_precision():
        assert settings() == ("highest", "ieee", "ieee")
        with full_precision():
            assert settings() == ("highest", "ieee", "ieee")
        assert settings() == ("highest", "ieee", "ieee")
    assert settings() == before
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert settings() == before


def test_settings_of_single_backends_are_put_back_too() -> None:
    backends: Any = torch.backends
    backends.mkldnn.matmul.fp32_precision = "bf16"
    with full_precision():
        assert backends.mkldnn.matmul.fp32_precision == "ieee"
    assert backends.mkldnn.matmul.fp32_precision == "bf16"
    assert backends.cuda.matmul.fp32_precision == "none"


def test_where_nothing_is_allowed_nothing_changes() -> None:
    before = settings()
    with full_precision():
        assert settings() == before
    with full_precision(), fast_cpu_kernels(torch.device("cpu"), 8):
        pass
    assert settings() == before


class Recorded(Tensor):
    """A tensor that records the precision at each product in float32."""

    seen: list[tuple[str, bool]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_product = "matmul" in func.__name__ or func is torch.svd_lowrank
        if is_product and all(x.dtype == torch.float32 for x in args if isinstance(x, Tensor)):
            cls.seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    "reduced",
    [lambda W: decompose(W).truncate(3), lambda W: decompose(W.T).truncate(3), lambda W: reference_truncation(W, 3)],
    ids=["tall", "wide", "reference"],
)
def test_every_product_of_an_edit_is_computed_at_the_highest_precision(reduced: Callable[[Tensor], Tensor]) -> None:
    weight = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    expected = reduced(weight)
    torch.set_float32_matmul_precision("medium")
    Recorded.seen = []
    with torch.autocast("cpu", torch.bfloat16):
        actual = reduced(weight.as_subclass(Recorded))
    assert Recorded.seen == [("highest", False)] * 2  # the projection on the basis or the range finder, and the truncation
    assert torch.equal(actual.as_subclass(Tensor), expected)


@pytest.mark.parametrize("mode", ["medium", "autocast"])
def test_a_large_truncation_is_the_same_to_the_bit_under_quick_settings(mode: str) -> None:
    weight = torch.randn(768, 512, generator=torch.Generator().manual_seed(1))
    expected = decompose(weight).truncate(256)
    if mode == "medium":
        torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        assert torch.equal(decompose(weight).truncate(256), expected)


def test_two_threads_do_not_put_back_each_others_settings() -> None:
    torch.set_float32_matmul_precision("medium")
    before, failures = settings(), []

    def work() -> None:
        for _ in range(200):
            with full_precision():
                if settings()[0] != "highest":
                    failures.append(settings())

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert settings() == before
