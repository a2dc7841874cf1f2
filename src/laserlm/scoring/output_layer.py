"""The output layer in float32.

Logits of bfloat16 have 8 significant bits: between 16 and 32 they are multiples of 0.125, and two choices are often equal.
Multiplied in float32, the logits of a model in half precision are as exact as its last hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HALF = (torch.float16, torch.bfloat16)
CHUNK_BYTES = 2**26
"""Memory of the part of the output layer's weight that is in float32 at a time."""


@contextmanager
def float32_output_layer(model: Any, *, is_module: bool) -> Iterator[None]:
    """Multiply the output layer of a model in half precision in float32 inside a ``with`` block.

    What the model does to its logits after that, such as a bias, a scale or a cap, is done in float32 too. A model in float32
    does not change.

    Args:
        model: a transformers model with a head.
        is_module: whether the output layer is a module that the model calls. If not, products with as many outputs as the
            vocabulary has tokens are the output layer's.
    """
    if model.dtype not in HALF:
        yield
    elif is_module:
        with _forward_within(model.get_output_embeddings(), _Float32Products):
            yield
    else:
        with _Float32Products(_vocabulary_sizes(model)):
            yield


@contextmanager
def _forward_within(module: nn.Module, mode: Callable[[], TorchFunctionMode]) -> Iterator[None]:
    """Enter a mode whenever a module is called, after its pre-hooks."""
    plain, replaced = module.forward, module.__dict__.get("forward")  # accelerate sets its own forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with mode():
            return plain(*args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        if replaced is None:
            del module.forward
        else:
            module.forward = replaced


def _vocabulary_sizes(model: Any) -> set[int]:
    embeddings = model.get_input_embeddings()
    if type(model).__name__.endswith("ForSequenceClassification"):
        return {int(model.config.num_labels)}
    sizes = {getattr(model.config.get_text_config(decoder=True), "vocab_size", 0)}
    return sizes if embeddings is None else sizes | {embeddings.weight.shape[0]}


class _Float32Products(TorchFunctionMode):
    """Compute products with a matrix of half precision in float32; with ``sizes``, those with so many outputs."""

    def __init__(self, sizes: Collection[int] = ()) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace a product."""
        kwargs = kwargs or {}
        if func in PRODUCTS:
            x, weight, bias = PRODUCTS[func](*args, **kwargs)
            # Another type of tensor, such as a quantised one, has its own product.
            is_plain = type(weight) in (Tensor, nn.Parameter) and weight.ndim == 2 and weight.dtype in HALF
            if is_plain and (not self.sizes or weight.shape[0] in self.sizes):
                return _float32_linear(x, weight, bias)
        return func(*args, **kwargs)


PRODUCTS: dict[Any, Callable[..., tuple[Tensor, Tensor, Tensor | None]]] = {
    F.linear: lambda input, weight, bias=None: (input, weight, bias),
    torch.addmm: lambda input, mat1, mat2: (mat1, mat2.T, input),  # Conv1D's
    **dict.fromkeys(
        (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__),
        lambda input, other: (input, other.mT if other.ndim > 1 else other, None),
    ),
}
"""Operands of products as those of ``linear``: input (..., D), weight (V, D) and bias (V,)."""


def _float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (..., D) times a weight (V, D), plus the bias (V,), in float32."""
    if weight.requires_grad and torch.is_grad_enabled():
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    product: Tensor = _Float32Product.apply(x.reshape(-1, x.shape[-1]), weight)  # type: ignore[no-untyped-call]
    logits = product.view(*x.shape[:-1], len(weight))
    return logits if bias is None else logits + bias.float()


class _Float32Product(torch.autograd.Function):
    """x (N, D) times a fixed weight (V, D) in float32, (N, V), without a float32 copy of the full weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return the product."""
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        if x.is_cuda and torch.version.hip is None and x.dtype == weight.dtype:
            return torch.mm(x, weight.T, out_dtype=torch.float32)
        product = x.new_empty(len(x), len(weight), dtype=torch.float32)
        wide = x.float()
        for part in _parts(weight):
            torch.mm(wide, weight[part].float().T, out=product[:, part])  # in place, for a part has as many rows as x
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient by x."""
        (weight,) = ctx.saved_tensors
        by_x = gradient.new_zeros(len(gradient), weight.shape[1])
        for part in _parts(weight):
            by_x += gradient[:, part] @ weight[part].float()
        return by_x.to(ctx.dtype), None


def _parts(weight: Tensor) -> Iterator[slice]:
    """Yield the rows of a weight in parts of ``CHUNK_BYTES`` in float32."""
    V, D = weight.shape
    rows = max(1, CHUNK_BYTES // (4 * D))
    return (slice(start, start + rows) for start in range(0, V, rows))
