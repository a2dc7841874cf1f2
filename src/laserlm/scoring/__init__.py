"""Score a model on examples: scorers, intervals and paired tests."""

from laserlm.scoring.evaluate import Comparison, compare, evaluate
from laserlm.scoring.records import Evaluation, Score
from laserlm.scoring.statistics import Interval

__all__ = ["Comparison", "Evaluation", "Interval", "Score", "compare", "evaluate"]
