"""Second moments of what goes into the linear layers of a model, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from laserlm.linalg.precision import full_precision
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix
from laserlm.out_of_memory import retry_with_room
from laserlm.scoring.forward import out_of_memory_error
from laserlm.scoring.prefix_cache import PrefixCache, PrefixCheck
from laserlm.scoring.records import TokenSequence

CHECKED_TOKENS = 16
"""Length of the sequences on which it is tried whether the blocks can run one after another."""

Block = tuple[str, int]
"""Stack and layer of a block."""


def moments_by_block(
    lm: LanguageModel, rows: Sequence[TokenSequence], matrices: Sequence[Matrix], *, batch_size: int = 4
) -> Iterator[tuple[list[Matrix], dict[str, Tensor]]]:
    """Yield the matrices of one block after another, with the mean over tokens of x x^T, (n, n), by the path of the layer.

    Every block runs once on the outputs of the block before it, so that the moments of one block are in memory. A model
    whose blocks cannot run like that runs completely for every block. Layers with one input, such as query, key and value,
    share one tensor. A layer that no token reaches has none.

    Args:
        lm: the unchanged model.
        rows: the token sequences; padding does not count.
        matrices: weights of linear layers.
        batch_size: rows in one forward pass. It is halved where memory runs out.

    Raises:
        ScoringError: if a single row does not fit into memory.
    """
    by_block: dict[Block, list[Matrix]] = {}
    for m in matrices:
        by_block.setdefault((m.stack, m.layer), []).append(m)
    walk = _Walk(lm, rows, batch_size)
    for block in [block for block in walk.block_order or by_block if block in by_block]:
        yield by_block[block], walk.moments(block, [m.path.rpartition(".")[0] for m in by_block[block]])


class _Walk:
    """Runs the blocks of a model one after another, on all rows each."""

    @full_precision()  # the complete scores, with which those from a boundary are compared
    def __init__(self, lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int) -> None:
        self.lm = lm
        self.batch_size = batch_size
        by_length: dict[int, list[TokenSequence]] = {}  # rows of one length run together, for padding would count as tokens
        for row in rows:
            by_length.setdefault(len(row.ids), []).append(row)
        self.groups = list(by_length.values())
        self.check = PrefixCheck(lm, [_shortened(row) for row in rows])
        self.block_order = list(self.check.block_order)
        self.caches: list[PrefixCache] = []

    @full_precision()
    @torch.no_grad()
    def moments(self, block: Block, paths: Sequence[str]) -> dict[str, Tensor]:
        """Return the second moments of the inputs of some layers of a block."""
        return retry_with_room(lambda: self._moments(block, paths), self._halve)

    def _moments(self, block: Block, paths: Sequence[str]) -> dict[str, Tensor]:
        self.caches = self.caches or [PrefixCache(self.lm, rows, self.batch_size, self.check) for rows in self.groups]
        following = self._block_after(block)
        for cache in self.caches:
            cache.move_to(*block)
        with _summed(self.lm, paths) as means:  # new sums: a pass that ran out of memory has counted some rows already
            for cache in self.caches:
                if following is None:
                    cache.run()
                else:
                    cache.move_to(*following)
        for cache in self.caches:
            while cache.free_lowest():
                pass
        return means

    def _block_after(self, block: Block) -> Block | None:
        """Return the next block if the model can be cut below it. This runs the model."""
        at = self.block_order.index(block) + 1 if self.block_order else 0
        if 0 < at < len(self.block_order) and self.check.is_exact(at):
            return self.block_order[at]
        return None

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        if self.batch_size == 1:
            raise out_of_memory_error(self.lm, error) from None
        self.batch_size //= 2
        self.caches = []


def _shortened(row: TokenSequence) -> TokenSequence:
    length = min(CHECKED_TOKENS, len(row.ids) - 1)
    return replace(row, ids=row.ids[:length], targets=row.ids[1 : length + 1], positions=tuple(range(length)))


@contextmanager
def _summed(lm: LanguageModel, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Sum x x^T of what goes into each layer inside the block. At its end the sums are divided to means, in place."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    shared: dict[str, str] = {}  # by layer, the layer whose input it shares
    last: list[tuple[Tensor, str]] = []
    dtype = torch.float32 if lm.device.type == "mps" else torch.float64  # Apple's GPUs do not support float64

    def add(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, args: Any) -> None:
            x = args[0]
            if last and last[0][0] is x:
                shared[path] = last[0][1]
                return
            last[:] = [(x, path)]
            flat = x.flatten(0, -2).float()  # (tokens, n)
            if path not in sums:
                sums[path] = torch.zeros(x.shape[-1], x.shape[-1], dtype=dtype, device=x.device)
                counts[path] = 0
            sums[path] += flat.T @ flat
            counts[path] += len(flat)

        return hook

    hooks = [lm.model.get_submodule(path).register_forward_pre_hook(add(path)) for path in paths]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        last.clear()
    for path, total in sums.items():
        total.div_(counts[path])
    sums |= {path: sums[source] for path, source in shared.items()}
