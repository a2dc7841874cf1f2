"""What to do where a device's memory runs out: free some, or halve the batches, and run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from laserlm.out_of_memory import retry_with_room

Item = TypeVar("Item")


def halve_until_it_fits(
    batches: Sequence[Sequence[Item]], run: Callable[[Sequence[Item]], None], free: Callable[[], bool] = lambda: False
) -> None:
    """Run batches of items in their order. Where one does not fit into memory, no later one is larger than its half.

    Args:
        batches: the batches.
        run: runs a batch.
        free: frees memory and returns whether there was something to free. It is tried before a batch is halved.

    Raises:
        torch.OutOfMemoryError: if a single item does not fit.
    """
    pending = list(batches)[::-1]

    def make_room(error: torch.OutOfMemoryError) -> None:
        if free():
            return
        size = len(pending[-1]) // 2
        if not size:
            raise error
        pending[:] = [batch[i : i + size] for batch in pending for i in reversed(range(0, len(batch), size))]

    while pending:
        retry_with_room(lambda: run(pending[-1]), make_room)
        pending.pop()
