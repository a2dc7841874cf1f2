"""What to do where a device's memory runs out: free some, or halve the batch, and run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

__all__ = ["halve_until_it_fits", "retry_with_room"]

T = TypeVar("T")


def retry_with_room(run: Callable[[], T], make_room: Callable[[torch.OutOfMemoryError], None]) -> T:
    """Return the result of ``run``. Where it runs out of memory, call ``make_room`` and run again.

    ``make_room`` frees memory or makes the next run smaller. It raises an error if nothing is left to try.
    """
    while True:
        try:
            return run()
        except torch.OutOfMemoryError as error:
            failure = error.with_traceback(None)  # the traceback holds the tensors of the failed run
        make_room(failure)
        torch.cuda.empty_cache()


def halve_until_it_fits(batches: Sequence[Sequence[int]], run: Callable[[Sequence[int]], None]) -> None:
    """Run batches of indices in their order. A batch that does not fit into memory is halved.

    Raises:
        torch.OutOfMemoryError: if a single index does not fit.
    """
    pending = list(batches)[::-1]

    def halve(error: torch.OutOfMemoryError) -> None:
        batch = pending.pop()
        if len(batch) == 1:
            raise error
        half = len(batch) // 2
        pending.extend((batch[half:], batch[:half]))

    while pending:
        retry_with_room(lambda: run(pending[-1]), halve)
        pending.pop()
