"""What happens where memory runs out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from laserlm.scoring.memory import halve_until_it_fits


def test_after_a_batch_that_did_not_fit_no_batch_is_larger_than_the_part_that_fitted() -> None:
    sizes: list[int] = []
    done: list[int] = []

    def run(batch: Sequence[int]) -> None:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise RuntimeError("MPS backend out of memory")
        done.extend(batch)

    halve_until_it_fits([[5, 3, 4, 1, 2], [0, 9, 8, 7, 6], [10]], run)
    assert done == [5, 3, 4, 1, 2, 0, 9, 8, 7, 6, 10]
    assert sizes == [5, 2, 2, 1, 2, 2, 1, 1]


def test_batches_of_different_groups_are_not_mixed() -> None:
    done: list[Sequence[int]] = []

    def run(batch: Sequence[int]) -> None:
        if len(batch) > 3:
            raise torch.OutOfMemoryError("no room")
        done.append(batch)

    halve_until_it_fits([range(7), range(7, 9), range(9, 13)], run)
    assert [list(batch) for batch in done] == [[0, 1, 2], [3, 4, 5], [6], [7, 8], [9, 10, 11], [12]]


def test_memory_is_freed_before_a_batch_is_halved() -> None:
    held = [1]
    sizes: list[int] = []

    def run(batch: Sequence[int]) -> None:
        sizes.append(len(batch))
        if held or len(batch) > 2:
            raise torch.OutOfMemoryError("no room")

    halve_until_it_fits([[1, 2, 3, 4]], run, lambda: bool(held) and bool(held.pop()))
    assert sizes == [4, 4, 2, 2]


def test_a_single_index_that_does_not_fit_is_an_error() -> None:
    def run(batch: Sequence[int]) -> None:
        if 7 in batch:
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        halve_until_it_fits([[1, 2], [7, 8]], run)
