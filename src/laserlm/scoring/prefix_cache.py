"""The prefix cache (frontier): score interventions without recomputing the blocks that they cannot change.

A reduction in a block does not change the blocks before it. The cache walks up the model once. For every batch it keeps only
the output of the last block below the boundary. To score, stubs that return this output replace the blocks below the
boundary, and the model is called as usual. This needs no code for single architectures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from laserlm.errors import ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import find_stacks
from laserlm.out_of_memory import uniform_out_of_memory
from laserlm.scoring.batch import Batch
from laserlm.scoring.forward import CHECKED_TOKENS, batches, run_batch
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.records import TokenScores, TokenSequence

log = logging.getLogger(__name__)
TOLERANCE = 1e-4
"""Largest difference, in nats, between a pass through stubs and a complete one. On most models both are equal to the bit."""

Block = tuple[str, int]
"""Stack and layer of a block."""


class _BoundaryReachedError(Exception):
    """Ends a forward pass at the boundary, because nothing above it is needed."""


class PrefixCache:
    """The activations of rows at a boundary between two blocks, from which the rows can be run to the end many times.

    Blocks are counted in the order in which the model runs them, an encoder's before its decoder's. The boundary stays at
    the bottom, and every pass is complete, if the model runs a block twice or its blocks do not hand on everything through
    their outputs.

    Args:
        lm: the unchanged model.
        rows: the rows to score.
        batch_size: rows in one forward pass. It stays the same, because another shape changes the last bits of scores.
        check: the check of this model's boundaries; several caches of one model can share it.
        joined: whether sequences that begin alike may be one row.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: Sequence[TokenSequence],
        batch_size: int,
        check: PrefixCheck | None = None,
        *,
        joined: bool = True,
    ) -> None:
        self.lm = lm
        self.boundary = 0
        self.check = check or PrefixCheck(lm, rows)
        self._batches = batches(lm, rows, batch_size, joined=joined)
        self._outputs: list[dict[str, Any]] = [{} for _ in self._batches]  # of each batch, by stack
        self._earlier: dict[int, list[dict[str, Any]]] = {}  # outputs at boundaries that were left

    @property
    def is_enabled(self) -> bool:
        """Whether the boundary can leave the bottom."""
        return bool(self.check.block_order)

    @property
    def bytes(self) -> int:
        """Memory in bytes of the activations at the boundary and at earlier boundaries, and of masks for pairs of tokens."""
        sizes: dict[int, int] = {}
        masks = [x for batch in self._batches for x in batch.inputs.values() if isinstance(x, Tensor) and x.ndim > 2]
        held = [self._outputs, self._earlier, masks]
        tree_map(lambda x: sizes.update({id(x): x.nbytes}) if isinstance(x, Tensor) else None, held)
        return sum(sizes.values())

    @torch.no_grad()
    def move_to(self, stack: str, layer: int) -> None:
        """Move the boundary to just below a block, with the weights as they are at the moment.

        The earlier boundary is kept until ``free_lowest``. To get down, the cache starts again from the next lower boundary
        that it has, or from the bottom.
        """
        if not self.is_enabled:
            return
        target = self.check.block_order.index((stack, layer))
        if target != self.boundary:
            self._earlier[self.boundary] = self._outputs
            self.boundary = max((boundary for boundary in self._earlier if boundary <= target), default=0)
            self._outputs = self._earlier.get(self.boundary, [{} for _ in self._batches])
        if target == self.boundary:
            return
        if self.check.is_exact(target):
            self._advance(target)
        else:
            self._reset()

    def free_lowest(self) -> bool:
        """Free the lowest of the earlier boundaries. Return whether there was one."""
        self._earlier.pop(0, None)  # the bottom takes no memory
        lowest = min(self._earlier, default=None)
        return lowest is not None and bool(self._earlier.pop(lowest))

    def _reset(self) -> None:
        self.boundary, self._outputs, self._earlier = 0, [{} for _ in self._batches], {}

    def _advance(self, target: int) -> None:
        # Above the boundary, only the output of each stack's last block is needed.
        last = {block[0]: block for block in self.check.block_order[self.boundary : target]}
        pairs = zip(self._batches, self._outputs, strict=True)
        # All batches or none: memory may run out in between.
        self._outputs = [outputs | self._run_blocks(batch, outputs, list(last.values())) for batch, outputs in pairs]
        self.boundary = target

    @torch.no_grad()
    def run(self) -> list[TokenScores]:
        """Return the token scores of every row, in order, computed from the boundary to the end."""
        outcomes: dict[int, TokenScores] = {}
        for batch, outputs in zip(self._batches, self._outputs, strict=True):
            with self._stubs(outputs):
                outcomes.update(zip(batch.rows, run_batch(self.lm, batch), strict=True))
        return [outcomes[i] for i in range(len(outcomes))]

    @uniform_out_of_memory()
    def _run_blocks(self, batch: Batch, outputs: dict[str, Any], blocks: list[Block]) -> dict[str, Any]:
        """Run a batch from the boundary to the last of some blocks, and return the output of each of them by its stack."""
        new_outputs: dict[str, Any] = {}

        def keep(stack: str, is_last: bool) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                new_outputs[stack] = tree_map(_clone, output)
                if is_last:
                    raise _BoundaryReachedError

            return hook

        with ExitStack() as hooks, self._stubs(outputs), fast_cpu_kernels(self.lm.device, batch.length):
            for block in blocks:
                handle = self.check.blocks[block].register_forward_hook(keep(block[0], block == blocks[-1]))
                hooks.callback(handle.remove)
            try:
                self.lm.model(**batch.inputs)
            except _BoundaryReachedError:
                return new_outputs
        raise RuntimeError("the model ended before the boundary was reached")

    @contextmanager
    def _stubs(self, outputs: dict[str, Any]) -> Iterator[None]:
        """Replace the ``forward`` of every block below the boundary by a stub that returns the output of its stack."""
        below = self.check.block_order[: self.boundary]
        last = {block[0]: block for block in below}
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for block in below:
                module = self.check.blocks[block]
                # The input of a real block is a copy, because some models add to it in place.
                stub = _stub(outputs[block[0]], copied=block == last[block[0]])
                replaced.append((module, module.__dict__.get("forward")))
                module.forward = stub
            yield
        finally:
            for module, forward in replaced:
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = forward  # accelerate sets its own forward there


