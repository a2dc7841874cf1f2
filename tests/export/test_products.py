"""The dtype of products: the faster one where the model can be run in it, on this processor or as a record says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from laserlm.errors import ExportError
from laserlm.export.gradient_moments import gradient_moments
from laserlm.export.products import check_products, fastest_products
from laserlm.models import LanguageModel
from laserlm.scoring.records import TokenSequence

Make = Callable[..., LanguageModel]
ROW = TokenSequence(0, tuple(range(5, 24)), tuple(range(6, 25)), tuple(range(19)))


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("is_broken", [False, True])
def test_products_are_in_bfloat16_unless_the_model_cannot_compute_them(
    is_broken: bool, llama: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    def look(*_: object) -> None:
        if is_broken and torch.is_autocast_enabled("cpu"):
            raise RuntimeError("index_add_(): self and source must have the same dtype")

    llama.model.register_forward_pre_hook(look)
    assert fastest_products(llama, ROW) == ("float32" if is_broken else "bfloat16")
    assert ("cannot compute its products in bfloat16 (index_add_()" in caplog.text) == is_broken


def test_products_are_in_the_models_dtype_without_instructions(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert fastest_products(llama, ROW) == "float32"


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_in_half_precision_keeps_its_products(dtype: str, make: Make) -> None:
    lm = make("llama")
    lm.model.to(getattr(torch, dtype))
    assert fastest_products(lm, ROW) == dtype


def test_products_in_another_dtype_are_refused(llama: LanguageModel) -> None:
    with pytest.raises(ExportError, match="products in float32 or bfloat16, not in float16"):
        check_products(llama, "float16")
    llama.model.bfloat16()
    with pytest.raises(ExportError, match="products in bfloat16, not in float32"):
        check_products(llama, "float32")


def test_moments_of_gradients_are_nearly_the_same_with_products_in_bfloat16(llama: LanguageModel, tmp_path: Path) -> None:
    seen: set[bool] = set()
    llama.model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    own = gradient_moments(llama, [ROW], llama.matrices, tmp_path / "own")
    assert seen == {False}
    rounded = gradient_moments(llama, [ROW], llama.matrices, tmp_path / "rounded", products="bfloat16")
    assert seen == {False, True}
    assert own.keys() == rounded.keys()
    for name, value in own.items():
        assert rounded[name].dtype == value.dtype
        assert 0 < float((rounded[name] - value).norm() / value.norm()) < 0.05
