"""The figures of a report show each reduction where it belongs."""

from __future__ import annotations

from dataclasses import replace

from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.studies.loss_map import LossMap
from laserlm.web.plots import map_plot

LOSSES = {"": 3.0, "1.v_proj@0.5": 2.0, "6.v_proj@0.5": 2.5, "6.v_proj@0.1": 4.0, "4.fc_in@0.5": 3.5, "4.q_proj@0.5": 3.0}


def evaluation(intervention: str, loss: float) -> Evaluation:
    scores = [ExampleScore(str(i), i % 2 == 0, -loss, 1, "", "", fact=str(i)) for i in range(4)]
    return replace(Evaluation("m", "t", "validation", "answer", "x", tuple(scores), 0.0), intervention=intervention)


def test_cells_of_the_loss_map_are_as_wide_as_one_block_and_panels_are_in_the_order_of_a_block() -> None:
    trials = {text: evaluation(text, loss) for text, loss in LOSSES.items()}
    loss_map = LossMap.of(trials.pop(""), trials)
    assert [name for _, name in loss_map.matrices] == ["q_proj", "v_proj", "fc_in"]
    figure = map_plot(loss_map)
    assert [title.text for title in figure.layout.annotations] == ["q_proj", "v_proj", "fc_in"]
    shown = {}
    for name, panel in zip(("q_proj", "v_proj", "fc_in"), figure.data, strict=True):
        assert list(panel.x) == [1, 2, 3, 4, 5, 6]  # every block between the first and the last
        for size, row in zip(panel.y, panel.z, strict=True):
            shown |= {f"{block}.{name}@{size}": z for block, z in zip(panel.x, row, strict=True) if z is not None}
    assert shown == {text: loss - 3 for text, loss in LOSSES.items() if text}
    assert figure.layout.xaxis.dtick == 1