class PrefixCheck:
    """Says at which boundaries a model can be cut. Each boundary is tried once, on a few rows, when it is first needed.

    Args:
        lm: the unchanged model.
        rows: rows that the model can be run on.

    Attributes:
        blocks: the block modules by stack and layer.
        block_order: the blocks in the order in which the model runs them; empty if it does not run each of them once, or if
            a boundary was not exact.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[TokenSequence]) -> None:
        self.blocks = {(name, i): block for name, _, blocks in find_stacks(lm.model) for i, block in enumerate(blocks)}
        by_length = sorted(rows, key=lambda row: len(row.ids))
        # Two batches, so that the second cannot use anything that the first left somewhere in the model.
        sample = [by_length[i] for i in sorted({0, len(rows) // 3, 2 * len(rows) // 3, len(rows) - 1})]
        if lm.kind == "causal":
            sample = [row.end(CHECKED_TOKENS) for row in sample]
        self.block_order: list[Block] = []
        self._exact = {0}
        self._lm = lm
        self._cache = PrefixCache(lm, sample, 2, self, joined=False)
        called: list[Block] = []
        try:
            with ExitStack() as hooks:
                for block, module in self.blocks.items():
                    hook = module.register_forward_pre_hook(lambda _module, _args, block=block: called.append(block))
                    hooks.callback(hook.remove)
                self._complete_scores = self._scores()
        except torch.OutOfMemoryError:
            log.warning("two rows do not fit into the memory of %s; every pass is a complete one", lm.device)
            return
        passes = len(self._cache._batches)
        order = called[: len(called) // passes]
        if sorted(order) == sorted(self.blocks) and called == order * passes:
            self.block_order = order

    @torch.no_grad()
    def is_exact(self, target: int) -> bool:
        """Return whether passes from below a block score as complete ones do. If not, log it and disable the cache."""
        if target in self._exact or not self.block_order:
            return bool(self.block_order)
        if target < self._cache.boundary:
            self._cache._reset()
        reason = "scores differ"
        try:
            self._cache._advance(target)
            if all(abs(a - b) <= TOLERANCE for a, b in zip(self._complete_scores, self._scores(), strict=True)):
                self._exact.add(target)
                return True
        # A model that needs more than its blocks' outputs may fail in any of these ways.
        except (RuntimeError, LookupError, TypeError, AttributeError, ValueError, ScoringError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            cause = error.__cause__ or error  # a ScoringError would say that the model cannot be scored
            reason = f"{type(cause).__name__}: {cause}"
        text = "%s hands on more than its blocks give out (%s); every pass is a complete one"
        log.warning(text, self._lm.family, reason)
        self.disable()
        return False

    def disable(self) -> None:
        """Keep the boundary at the bottom for good, so that it takes no memory and every pass is complete."""
        self.block_order = []
        self._cache._reset()

    def _scores(self) -> list[float]:
        return [x for outcome in self._cache.run() for x in (*outcome.logprobs, *outcome.choice_logprobs)]


def _stub(output: Any, *, copied: bool) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        return tree_map(_clone, output) if copied else output

    return forward


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
