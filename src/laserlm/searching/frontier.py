"""The frontier: score interventions without recomputing the blocks that they cannot change.

A reduction in a block leaves all blocks before it as they were. The frontier walks upwards once and keeps, for every
batch, only what the block before the boundary gave out. To score, the blocks below the boundary are replaced by stubs that
return it, and the model is called as usual: no code of any architecture is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import find_stacks
from laserlm.scoring.encoding import Row
from laserlm.scoring.forward import Batch, Outcome, batches, run_batch
from laserlm.scoring.kernels import quick

__all__ = ["Frontier"]

log = logging.getLogger(__name__)
TOLERANCE = 1e-4
"""Nats by which a pass through stubs may differ from a whole one; on most models it is the same to the bit."""


class _ReachedError(Exception):
    """Leaves a forward pass at the boundary; nothing above it is needed."""


class Frontier:
    """Rows at a boundary between two blocks of a model, from which they can be run to the end again and again.

    Blocks are counted in the order in which the model runs them, an encoder's before its decoder's. Where a model runs a
    block twice, or passes something on that its blocks do not give out, the boundary stays at the bottom and every pass is
    a whole one.

    Args:
        lm: the model, unchanged.
        rows: what is scored.
        batch_size: rows in one forward pass, the same throughout, since another shape moves low bits.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[Row], batch_size: int) -> None:
        self.lm = lm
        self.boundary = 0
        self._batches = batches(lm, rows, batch_size)
        self._kept: list[dict[str, Any]] = [{} for _ in self._batches]
        self._blocks = {(name, i): block for name, _, blocks in find_stacks(lm.model) for i, block in enumerate(blocks)}
        self._order = self._order_of_calls()
        # Two, so that what one leaves behind somewhere in the model cannot serve for the other.
        self._sample = sorted({0, len(self._batches) - 1})
        self._whole = self._sampled() if self._order else []

    @property
    def moves(self) -> bool:
        """Whether the boundary can leave the bottom."""
        return bool(self._order)

    def stay(self) -> None:
        """Put the boundary to the bottom for good, so that it takes no memory and every pass is a whole one."""
        self._order, self.boundary, self._kept = [], 0, [{} for _ in self._batches]

    @property
    def bytes(self) -> int:
        """Memory of the boundary in bytes."""
        sizes: list[int] = []
        tree_map(lambda x: sizes.append(x.nbytes) if isinstance(x, Tensor) else None, self._kept)
        return sum(sizes)

    @torch.no_grad()
    def advance(self, stack: str, layer: int) -> None:
        """Move the boundary up to just below a block, with the weights as they are at the moment, and check it there.

        To get below where it is, it starts again from the bottom.
        """
        if not self._order:
            return
        target = self._order.index((stack, layer))
        if target < self.boundary:
            self.boundary, self._kept = 0, [{} for _ in self._batches]
        if target == self.boundary:
            return
        reason = self._move(target)
        if reason is not None:
            text = "%s hands on more than its blocks give out (%s); every pass is a whole one"
            log.warning(text, self.lm.family, reason)
            self.stay()

    def _move(self, target: int) -> str | None:
        """Move the boundary; tell why passes from there do not score as whole ones do, or None where they do."""
        # Of each stack only the last block's output is needed above the boundary.
        last = {place[0]: place for place in self._order[self.boundary : target]}
        try:
            for batch, kept in zip(self._batches, self._kept, strict=True):
                kept |= self._outputs_of(batch, kept, list(last.values()))
            self.boundary = target
            found = self._sampled()
        # Whatever a model reads past its blocks, it may miss it in any of these ways.
        except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return f"{type(error).__name__}: {error}"
        same = all(abs(a - b) <= TOLERANCE for a, b in zip(self._whole, found, strict=True))
        return None if same else "scores differ"

    def _sampled(self) -> list[float]:
        """Return all log-probabilities read off the sample's batches."""
        found: list[float] = []
        for i in self._sample:
            with self._stubbed(self._kept[i]):
                for outcome in run_batch(self.lm, self._batches[i]):
                    found += [*outcome.logprobs, *outcome.options]
        return found

    @torch.no_grad()
    def run(self, on_batch: Callable[[int, int], None] | None = None) -> list[Outcome]:
        """Return the outcome of every row, in order, from the boundary to the end."""
        outcomes: dict[int, Outcome] = {}
        for batch, kept in zip(self._batches, self._kept, strict=True):
            with self._stubbed(kept):
                outcomes.update(zip(batch.rows, run_batch(self.lm, batch), strict=True))
            if on_batch is not None:
                on_batch(len(outcomes), sum(len(b.rows) for b in self._batches))
        return [outcomes[i] for i in range(len(outcomes))]

    def _order_of_calls(self) -> list[tuple[str, int]]:
        """Return the blocks in the order the model runs them, or nothing if it does not run each of them once."""
        called: list[tuple[str, int]] = []
        with ExitStack() as hooks, torch.no_grad():
            for place, block in self._blocks.items():
                hook = block.register_forward_pre_hook(lambda _module, _args, place=place: called.append(place))
                hooks.callback(hook.remove)
            run_batch(self.lm, self._batches[-1])
        return called if sorted(called) == sorted(self._blocks) else []

    def _outputs_of(self, batch: Batch, kept: dict[str, Any], places: list[tuple[str, int]]) -> dict[str, Any]:
        """Run a batch from the boundary just past the last of ``places`` and return what each of them gave out."""
        outputs: dict[str, Any] = {}

        def keep(stack: str, leave: bool) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                outputs[stack] = tree_map(_copied, output)
                if leave:
                    raise _ReachedError

            return hook

        with ExitStack() as hooks, self._stubbed(kept), quick(self.lm.device, batch.length):
            for place in places:
                handle = self._blocks[place].register_forward_hook(keep(place[0], place == places[-1]))
                hooks.callback(handle.remove)
            try:
                self.lm.model(**batch.inputs)
            except _ReachedError:
                return outputs
        raise RuntimeError("the model ended before the boundary was reached")

    @contextmanager
    def _stubbed(self, kept: dict[str, Any]) -> Iterator[None]:
        """Replace the forward of every block below the boundary by a stub that returns what was kept of its stack."""
        below = self._order[: self.boundary]
        last = {place[0]: place for place in below}
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for place in below:
                block = self._blocks[place]
                # What goes on into a real block is copied, for some models add to it in place.
                stub = _stub(kept[place[0]], copied=place == last[place[0]])
                replaced.append((block, block.__dict__.get("forward")))
                block.forward = stub
            yield
        finally:
            for block, before in replaced:
                if before is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = before  # accelerate puts its own there


def _stub(output: Any, *, copied: bool) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        return tree_map(_copied, output) if copied else output

    return forward


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
