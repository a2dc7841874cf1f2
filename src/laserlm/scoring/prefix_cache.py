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
from laserlm.scoring.forward import Batch, TokenScores, batches, run_batch
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.tokenize import TokenSequence

__all__ = ["PrefixCache", "PrefixCheck"]

log = logging.getLogger(__name__)
TOLERANCE = 1e-4
"""Nats by which a pass through stubs may differ from a whole one; on most models it is the same to the bit."""


class _ReachedError(Exception):
    """Leaves a forward pass at the boundary; nothing above it is needed."""


class PrefixCache:
    """Rows at a boundary between two blocks of a model, from which they can be run to the end again and again.

    Blocks are counted in the order in which the model runs them, an encoder's before its decoder's. Where a model runs a
    block twice, or passes something on that its blocks do not give out, the boundary stays at the bottom and every pass is
    a whole one.

    Args:
        lm: the model, unchanged.
        rows: what is scored.
        batch_size: rows in one forward pass, the same throughout, since another shape moves low bits.
        checks: what is known of this model's boundaries; frontiers of one model share it.
    """

    def __init__(
        self, lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int, checks: PrefixCheck | None = None
    ) -> None:
        self.lm = lm
        self.boundary = 0
        self.checks = checks or PrefixCheck(lm, rows)
        self._batches = batches(lm, rows, batch_size)
        self._kept: list[dict[str, Any]] = [{} for _ in self._batches]
        self._left: dict[int, list[dict[str, Any]]] = {}

    @property
    def moves(self) -> bool:
        """Whether the boundary can leave the bottom."""
        return bool(self.checks.order)

    @property
    def bytes(self) -> int:
        """Memory in bytes of the boundary and of those left behind."""
        sizes: dict[int, int] = {}
        tree_map(lambda x: sizes.update({id(x): x.nbytes}) if isinstance(x, Tensor) else None, [self._kept, self._left])
        return sum(sizes.values())

    @torch.no_grad()
    def advance(self, stack: str, layer: int) -> None:
        """Move the boundary to just below a block, with the weights as they are at the moment.

        What it leaves behind is kept until ``forget``; to get down, it starts again from the next one below, or from the
        bottom.
        """
        if not self.moves:
            return
        target = self.checks.order.index((stack, layer))
        if target != self.boundary:
            self._left[self.boundary] = self._kept
            self.boundary = max((place for place in self._left if place <= target), default=0)
            self._kept = self._left.get(self.boundary, [{} for _ in self._batches])
        if target == self.boundary:
            return
        if self.checks.holds(target):
            self._move(target)
        else:
            self._restart()

    def forget(self) -> bool:
        """Free the lowest of the boundaries left behind; return whether there was one."""
        self._left.pop(0, None)  # the bottom takes no memory
        lowest = min(self._left, default=None)
        return lowest is not None and bool(self._left.pop(lowest))

    def _restart(self) -> None:
        self.boundary, self._kept, self._left = 0, [{} for _ in self._batches], {}

    def _move(self, target: int) -> None:
        # Of each stack only the last block's output is needed above the boundary.
        last = {place[0]: place for place in self.checks.order[self.boundary : target]}
        pairs = zip(self._batches, self._kept, strict=True)
        # All or nothing: memory may run out on the way.
        self._kept = [kept | self._outputs_of(batch, kept, list(last.values())) for batch, kept in pairs]
        self.boundary = target

    @torch.no_grad()
    def run(self) -> list[TokenScores]:
        """Return the outcome of every row, in order, from the boundary to the end."""
        outcomes: dict[int, TokenScores] = {}
        for batch, kept in zip(self._batches, self._kept, strict=True):
            with self._stubbed(kept):
                outcomes.update(zip(batch.rows, run_batch(self.lm, batch), strict=True))
        return [outcomes[i] for i in range(len(outcomes))]

    def _outputs_of(self, batch: Batch, kept: dict[str, Any], places: list[tuple[str, int]]) -> dict[str, Any]:
        """Run a batch from the boundary just past the last of ``places`` and return what each of them gave out."""
        outputs: dict[str, Any] = {}

        def keep(stack: str, leave: bool) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                outputs[stack] = tree_map(_copied, output)
                if leave:
                    raise _ReachedError

            return hook

        with ExitStack() as hooks, self._stubbed(kept), fast_cpu_kernels(self.lm.device, batch.length):
            for place in places:
                handle = self.checks.blocks[place].register_forward_hook(keep(place[0], place == places[-1]))
                hooks.callback(handle.remove)
            try:
                self.lm.model(**batch.inputs)
            except _ReachedError:
                return outputs
        raise RuntimeError("the model ended before the boundary was reached")

    @contextmanager
    def _stubbed(self, kept: dict[str, Any]) -> Iterator[None]:
        """Replace the forward of every block below the boundary by a stub that returns what was kept of its stack."""
        below = self.checks.order[: self.boundary]
        last = {place[0]: place for place in below}
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for place in below:
                block = self.checks.blocks[place]
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


