"""The results database: resumable runs, their trials, and the score of every example."""

from laserlm.store.run import Run
from laserlm.store.store import RunInfo, Store, TrialInfo

__all__ = ["Run", "RunInfo", "Store", "TrialInfo"]
