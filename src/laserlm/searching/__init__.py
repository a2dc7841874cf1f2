"""Find the intervention that helps most."""

from laserlm.searching.candidates import Candidate, expand
from laserlm.searching.config import Effort, Metric, Mode, SearchConfig, Strategy
from laserlm.searching.driver import search
from laserlm.searching.ray_cluster import Ray
from laserlm.searching.result import ComposeStep, RungReport, ScreenReport, SearchProgress, SearchResult

__all__ = [
    "Candidate",
    "ComposeStep",
    "Effort",
    "Metric",
    "Mode",
    "Ray",
    "RungReport",
    "ScreenReport",
    "SearchConfig",
    "SearchProgress",
    "SearchResult",
    "Strategy",
    "expand",
    "search",
]
