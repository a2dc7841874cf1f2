"""Self-contained HTML pages from templates. All values are escaped."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from laserlm.reductions import short_form

LONGEST_HOVER = 500
"""Characters of a reduction that the pointer shows; thousands of strengths have more."""


def page(template: str, **values: Any) -> str:
    """Return a page from ``templates/NAME.html``; every value is escaped unless it is ``Markup``."""
    return _environment().get_template(f"{template}.html").render(**values)


def plot(figure: Any, name: str) -> Markup:
    """Return a plotly figure as an element with this id, for a page that holds ``plot_library``.

    Plotly shows labels and hovers as HTML, so the caller escapes texts that come from data. The figure itself cannot leave
    its script element.
    """
    figure.update_layout(
        template="plotly_white",
        paper_bgcolor="rgba(0,0,0,0)",  # the page's own colour, light or dark
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "inherit"},
        hoverlabel={"bgcolor": "#1b1f24", "bordercolor": "#768390"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#768390"},
        legend={"orientation": "h", "y": 1, "yanchor": "bottom"},
    )
    html = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config={"displaylogo": False, "responsive": True}
    )
    return Markup(html)


def plot_library() -> Markup:
    """Return the script of plotly. A page needs it once, before its figures."""
    return Markup(f"<script>{get_plotlyjs()}</script>")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("laserlm.web"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "short": short_form,
        "breakable": lambda name: Markup("_<wbr>").join(name.split("_")),
        "hover": lambda text: text if len(text) <= LONGEST_HOVER else short_form(text),
        "percent": lambda x: "" if x is None else f"{x:.1%}",
        "points": lambda x: "" if x is None else f"{100 * x:+.1f}",
        "number": lambda x: "" if x is None else f"{x:.3f}",
        "signed": lambda x: "" if x is None else f"{x:+.3f}",
    }
    return environment
