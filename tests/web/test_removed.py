"""The removed components by block and matrix."""

from __future__ import annotations

import pytest

from laserlm.reductions import Intervention
from laserlm.web.removed import removed_counts


def test_components_are_counted_by_block_and_matrix_in_the_order_of_a_block() -> None:
    counts = removed_counts(Intervention.parse("10.fc_in@drop1+2.fc_in@drop0,3-5+2.q_proj@drop7,9+10.v_proj@drop0-9"))
    assert counts is not None
    assert (counts.total, counts.matrices) == (17, 4)
    assert counts.columns == ("q_proj", "v_proj", "fc_in")
    assert counts.of_columns == (2, 10, 5)
    assert counts.rows == (("2", (2, 0, 4), 6), ("10", (0, 10, 1), 11))


def test_stacks_have_columns_of_their_own() -> None:
    counts = removed_counts(Intervention.parse("encoder.1.fc_in@drop1,2+decoder.1.fc_in@drop3"))
    assert counts is not None
    assert counts.columns == ("decoder.fc_in", "encoder.fc_in")
    assert counts.rows == (("decoder.1", (1, 0), 1), ("encoder.1", (0, 2), 2))


@pytest.mark.parametrize("text", ["", "1.fc_in@0.5", "1.fc_in@drop2+2.fc_in@0.5", "0-3.fc_in@drop2"])
def test_other_reductions_have_no_counts(text: str) -> None:
    assert removed_counts(Intervention.parse(text)) is None
