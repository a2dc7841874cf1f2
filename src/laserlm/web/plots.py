"""Figures of a report: gain against harm, the loss map, and the predictions of the screen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from laserlm.reductions import short_form
from laserlm.scoring.statistics import Interval, in_points
from laserlm.searching.result import Point, SearchResult
from laserlm.studies.loss_map import LossAtRank, LossMap, stacked_name

COLUMNS = 2
TITLE = 30
"""Height of the title of a matrix, in pixels."""
PANEL = 60
"""Minimum height of the cells of a matrix, in pixels."""
ROW = 17
MAX_TICKS = 8
"""Labels of blocks below the cells; more of them overlap on a telephone."""
COLOURS = ["#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b"]
"""From a fall of the loss to a rise: ColorBrewer's RdBu, which colour-blind readers can distinguish."""
FRAME = {"showgrid": False, "zeroline": False, "showline": True, "mirror": True, "linecolor": "#8c959f"}
MARGIN = {"t": 50, "r": 20, "b": 50, "l": 60}
POINT_COLOURS = {"chosen": "#d55e00", "not dominated": "#0072b2", "dominated": "#8c959f"}
"""Colours of points that differ in lightness too, on white and on black."""


def harm_plot(result: SearchResult, *, of_text: bool = False) -> Any:
    """Return the gain of every point against its harm: the largest perplexity ratio of the guards.

    Args:
        result: a search with points.
        of_text: whether the task has no accuracy, so that the fall of the loss is the gain.
    """
    figure = go.Figure()
    best, pareto = str(result.best), result.pareto
    groups = {
        "dominated": [p for p in result.points if p not in pareto and p.intervention != best],
        "not dominated": [p for p in pareto if p.intervention != best],
        "chosen": [p for p in result.points if p.intervention == best][-1:],
    }
    for (name, points), symbol in zip(groups.items(), ("circle-open", "circle", "diamond"), strict=True):
        gains = [_gain(p, of_text) for p in points]
        ratios = [math.exp(p.change) for p in points]
        figure.add_trace(
            go.Scatter(
                x=ratios,
                y=[value for value, _, _ in gains],
                error_y=_error_bars(gains),
                error_x=_error_bars([(ratio, *_largest_harm(p)) for ratio, p in zip(ratios, points, strict=True)]),
                text=[_point_hover(p, pareto) for p in points],
                name=name,
                mode="markers",
                marker={"color": POINT_COLOURS[name], "size": 14 if name == "chosen" else 10, "symbol": symbol},
                hovertemplate="%{text}<extra></extra>",
            )
        )
    if math.isfinite(result.harm_bound):
        figure.add_vline(x=math.exp(result.harm_bound), line_dash="dash", line_color="#8c959f", annotation_text="bound")
    figure.update_layout(
        height=380,
        margin=MARGIN,
        xaxis_title="perplexity ratio on the guard, the largest of several",
        yaxis_title="fall of the loss on validation, nats" if of_text else "gain on validation, points",
    )
    return figure


def _gain(point: Point, of_text: bool) -> tuple[float, float, float]:
    """Return the gain of a point and its interval: points of accuracy, or the fall of the loss."""
    c = point.comparison
    if of_text:
        return c.base_loss - c.edited_loss, -c.loss_interval.high, -c.loss_interval.low
    return 100 * c.gain, 100 * c.interval.low, 100 * c.interval.high


def _largest_harm(point: Point) -> Interval:
    return max(point.harms, key=lambda harm: harm.change).interval if point.harms else Interval(1.0, 1.0)


