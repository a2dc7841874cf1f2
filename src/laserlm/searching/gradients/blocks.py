"""Run a model cut between its blocks, and take the gradient through one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import find_stacks
from laserlm.scoring.batch import Batch


@dataclass
class BlockCall:
    """One call of a block: its arguments, and a leaf in place of each output."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class BatchPass:
    """One batch run to the end, its blocks' calls in order; what lies outside of blocks keeps its graph."""

    batch: Batch
    calls: list[BlockCall]


@contextmanager
def cut_between_blocks(lm: LanguageModel) -> Iterator[list[BlockCall]]:
    """Run blocks without a graph and hand on leaves in place of what they give out; yield the record of their calls."""
    calls: list[BlockCall] = []

    def around(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                # Copies, for some blocks add to their arguments in place.
                output = forward(*mapped(copied, args), **mapped(copied, kwargs))
            calls.append(BlockCall(block, args, kwargs, mapped(leaf_of, output)))
            return calls[-1].output

        return run

    with replaced_forwards(lm, around):
        yield calls


@contextmanager
def replaced_forwards(
    lm: LanguageModel, around: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the ``forward`` of every block by what ``around`` returns for it."""
    with ExitStack() as stack:
        for block in {id(b): b for _, _, blocks in find_stacks(lm.model) for b in blocks}.values():
            stack.callback(put_back, block, block.__dict__.get("forward"))
            block.forward = around(block, block.forward)
        yield


def put_back(module: nn.Module, forward: Any) -> None:
    """Give a module its own ``forward`` again."""
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = forward  # accelerate sets its own forward there


def backward(one: BatchPass, index: int) -> None:
    """Run a block again with its graph and pass the gradient on through its inputs."""
    call = one.calls[index]
    gradients = [x.grad for x in floats(call.output)]
    inputs = {id(x): x for x in floats((call.args, call.kwargs))}
    leaves = leaves_for(call.args, call.kwargs)
    args, kwargs = mapped(lambda x: leaves.get(id(x), x), (call.args, call.kwargs))
    with torch.enable_grad():
        outputs = [*floats(call.block(*mapped(shifted, args), **mapped(shifted, kwargs)))]
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
    padding = padding_of(one.batch)
    for key, x in inputs.items():
        gradient = leaves[key].grad
        if gradient is not None and x.requires_grad:
            torch.autograd.backward([x], [without_padding(gradient, padding)], retain_graph=True)
    call.args, call.kwargs, call.output = (), {}, None  # with them go the boundary above and its gradient


def leaves_for(args: Any, kwargs: Any, *, all_with_gradient: bool = False) -> dict[int, Tensor]:
    """Return a leaf in place of each tensor among the arguments, by the tensor's id.

    What goes in comes first; into the first block it comes without a graph, but the block's own gradients need one.
    """
    inputs = [*floats((args, kwargs))]
    return {id(x): x.detach().requires_grad_(all_with_gradient or x.requires_grad or x is inputs[0]) for x in inputs}


def id_lengths(batch: Batch) -> list[int]:
    """Return the numbers of tokens of a batch's rows, for encoder and decoder."""
    return [batch.inputs[name].shape[1] for name in ("input_ids", "decoder_input_ids") if name in batch.inputs]


def padding_of(batch: Batch) -> Tensor | None:
    """Return which positions are padding, (B, T); None where none is, or where a decoder's rows are as long."""
    mask: Tensor | None = batch.inputs.get("attention_mask")
    lengths = id_lengths(batch)
    if mask is None or bool(mask.all()) or len(set(lengths)) < len(lengths):
        return None
    return ~mask.bool()


def without_padding(x: Tensor, padding: Tensor | None) -> Tensor:
    """Return values (B, T, n) that are zero at padded positions, where kernels may leave anything."""
    if padding is None or x.ndim != 3 or x.shape[:2] != padding.shape:
        return x
    return x.masked_fill(padding.to(x.device)[..., None], 0)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter take a gradient until the end of the context."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def floats(tree: Any) -> Iterator[Tensor]:
    """Return the floating-point tensors of nested containers."""
    return (x for x in tree_flatten(tree)[0] if isinstance(x, Tensor) and x.is_floating_point())


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return nested containers with the function applied to each tensor."""
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def copied(x: Tensor) -> Tensor:
    """Return a copy without a graph."""
    return x.detach().clone()


def leaf_of(x: Tensor) -> Tensor:
    """Return the same values as a leaf, which takes a gradient if it is a floating-point tensor."""
    return x.detach().requires_grad_(x.is_floating_point())


def shifted(x: Tensor) -> Tensor:
    """Return a copy of what takes a gradient, and other tensors as they are."""
    return x.clone() if x.requires_grad else x  # a block may add in place to its arguments, but not to a leaf
