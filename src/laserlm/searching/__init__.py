"""Find the intervention that helps most."""

from laserlm.searching.candidates import Candidate, expand
from laserlm.searching.cluster import Ray
from laserlm.searching.driver import search
from laserlm.searching.found import Accepted, Found, Metric, Mode, Rung, Screened, Step, Strategy
from laserlm.searching.race import RaceOptions

__all__ = [
    "Accepted",
    "Candidate",
    "Found",
    "Metric",
    "Mode",
    "RaceOptions",
    "Ray",
    "Rung",
    "Screened",
    "Step",
    "Strategy",
    "expand",
    "search",
]
