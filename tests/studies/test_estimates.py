from __future__ import annotations

import pytest

from laserlm.scoring.statistics import Interval
from laserlm.studies.estimates import Estimate


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        # What sums of thirds leave of a change of zero.
        (Estimate(-2.78e-18, Interval(-0.0444, 0.0444), 40), "0 [-0.0444, 0.0444]"),
        (Estimate(-0.0, Interval(-1e-17, 3e-17), 40), "0 [0, 0]"),
        (Estimate(-3e-9, Interval(-4e-9, 0.5), 4), "-3e-09 [-4e-09, 0.5] (few)"),
        (Estimate.mean([1 / 3 - 0.2, -1 / 3 + 0.2, 0.1 + 0.2 - 0.3]), "0 [-0.331, 0.331] (few)"),
    ],
)
def test_a_rounding_error_of_zero_is_printed_as_zero(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text
