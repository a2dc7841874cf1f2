"""A CUDA GPU computes what the CPU computes, for every family and dtype. ``make test-gpu`` runs these.

``LASER_TEST_DEVICE=cpu`` lets the CPU play the GPU, to try the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from families import SCORED

from laserlm.models import LanguageModel
from laserlm.searching.device_check import (
    DTYPES,
    DeviceCheck,
    check_mixed_placement,
    check_model,
    check_out_of_memory,
    missing_gpu,
)

DEVICE = os.environ.get("LASER_TEST_DEVICE", "cuda")
REASON = missing_gpu() if DEVICE.startswith("cuda") else ""
PLAIN = [family for family in SCORED if family != "mixtral"]
"""Families whose layers are modules of their own."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(bool(REASON), reason=REASON),
]


def assert_all_passed(checks: Sequence[DeviceCheck]) -> None:
    for check in checks:
        print(f"{check.name}: {check.detail}")
    assert [f"{check.name}: {check.detail}" for check in checks if not check.passed] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", SCORED)
def test_choices_screen_and_padding_are_those_of_the_cpu(
    family: str, dtype: torch.dtype, make: Callable[..., LanguageModel]
) -> None:
    assert_all_passed(check_model(make(family), DEVICE, dtype))


@pytest.mark.parametrize("family", PLAIN)
def test_a_device_map_finer_than_blocks_changes_nothing(family: str, make: Callable[..., LanguageModel]) -> None:
    assert_all_passed(check_mixed_placement(make(family), DEVICE))


def test_a_batch_that_does_not_fit_is_halved_and_scores_stay_the_same() -> None:
    assert_all_passed(check_out_of_memory(DEVICE))