def _error_bars(values: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Return the error bars of values with their intervals; none where an interval is not known."""
    up = [high - value if math.isfinite(high) else None for value, _, high in values]
    down = [value - low if math.isfinite(high) else None for value, low, high in values]
    return {"type": "data", "array": up, "arrayminus": down, "thickness": 1}


def _point_hover(point: Point, pareto: Sequence[Point]) -> str:
    c = point.comparison
    number = f"{pareto.index(point) + 1}: " if point in pareto else ""
    lines = [
        f"<b>{number}{escape(short_form(point.intervention))}</b>",
        f"gain {in_points(c.gain, c.interval)}",
        f"change of loss {c.edited_loss - c.base_loss:+.3f} [{c.loss_interval.low:+.3f}, {c.loss_interval.high:+.3f}]",
        *(escape(str(harm)) for harm in point.harms),
    ]
    return "<br>".join(lines)


def map_plots(loss_map: LossMap) -> list[tuple[str, Any]]:
    """Return name and figure of each matrix: the change of loss by block and kept size. Blue is better, red is worse.

    The field ``meta`` of a layout has the values and the end of the scale of both colourings, ``loss`` and ``harm``.
    """
    blocks = {m.layer for m in loss_map}
    layers = list(range(min(blocks), max(blocks) + 1))  # plotly would widen cells over a block that is left out
    sizes, limit = loss_map.sizes, loss_map.colour_limit
    figures = []
    for stack, name in loss_map.matrices:
        of = {(m.size, m.layer): m for m in loss_map if (m.stack, m.name) == (stack, name)}
        cells = [[of.get((size, layer)) for layer in layers] for size in sizes]
        by_loss = [[None if m is None else m.loss_change.value for m in row] for row in cells]
        by_harm = [[None if m is None or m.harm is None else m.harm.value for m in row] for row in cells]
        figure = go.Figure(
            go.Heatmap(
                x=layers,
                y=[escape(size) for size in sizes],
                z=by_loss,
                text=[["" if m is None else _hover(m) for m in row] for row in cells],
                hovertemplate="%{text}<extra></extra>",
                colorscale=COLOURS,
                zmin=-limit,
                zmax=limit,
                showscale=False,
                xgap=1,
                ygap=1,
            )
        )
        colourings = {"loss": {"z": by_loss, "limit": limit}, "harm": {"z": by_harm, "limit": loss_map.harm_limit}}
        height = 70 + max(PANEL, ROW * len(sizes))
        figure.update_layout(height=height, margin={"t": 8, "b": 44, "l": 52, "r": 10}, meta=colourings)
        figure.update_xaxes(title={"text": "block", "standoff": 4}, dtick=-(-len(layers) // MAX_TICKS), **FRAME)
        figure.update_yaxes(title={"text": "kept", "standoff": 4}, type="category", **FRAME)
        figures.append((stacked_name(stack, name), figure))
    return figures


def map_plot(loss_map: LossMap) -> Any:
    """Return the figures of ``map_plots`` as one, for a notebook or a file."""
    panels = map_plots(loss_map)
    rows = -(-len(panels) // COLUMNS)
    height = rows * (panels[0][1].layout.height + TITLE) + TITLE
    figure = make_subplots(rows, COLUMNS, subplot_titles=[escape(n) for n, _ in panels], vertical_spacing=(70 + TITLE) / height)
    for i, (_, panel) in enumerate(panels):
        figure.add_trace(panel.data[0], i // COLUMNS + 1, i % COLUMNS + 1)
    figure.update_traces(showscale=False)
    figure.update_traces(showscale=True, colorbar={"title": "change of loss"}, selector=0)
    figure.update_layout(height=height)
    figure.update_xaxes(title={"text": "block", "standoff": 4}, dtick=panels[0][1].layout.xaxis.dtick)
    figure.update_yaxes(title={"text": "kept", "standoff": 4}, type="category")
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
        height=380,
        margin=MARGIN,
        xaxis_title="change of loss that the screen expects, nats",
        yaxis_title="measured on the first rung, nats",
    )
    return figure


def _hover(m: LossAtRank) -> str:
    loss, gain, harm = m.loss_change, m.gain, m.harm
    on_guard = "not measured"
    if harm is not None:
        low, high = (f"{math.exp(end):.3f}" if math.isfinite(end) else "unknown" for end in harm.interval)
        on_guard = f"x{math.exp(harm.value):.3f} [{low}, {high}] on {escape(m.guard)}, n {harm.n}"
    return (
        f"<b>{escape(m.matrix)}@{escape(m.size)}</b>"
        f"<br>change of loss {loss.value:+.3f} [{loss.interval.low:+.3f}, {loss.interval.high:+.3f}]"
        f"<br>gain {in_points(gain.value, gain.interval)}<br>n {loss.n}"
        f"<br>harm {on_guard}"
    )
