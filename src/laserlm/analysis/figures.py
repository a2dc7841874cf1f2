"""Figures of the studies: one self-contained HTML file each, or a still image where a browser is installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laserlm.analysis.matrices import MatrixMetrics
from laserlm.errors import AnalysisError, MissingExtraError

__all__ = ["check_figure", "matrices_figure", "write_figure"]

STILL = (".png", ".svg", ".pdf")


def check_figure(file: Path) -> None:
    """Raise an error where a figure could not be written to a file, before what it shows is computed.

    Raises:
        AnalysisError: if the file's ending is unknown, or its folder is not there.
        MissingExtraError: if plotly is not installed.
    """
    if file.suffix not in (".html", *STILL):
        raise AnalysisError(f"cannot write a figure to {file}; end its name in .html, {', '.join(STILL)}")
    if not file.absolute().parent.is_dir():
        raise AnalysisError(f"no folder {file.absolute().parent} to write the figure in; make it first")
    _plotly()


def write_figure(figure: Any, file: Path) -> None:
    """Write a plotly figure: ``.html`` holds all it needs, ``.png``, ``.svg`` and ``.pdf`` need kaleido and a browser.

    Raises:
        AnalysisError: if the file has another ending, or a still image cannot be made here.
    """
    check_figure(file)
    if file.suffix == ".html":
        figure.write_html(file, include_plotlyjs=True)
        return
    try:
        figure.write_image(file)
    except (ValueError, RuntimeError, ImportError) as error:
        raise AnalysisError(f"cannot write {file}: {str(error).splitlines()[0]}; write an .html file instead") from error


def matrices_figure(metrics: Sequence[MatrixMetrics], metric: str) -> Any:
    """Return a heat map of one metric that is a number: layers by matrices, those of each stack side by side."""
    columns = list(dict.fromkeys((m.stack, m.name) for m in metrics))
    layers = sorted({m.layer for m in metrics})
    values = {(m.layer, m.stack, m.name): getattr(m, metric) for m in metrics}
    z = [[values.get((layer, *column)) for column in columns] for layer in layers]
    go = _plotly()
    x = [f"{stack}.{name}" if stack else name for stack, name in columns]
    figure = go.Figure(go.Heatmap(x=x, y=layers, z=z, colorbar={"title": metric.replace("_", " ")}))
    figure.update_layout(title=f"{metric.replace('_', ' ')} of every matrix", xaxis_title="matrix", yaxis_title="layer")
    return figure


def _plotly() -> Any:
    try:
        return importlib.import_module("plotly.graph_objects")
    except ImportError:
        raise MissingExtraError("figures need plotly; pip install 'laserlm[analysis]'") from None
