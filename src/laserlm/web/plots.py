"""Figures of a report: the loss map, and the predictions of the screen."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from laserlm.studies.loss_map import LossAtRank, LossMap, stacked_name

__all__ = ["map_plot", "screen_plot"]

COLUMNS = 2
PANEL = 190
"""Minimum height of a panel, in pixels."""
ROW = 18


def map_plot(loss_map: LossMap) -> Any:
    """Return the change of loss of every block and kept size, one panel for each matrix. Blue is better, red is worse."""
    panels = loss_map.matrices
    layers = sorted({m.layer for m in loss_map})
    sizes = loss_map.sizes
    rows = -(-len(panels) // COLUMNS)
    names = [escape(stacked_name(stack, name)) for stack, name in panels]
    figure = make_subplots(rows=rows, cols=COLUMNS, subplot_titles=names, vertical_spacing=min(0.2, 0.35 / rows))
    for i, (stack, name) in enumerate(panels):
        of = {(m.size, m.layer): m for m in loss_map if (m.stack, m.name) == (stack, name)}
        cells = [[of.get((size, layer)) for layer in layers] for size in sizes]
        figure.add_trace(
            go.Heatmap(
                x=layers,
                y=[escape(size) for size in sizes],
                z=[[None if m is None else m.loss_change.value for m in row] for row in cells],
                text=[["" if m is None else _hover(m) for m in row] for row in cells],
                hovertemplate="%{text}<extra></extra>",
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
            ),
            row=i // COLUMNS + 1,
            col=i % COLUMNS + 1,
        )
    limit = loss_map.colour_limit
    figure.update_layout(
        coloraxis={
            "colorscale": "RdBu",
            "reversescale": True,
            "cmin": -limit,
            "cmax": limit,
            "colorbar": {"title": "change of loss"},
        },
        height=90 + rows * max(PANEL, 90 + ROW * len(sizes)),
    )
    figure.update_xaxes(title="block", dtick=max(1, len(layers) // 10))
    figure.update_yaxes(title="kept", type="category")
    return figure


def screen_plot(expected: Mapping[str, float], measured: Mapping[str, float]) -> Any:
    """Return the change of loss that the screen expected of each candidate, against the measured change."""
    both = [text for text in expected if text in measured]
    figure = go.Figure(
        go.Scatter(
            x=[expected[text] for text in both],
            y=[measured[text] for text in both],
            text=[escape(text) for text in both],
            mode="markers",
            marker={"color": "#0072b2", "size": 9, "opacity": 0.75},
            hovertemplate="%{text}<br>expected %{x:.3f}, measured %{y:.3f}<extra></extra>",
        )
    )
    figure.update_layout(
        height=420, xaxis_title="change of loss that the screen expects, nats", yaxis_title="measured on the first rung, nats"
    )
    return figure


def _hover(m: LossAtRank) -> str:
    loss, gain = m.loss_change, m.gain
    return (
        f"<b>{escape(m.matrix)}@{escape(m.size)}</b>"
        f"<br>change of loss {loss.value:+.3f} [{loss.interval.low:+.3f}, {loss.interval.high:+.3f}]"
        f"<br>gain {gain.value:+.1%} [{gain.interval.low:+.1%}, {gain.interval.high:+.1%}]<br>n {loss.n}"
    )
