"""Find the intervention that helps most."""

from laserlm.searching.candidates import Candidate, expand
from laserlm.searching.driver import Found, Metric, Step, search

__all__ = ["Candidate", "Found", "Metric", "Step", "expand", "search"]
