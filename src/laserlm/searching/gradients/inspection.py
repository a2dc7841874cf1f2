"""What the graph of one row tells of a model: between which blocks it can be cut, and what it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache

from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import find_stacks
from laserlm.out_of_memory import is_out_of_memory, uniform_out_of_memory
from laserlm.scoring.batch import Batch
from laserlm.scoring.forward import batches, forward_logits
from laserlm.scoring.records import TokenSequence
from laserlm.searching.gradients.blocks import (
    copied,
    floats,
    frozen,
    id_lengths,
    leaf_of,
    leaves_for,
    mapped,
    replaced_forwards,
    shifted,
)
from laserlm.searching.gradients.sites import Site

log = logging.getLogger(__name__)
INSPECTED_TOKENS = 128
"""Most tokens of a causal model's row whose graph of all blocks is made, which takes more than a gradient block by block."""
CLOSE = 0.05
"""Largest difference of what a layer or block gets or gives out in two passes, as a share of the largest value."""


def token_count(row: TokenSequence) -> int:
    """Return the number of tokens of a sequence."""
    return len(row.ids) + len(row.decoder)


@dataclass
class Inspection:
    """What one row tells of a model.

    Args:
        can_be_cut: whether blocks can be run again one by one: a gradient passes between them through their arguments and
            outputs alone, and what they give out depends on these alone.
        is_separable: whether every layer keeps the rows of a batch apart.
        called: ids of the modules of sites that were called.
        boundary_bytes: bytes of the outputs of all blocks for a token.
        graph_bytes: bytes that the graph of a whole pass holds for a token.
    """

    can_be_cut: bool = True
    is_separable: bool = False
    called: set[int] = field(default_factory=set)
    boundary_bytes: float = 0.0
    graph_bytes: float = 0.0

    @classmethod
    def of(cls, lm: LanguageModel, rows: Sequence[TokenSequence], sites: Sequence[Site]) -> Inspection:
        """Run the end of a short row with the graph of all blocks, and twice the same in a batch.

        The full row follows where its graph cannot be cut, for what attention holds of a token grows with their number.
        """
        row = min(rows, key=lambda r: (len(r.ids) < 2, -len(r.decoder), len(r.ids)))
        end = row.end(INSPECTED_TOKENS) if lm.kind == "causal" else row
        try:
            with uniform_out_of_memory(), frozen(lm.model):
                found = cls._of_row(lm, end, sites)
                return found if found.can_be_cut or end is row else cls._of_row(lm, row, sites)
        except torch.OutOfMemoryError:
            boundaries = sum(len(blocks) for _, _, blocks in find_stacks(lm.model)) + 1
        log.warning("two rows with their graph do not fit into the memory of %s; the screen takes one row at a time", lm.device)
        return cls(called={id(site.module) for site in sites}, boundary_bytes=boundaries * lm.width * lm.dtype.itemsize)

    @classmethod
    def _of_row(cls, lm: LanguageModel, row: TokenSequence, sites: Sequence[Site]) -> Inspection:
        (alone,), together = batches(lm, [row], 1), batches(lm, [row, row], 2)
        weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return x.detach()  # PyTorch: with x itself the graph would hold itself, and stay in memory

        with _inputs_of(sites) as inputs:
            with _recorded(lm) as calls, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                logits = forward_logits(lm, alone, scored_only=bool(lm.reads_positions))
            of_one = {key: list(tensors) for key, tensors in inputs.items()}
            inputs.clear()
            for batch in together if len(together) == 1 else ():
                with torch.no_grad():
                    forward_logits(lm, batch, scored_only=bool(lm.reads_positions))
        boundaries = {id(x): x.nbytes for call in calls for x in call.handed_on}
        return cls(
            can_be_cut=_is_cut(calls, [logits.logprobs, logits.choice_logprobs]) and all(map(_is_repeatable, calls)),
            is_separable=_are_separable(of_one, inputs, alone),
            called=set(of_one),
            boundary_bytes=sum(boundaries.values()) / token_count(row),
            graph_bytes=sum(saved.values()) / token_count(row),
        )


