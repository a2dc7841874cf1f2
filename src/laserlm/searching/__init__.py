"""Find the intervention that helps most."""

from laserlm.searching.candidates import Candidate, expand
from laserlm.searching.driver import search
from laserlm.searching.found import Accepted, Found, Metric, Mode, Rung, Screened, Step, Strategy
from laserlm.searching.race import RaceOptions
from laserlm.searching.screen import Prediction, screen

__all__ = [
    "Accepted",
    "Candidate",
    "Found",
    "Metric",
    "Mode",
    "Prediction",
    "RaceOptions",
    "Rung",
    "Screened",
    "Step",
    "Strategy",
    "expand",
    "screen",
    "search",
]
