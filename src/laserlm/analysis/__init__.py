"""Studies of a model, of a reduction and of what it changed; each is one command."""

from laserlm.analysis.flipping import Flip, Flips, flips, likeliest
from laserlm.analysis.matrices import Correlation, MatrixMetrics, best_of_each, correlations, gains, matrix_metrics
from laserlm.analysis.scorebook import scored

__all__ = [
    "Correlation",
    "Flip",
    "Flips",
    "MatrixMetrics",
    "best_of_each",
    "correlations",
    "flips",
    "gains",
    "likeliest",
    "matrix_metrics",
    "scored",
]
