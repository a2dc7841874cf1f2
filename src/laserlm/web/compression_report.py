"""Write a compressed model as one HTML file: its size, its perplexity and the rank of every matrix."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from laserlm.export.record import read_record
from laserlm.paths import atomic_file, check_new_file
from laserlm.reductions import Reduction
from laserlm.studies.loss_map import matrix_order, stacked_name
from laserlm.web.pages import page, plot, plot_library
from laserlm.web.plots import FRAME, MARGIN, MAX_TICKS, ROW

SHADES = ["#f7fbff", "#6baed6", "#08306b"]
"""From rank 0 to full rank: ColorBrewer's Blues."""

QUANTISED_STYLES = [("#009e73", "dot"), ("#d55e00", "dashdot")]
"""Colour and dash of the lines of 8 and 4 bits."""


def check_compression_report(out: Path, *, overwrite: bool = False) -> None:
    """Raise a WriteError if the page cannot be written there, or would replace another file."""
    check_new_file(out, kind="a report", is_ours=lambda start: start.startswith(b"<!doctype html>"), overwrite=overwrite)


def write_compression_report(folder: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Write the page of a folder that ``laser compress`` wrote, which needs nothing else, and return its path.

    Raises:
        ExportError: if the folder has no readable record.
        WriteError: as ``check_compression_report``, or if the file cannot be written.
    """
    check_compression_report(out, overwrite=overwrite)
    record = read_record(folder)
    settings, matrices = record["compression"], record["matrices"]
    perplexity = settings.get("perplexity")
    figures = {"ranks": plot(rank_plot(matrices), "ranks")}
    if perplexity and (len(perplexity["at"]) > 1 or "quantised" in perplexity):
        figures["perplexity"] = plot(perplexity_plot(perplexity), "perplexity")
    text = page(
        "compression",
        library=plot_library(),
        folder=folder.name,
        base=record["base"]["hub"] or Path(record["base"]["name"]).name,  # no path of this machine
        text=Path(settings["text"]["name"]).name if settings.get("text") else "",
        record=record,
        settings=settings,
        perplexity=perplexity,
        figures=figures,
        factored=sum(not m["dense"] for m in matrices),
        reasons=sorted({m["dense"] for m in matrices if m["dense"]}),
    )
    with atomic_file(out) as part:
        part.write_text(text, encoding="utf-8")
    return out


def rank_plot(matrices: list[dict[str, Any]]) -> Any:
    """Return the kept rank by block and matrix, as a share of the full rank.

    Args:
        matrices: the entries ``matrices`` of a record.
    """
    cells: dict[tuple[str, int, str], dict[str, Any]] = {}
    for m in matrices:
        r = Reduction.parse(f"{m['matrix']}@1")
        cells[r.stack, r.layers.first or 0, r.matrix] = m
    blocks = sorted({(stack, layer) for stack, layer, _ in cells})
    names = sorted({(stack, name) for stack, _, name in cells}, key=matrix_order)
    rows = [[cells.get((*block, name)) if block[0] == stack else None for block in blocks] for stack, name in names]
    figure = go.Figure(
        go.Heatmap(
            x=[stacked_name(stack, str(layer)) for stack, layer in blocks],
            y=[escape(stacked_name(*name)) for name in names],
            z=[[m and m["rank"] / min(m["shape"]) for m in row] for row in rows],
            text=[["" if m is None else _hover(m) for m in row] for row in rows],
            hovertemplate="%{text}<extra></extra>",
            colorscale=SHADES,
            zmin=0,
            zmax=1,
            colorbar={"title": "rank kept", "tickformat": ".0%"},
            xgap=1,
            ygap=1,
        )
    )
    figure.update_layout(height=110 + 2 * ROW * len(names), margin=MARGIN | {"t": 10, "l": 90})
    figure.update_xaxes(title="block", type="category", nticks=2 * MAX_TICKS, **FRAME)
    figure.update_yaxes(type="category", autorange="reversed", **FRAME)
    return figure


def perplexity_plot(perplexity: dict[str, Any]) -> Any:
    """Return the perplexity against the kept share of the parameters, with lines for the unchanged and the quantised model.

    Args:
        perplexity: the entry ``perplexity`` of a record.
    """
    points = sorted((float(ratio), value) for ratio, value in perplexity["at"].items())
    figure = go.Figure(
        go.Scatter(
            x=[ratio for ratio, _ in points],
            y=[value for _, value in points],
            name="compressed",
            mode="lines+markers",
            line={"color": "#0072b2"},
            marker={"size": 10},
            hovertemplate="kept %{x:.0%}<br>perplexity %{y:.2f}<extra></extra>",
        )
    )
    lines = [("unchanged model", perplexity["base"], "#768390", "dash")]
    for (kind, measured), (colour, dash) in zip(perplexity.get("quantised", {}).items(), QUANTISED_STYLES, strict=False):
        lines.append((f"{kind}, {measured['bytes'] / 2**20:.1f} MiB", measured["perplexity"], colour, dash))
    for name, value, colour, dash in lines:
        figure.add_scatter(x=[points[0][0], 1], y=[value] * 2, name=name, mode="lines", line={"dash": dash, "color": colour})
    figure.update_layout(height=360, margin=MARGIN)
    figure.update_xaxes(title="kept share of the blocks' parameters", tickformat=".0%")
    figure.update_yaxes(title="perplexity", type="log")
    return figure


def _hover(m: dict[str, Any]) -> str:
    rows, columns = m["shape"]
    stored = m["dense"] or f"two factors, {m['parameters'] / (rows * columns):.0%} of the parameters"
    return f"<b>{escape(m['matrix'])}</b>, {rows} x {columns}<br>rank {m['rank']} of {min(m['shape'])}<br>{escape(stored)}"
