"""The results database: runs that resume, their trials, and the score of every example."""

from laserlm.results.run import Run
from laserlm.results.store import RunInfo, Store, TrialInfo

__all__ = ["Run", "RunInfo", "Store", "TrialInfo"]
