"""Studies of a model and of what a reduction changes. Each study is one command of ``laser analyze``."""

from laserlm.studies.flipping import Flip, Flips, flips, likeliest
from laserlm.studies.matrices import Correlation, MatrixMetrics, best_of_each, correlations, gains, matrix_metrics
from laserlm.studies.scores import CachedScorer, cached_scorer

__all__ = [
    "CachedScorer",
    "Correlation",
    "Flip",
    "Flips",
    "MatrixMetrics",
    "best_of_each",
    "cached_scorer",
    "correlations",
    "flips",
    "gains",
    "likeliest",
    "matrix_metrics",
]
