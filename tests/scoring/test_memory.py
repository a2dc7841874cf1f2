"""What happens where memory runs out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from laserlm.scoring.memory import halve_until_it_fits, retry_with_room


def test_batches_that_do_not_fit_are_halved_and_all_run_in_order() -> None:
    sizes: list[int] = []
    done: list[int] = []

    def run(batch: Sequence[int]) -> None:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no room")
        done.extend(batch)

    halve_until_it_fits([[5, 3, 4, 1, 2], [0]], run)
    assert done == [5, 3, 4, 1, 2, 0]
    assert sizes == [5, 2, 3, 1, 2, 1]


def test_a_single_index_that_does_not_fit_is_an_error() -> None:
    def run(batch: Sequence[int]) -> None:
        if 7 in batch:
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        halve_until_it_fits([[1, 2], [7, 8]], run)


def test_a_run_is_repeated_as_long_as_room_can_be_made() -> None:
    room = [0]

    def run() -> int:
        if room[0] < 2:
            raise torch.OutOfMemoryError("no room")
        return room[0]

    def make_room(error: torch.OutOfMemoryError) -> None:
        assert error.__traceback__ is None  # it would hold the tensors of the failed run
        room[0] += 1

    assert retry_with_room(run, make_room) == 2

    def give_up(error: torch.OutOfMemoryError) -> None:
        raise error

    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        retry_with_room(run, give_up)
