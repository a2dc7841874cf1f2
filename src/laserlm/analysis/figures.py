"""Figures of the studies: one self-contained HTML file each, or a still image where a browser is installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laserlm.analysis.matrices import MatrixMetrics
from laserlm.errors import AnalysisError, MissingExtraError

__all__ = ["matrices_figure", "write_figure"]

STILL = (".png", ".svg", ".pdf")


def write_figure(figure: Any, file: Path) -> None:
    """Write a plotly figure: ``.html`` holds all it needs, ``.png``, ``.svg`` and ``.pdf`` need kaleido and a browser.

    Raises:
        AnalysisError: if the file has another ending, or a still image cannot be made here.
    """
    if file.suffix == ".html":
        figure.write_html(file, include_plotlyjs=True)
        return
    if file.suffix not in STILL:
        raise AnalysisError(f"cannot write a figure to {file}; end its name in .html, {', '.join(STILL)}")
    try:
        figure.write_image(file)
    except (ValueError, RuntimeError, ImportError) as error:
        raise AnalysisError(f"cannot write {file}: {str(error).splitlines()[0]}; write an .html file instead") from error


def matrices_figure(metrics: Sequence[MatrixMetrics], metric: str) -> Any:
    """Return a heat map of one metric, layers by matrix types.

    Raises:
        AnalysisError: if there is no such metric.
    """
    if metric not in MatrixMetrics.__dataclass_fields__ or not isinstance(getattr(metrics[0], metric), int | float):
        known = [name for name in MatrixMetrics.__dataclass_fields__ if isinstance(getattr(metrics[0], name), int | float)]
        raise AnalysisError(f"no metric {metric!r} to draw; there are {', '.join(known[1:])}")
    types = list(dict.fromkeys(m.matrix.rpartition(f"{m.layer}.")[2] for m in metrics))
    layers = sorted({m.layer for m in metrics})
    values = {(m.layer, m.matrix.rpartition(f"{m.layer}.")[2]): getattr(m, metric) for m in metrics}
    z = [[values.get((layer, t)) for t in types] for layer in layers]
    go = _plotly()
    figure = go.Figure(go.Heatmap(x=types, y=layers, z=z, colorbar={"title": metric.replace("_", " ")}))
    figure.update_layout(title=f"{metric.replace('_', ' ')} of every matrix", xaxis_title="matrix", yaxis_title="layer")
    return figure


def _plotly() -> Any:
    try:
        return importlib.import_module("plotly.graph_objects")
    except ImportError:
        raise MissingExtraError("figures need plotly; pip install 'laserlm[analysis]'") from None
