"""Find the intervention that helps most."""

from laserlm.searching.candidates import expand
from laserlm.searching.driver import Found, Metric, Step, search

__all__ = ["Found", "Metric", "Step", "expand", "search"]
