"""Find the intervention that helps most."""

from laserlm.searching.candidates import Candidate, expand
from laserlm.searching.cluster import Ray
from laserlm.searching.driver import search
from laserlm.searching.race import RaceOptions
from laserlm.searching.result import ComposeStep, Metric, Mode, RungReport, ScreenReport, SearchProgress, SearchResult, Strategy

__all__ = [
    "Candidate",
    "ComposeStep",
    "Metric",
    "Mode",
    "RaceOptions",
    "Ray",
    "RungReport",
    "ScreenReport",
    "SearchProgress",
    "SearchResult",
    "Strategy",
    "expand",
    "search",
]