@dataclass
class _RecordedCall:
    """A call of a block with its graph: its arguments, the leaves in their place, its outputs, and what it handed on."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Tensor]
    outputs: list[Tensor]
    handed_on: list[Tensor]


@contextmanager
def _recorded(lm: LanguageModel) -> Iterator[list[_RecordedCall]]:
    """Run blocks with a graph each, cut from the graphs of all others; yield the record of their calls."""
    calls: list[_RecordedCall] = []

    def around(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            leaves = leaves_for(args, kwargs, all_with_gradient=True)
            args_, kwargs_ = mapped(lambda x: leaves.get(id(x), x), (args, kwargs))
            output = forward(*mapped(shifted, args_), **mapped(shifted, kwargs_))
            handed_on = mapped(leaf_of, output)
            own, outputs = list(leaves.values()), [*floats(output)]
            calls.append(_RecordedCall(block, args, kwargs, own, outputs, [*floats(handed_on)]))
            return handed_on

        return run

    with replaced_forwards(lm, around):
        yield calls


def _is_cut(calls: Sequence[_RecordedCall], loss: Sequence[Tensor]) -> bool:
    """Return whether no block's graph reaches beyond its arguments, and nothing outside reaches into a block's graph."""
    if any(_reached(call.outputs) - {id(leaf) for leaf in call.leaves} for call in calls):
        return False
    inside = {id(leaf) for call in calls for leaf in call.leaves}
    arguments = [x for call in calls for x in floats((call.args, call.kwargs))]
    return not _reached([*loss, *arguments]) & inside


@torch.no_grad()
def _is_repeatable(call: _RecordedCall) -> bool:
    """Return whether a block gives out the same again, and keeps no keys and values.

    With those of an earlier run, which have no graph, it may give out the same and hand on no gradient of them.
    """
    if any(isinstance(x, Cache) for x in tree_leaves((call.args, call.kwargs), is_leaf=lambda x: isinstance(x, Cache))):
        return False
    try:
        again = [*floats(call.block(*mapped(copied, call.args), **mapped(copied, call.kwargs)))]
    # A block that is not made to be run again may fail in any of these ways.
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return False
    return len(again) == len(call.outputs) and all(map(_are_close, again, call.outputs))


def _reached(tensors: Sequence[Tensor]) -> set[int]:
    """Return the ids of all leaves that the graphs of some tensors end in."""
    leaves: set[int] = set()
    seen: set[Any] = set()
    pending: list[Any] = [x.grad_fn for x in tensors if x.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.add(id(node.variable))
            pending += [following for following, _ in node.next_functions if following is not None]
    return leaves


@contextmanager
def _inputs_of(sites: Sequence[Site]) -> Iterator[dict[int, list[Tensor]]]:
    """Yield what goes into each module as its first argument, by its id."""
    inputs: dict[int, list[Tensor]] = {}

    def keep(module: nn.Module, args: Any) -> None:
        if args:
            inputs.setdefault(id(module), []).append(args[0].detach())

    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.module.register_forward_pre_hook(keep).remove)
        yield inputs


def _are_separable(alone: Mapping[int, Sequence[Tensor]], together: Mapping[int, Sequence[Tensor]], batch: Batch) -> bool:
    """Return whether the inputs of a batch of twice the same row are those of the row, one after the other."""
    if {key: len(of) for key, of in alone.items()} != {key: len(of) for key, of in together.items()}:
        return False
    pairs = [(a, b) for key in alone for a, b in zip(alone[key], together[key], strict=True)]
    return all(_is_doubled(a, b, id_lengths(batch)) for a, b in pairs)


def _is_doubled(one: Tensor, two: Tensor, lengths: Sequence[int]) -> bool:
    by_row = one.ndim >= 3 and one.shape[0] == 1
    by_token = one.ndim == 2 and one.shape[0] in lengths
    if not (by_row or by_token) or two.shape != (2 * one.shape[0], *one.shape[1:]):
        return False
    return _are_close(two, torch.cat([one, one]))


def _are_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= CLOSE * b.abs().max())
