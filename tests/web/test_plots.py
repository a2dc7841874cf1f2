"""The figures of a report show each reduction where it belongs."""

from __future__ import annotations

from dataclasses import replace

from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.scoring.statistics import Interval
from laserlm.studies.estimates import Estimate
from laserlm.studies.loss_map import LossMap
from laserlm.web.plots import map_plot, map_plots

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


def test_a_panel_holds_both_colourings_and_cells_without_harm_are_empty() -> None:
    trials = {text: evaluation(text, loss) for text, loss in LOSSES.items()}
    loss_map = LossMap.of(trials.pop(""), trials)
    harm = Estimate(0.5, Interval(0.25, 0.75), 64)
    cells = (replace(m, harm=harm, guard="<b>") if m.intervention == "6.v_proj@0.5" else m for m in loss_map)
    panels = dict(map_plots(LossMap(tuple(cells))))
    meta, trace = panels["v_proj"].layout.meta, panels["v_proj"].data[0]
    assert meta["loss"] == {"z": [list(row) for row in trace.z], "limit": trace.zmax}
    assert meta["harm"] == {"z": [[None] * 6, [*[None] * 5, 0.5]], "limit": 0.5}
    assert trace.y == ("0.1", "0.5")
    assert trace.text[1][5].endswith("<br>harm x1.649 [1.284, 2.117] on &lt;b&gt;, n 64")  # powers of e
    assert trace.text[0][5].endswith("<br>harm not measured")
