"""Figures of the studies: one self-contained HTML file each, or a still image where a browser is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from laserlm.errors import AnalysisError
from laserlm.reductions import short_form
from laserlm.studies.components import BottomResult, SpectrumRun
from laserlm.studies.controls import Control
from laserlm.studies.entities import Entities
from laserlm.studies.estimates import Estimate
from laserlm.studies.flipping import Flips
from laserlm.studies.loss_map import LossMap, stacked_name
from laserlm.studies.matrices import MatrixMetrics
from laserlm.studies.rank_curve import Point
from laserlm.studies.side_effects import Transfer
from laserlm.studies.terms import GroupTerms

IMAGE_SUFFIXES = (".png", ".svg", ".pdf")


def check_figure(file: Path) -> None:
    """Raise an error where a figure could not be written to a file, before what it shows is computed.

    Raises:
        AnalysisError: if the file's ending is unknown, or its folder is not there.
    """
    if file.suffix not in (".html", *IMAGE_SUFFIXES):
        raise AnalysisError(f"cannot write a figure to {file}; end its name in .html, {', '.join(IMAGE_SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise AnalysisError(f"no folder {file.absolute().parent} to write the figure in; make it first")


def write_figure(figure: Any, file: Path) -> None:
    """Write a plotly figure: ``.html`` holds all it needs, ``.png``, ``.svg`` and ``.pdf`` need kaleido and a browser.

    Raises:
        AnalysisError: if the file has another ending, or no still image can be drawn here.
    """
    check_figure(file)
    if file.suffix == ".html":
        figure.write_html(file, include_plotlyjs=True)
        return
    try:
        figure.write_image(file)
    except (ValueError, RuntimeError, ImportError) as error:
        raise AnalysisError(f"cannot write {file}: {str(error).splitlines()[0]}; write an .html file instead") from error


def curves(series: Mapping[str, Sequence[tuple[Any, Estimate]]], title: str, x: str, y: str) -> Any:
    """Return lines with their intervals as error bars; points over too few examples are hollow.

    Args:
        series: by name, what is on the x axis and the estimate at it.
        title: of the figure.
        x: what is on its axis.
        y: what is on the other axis.
    """
    figure = go.Figure()
    for name, points in series.items():
        drawn = [(at, e) for at, e in points if e.n]
        figure.add_scatter(
            name=name,
            x=[at for at, _ in drawn],
            y=[e.value for _, e in drawn],
            error_y=_errors([e for _, e in drawn]),
            mode="lines+markers",
            marker={"symbol": ["circle-open" if e.is_small else "circle" for _, e in drawn]},
            customdata=[e.n for _, e in drawn],
            hovertemplate="%{x}: %{y:.4g}, n %{customdata}",
        )
    figure.update_layout(
        title=_title(title, [e for points in series.values() for _, e in points]), xaxis_title=x, yaxis_title=y
    )
    return figure


def bars(series: Mapping[str, Sequence[tuple[str, Estimate]]], title: str, y: str) -> Any:
    """Return groups of bars with their intervals; those over too few examples are named so.

    Args:
        series: by name, the label of each bar and its estimate.
        title: of the figure.
        y: what is on its axis.
    """
    figure = go.Figure()
    for name, of in series.items():
        drawn = [(label, e) for label, e in of if e.n]
        figure.add_bar(
            name=name,
            x=[f"{label} (few)" if e.is_small else label for label, e in drawn],
            y=[e.value for _, e in drawn],
            error_y=_errors([e for _, e in drawn]),
            customdata=[e.n for _, e in drawn],
            hovertemplate="%{x}: %{y:.4g}, n %{customdata}",
        )
    figure.update_layout(title=_title(title, [e for of in series.values() for _, e in of]), barmode="group", yaxis_title=y)
    return figure


def heat(
    rows: Sequence[Any], columns: Sequence[Any], z: Sequence[Sequence[float | None]], title: str, names: Sequence[str]
) -> Any:
    """Return a heat map.

    Args:
        rows: labels of the y axis.
        columns: labels of the x axis.
        z: a value for each row and column, None where there is none.
        title: of the figure.
        names: of the y axis, the x axis and the values.
    """
    signed = any(v is not None and v < 0 for row in z for v in row)
    colours = {"colorscale": "RdBu", "zmid": 0} if signed else {}
    figure = go.Figure(go.Heatmap(x=list(columns), y=list(rows), z=z, colorbar={"title": names[2]}, **colours))
    figure.update_layout(title=title, yaxis_title=names[0], xaxis_title=names[1])
    return figure


def flips_figure(result: Flips, title: str) -> Any:
    """Return the gain of every group, and of all examples."""
    c = result.comparison
    of = [("all", Estimate(c.gain, c.interval, c.n))]
    of += [(g.group, Estimate(g.comparison.gain, g.comparison.interval, g.comparison.n)) for g in result.groups]
    return bars({"gain": of}, title, "gain in accuracy")


def controls_figure(rows: Sequence[Control], title: str) -> Any:
    """Return the gain of every control, and its change of loss."""
    gain = [(c.control, Estimate(c.gain, c.interval, c.n)) for c in rows]
    loss = [(c.control, Estimate(c.loss_change, c.loss_interval, c.n)) for c in rows]
    return bars({"gain in accuracy": gain, "change of loss, nats per token": loss}, title, "against the unchanged model")


def components_figure(bottom: Sequence[BottomResult], chunks: Sequence[SpectrumRun], title: str) -> Any:
    """Return what wins by the kept fraction of the smallest singular values, above the change of loss without each run."""
    subplots = make_subplots(rows=2, cols=1, vertical_spacing=0.15)
    shares = {name: [(b.fraction, b.classes[name]) for b in bottom] for name in (bottom[0].classes if bottom else ())}
    shares |= {"cosine": [(b.fraction, b.cosine) for b in bottom], "probability": [(b.fraction, b.probability) for b in bottom]}
    without = {c: [(f"{m.first}-{m.last}", m.loss_change) for m in chunks if m.matrix == c] for c in {m.matrix for m in chunks}}
    for row, series in ((1, shares), (2, without)):
        for trace in curves(series, "", "", "").data:
            subplots.add_trace(trace, row=row, col=1)
    n = [str(of[0].n) for of in (bottom, chunks) if of]
    subplots.update_layout(title=f"{title} (n {' and '.join(n)}, 95 % intervals)", height=900)
    subplots.update_xaxes(title="fraction kept of the smallest singular values, corrected examples", row=1, col=1)
    subplots.update_xaxes(title="singular values taken out, all examples", row=2, col=1)
    subplots.update_yaxes(title="share or value", row=1, col=1)
    subplots.update_yaxes(title="change of loss, nats per token", row=2, col=1)
    return subplots


def rank_curve_figure(points: Sequence[Point], title: str) -> Any:
    """Return accuracy and change of loss by the size that is kept."""
    series = {
        "accuracy": [(p.size, p.accuracy) for p in points],
        "change of loss, nats per token": [(p.size, p.loss_change) for p in points],
    }
    return curves(series, title, "size kept", "score")


def map_figure(loss_map: LossMap, title: str) -> Any:
    """Return a heat map of the change of loss: matrices and sizes by layers (arXiv 2312.13558, figure 2)."""
    values = {(m.stack, m.name, m.size, m.layer): m.loss_change.value for m in loss_map}
    scored = {key[:3] for key in values}
    rows = [(*key, size) for key in sorted(loss_map.matrices) for size in loss_map.sizes if (*key, size) in scored]
    layers = sorted({m.layer for m in loss_map})
    z = [[values.get((*row, layer)) for layer in layers] for row in rows]
    names = [stacked_name(stack, f"{name}@{size}") for stack, name, size in rows]
    return heat(names, layers, z, title, ("matrix and size", "layer", "change of loss"))


def entities_figure(rows: Sequence[Entities], title: str) -> Any:
    """Return the mean number of entities, and the shares of texts, by set and model."""
    series = {
        "entities": [(f"{e.set}, {e.model}", e.entities) for e in rows],
        "share with the answer's": [(f"{e.set}, {e.model}", e.with_answer) for e in rows],
        "share with none": [(f"{e.set}, {e.model}", e.without) for e in rows],
    }
    return bars(series, title, "entities in a text, or share of texts")


def terms_figure(by_text: Mapping[str, Sequence[GroupTerms]], title: str) -> Any:
    """Return a heat map of how far ahead the marking words of each group are; groups that are too small are not in it."""
    rows = [(of, g) for of, groups in by_text.items() for g in groups if not g.is_small and g.terms]
    words = list(dict.fromkeys(t.term for _, g in rows for t in g.terms))
    z = [[{t.term: t.lift.value for t in g.terms}.get(word) for word in words] for _, g in rows]
    names = [f"{g.group} (n {g.n}), {of}" for of, g in rows]
    return heat(names, words, z, f"{title}: words that mark a group", ("group", "word", "TF-IDF ahead by"))


def transfer_figure(cells: Sequence[Transfer], title: str) -> Any:
    """Return the gain of each intervention on each task."""
    series: dict[str, list[tuple[str, Estimate]]] = {}
    for c in cells:
        series.setdefault(f"{short_form(c.intervention)}, chosen on {c.chosen_on}", []).append((c.scored_on, c.gain))
    return bars(series, title, "gain in accuracy")


def matrices_figure(metrics: Sequence[MatrixMetrics], metric: str) -> Any:
    """Return a heat map of one metric that is a number: layers by matrices, the stacks side by side."""
    columns = list(dict.fromkeys((m.stack, m.name) for m in metrics))
    layers = sorted({m.layer for m in metrics})
    values = {(m.layer, m.stack, m.name): getattr(m, metric) for m in metrics}
    z = [[values.get((layer, *column)) for column in columns] for layer in layers]
    name = metric.replace("_", " ")
    x = [stacked_name(stack, name) for stack, name in columns]
    return heat(layers, x, z, f"{name} of every matrix", ("layer", "matrix", name))


def _errors(of: Sequence[Estimate]) -> dict[str, Any]:
    def length(value: float) -> float | None:
        return value if math.isfinite(value) else None

    above = [length(e.interval.high - e.value) for e in of]
    return {"type": "data", "array": above, "arrayminus": [length(e.value - e.interval.low) for e in of]}


def _title(title: str, of: Sequence[Estimate]) -> str:
    """Return a title that says over how many examples the estimates are."""
    counts = sorted({e.n for e in of})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "0"
    return f"{title} (n {n}, 95 % intervals)"