class PrefixCheck:
    """At which boundaries a model can be cut: each is tried once, on a few rows, when it is first asked for.

    Args:
        lm: the model, unchanged.
        rows: some that it can be run on.

    Attributes:
        blocks: by stack and layer.
        order: the blocks in the order in which the model runs them; empty where it does not run each of them once, or a
            boundary was found not to hold.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[TokenSequence]) -> None:
        self.blocks = {(name, i): block for name, _, blocks in find_stacks(lm.model) for i, block in enumerate(blocks)}
        by_length = sorted(rows, key=lambda row: len(row.ids))
        # Two batches, so that what one leaves behind somewhere in the model cannot serve for the other.
        sample = [by_length[i] for i in sorted({0, len(rows) // 3, 2 * len(rows) // 3, len(rows) - 1})]
        self.order: list[tuple[str, int]] = []
        self._held = {0}
        self._lm = lm
        self._tried = PrefixCache(lm, sample, 2, self)
        called: list[tuple[str, int]] = []
        try:
            with ExitStack() as hooks:
                for place, block in self.blocks.items():
                    hook = block.register_forward_pre_hook(lambda _module, _args, place=place: called.append(place))
                    hooks.callback(hook.remove)
                run_batch(lm, self._tried._batches[-1])
            self._whole = self._scores()
        except torch.OutOfMemoryError:
            log.warning("two rows do not fit into the memory of %s; every pass is a whole one", lm.device)
            return
        if sorted(called) == sorted(self.blocks):
            self.order = called

    @torch.no_grad()
    def holds(self, target: int) -> bool:
        """Return whether passes from below a block score as whole ones do, and say so in the log where they do not."""
        if target in self._held or not self.order:
            return bool(self.order)
        if target < self._tried.boundary:
            self._tried._restart()
        reason = "scores differ"
        try:
            self._tried._move(target)
            if all(abs(a - b) <= TOLERANCE for a, b in zip(self._whole, self._scores(), strict=True)):
                self._held.add(target)
                return True
        # Whatever a model reads past its blocks, it may miss it in any of these ways.
        except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"{type(error).__name__}: {error}"
        text = "%s hands on more than its blocks give out (%s); every pass is a whole one"
        log.warning(text, self._lm.family, reason)
        self.stay()
        return False

    def stay(self) -> None:
        """Put boundaries to the bottom for good, so that they take no memory and every pass is a whole one."""
        self.order = []
        self._tried._restart()

    def _scores(self) -> list[float]:
        """Return all log-probabilities read off the sample."""
        return [x for outcome in self._tried.run() for x in (*outcome.logprobs, *outcome.options)]


def _stub(output: Any, *, copied: bool) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        return tree_map(_copied, output) if copied else output

    return forward


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
