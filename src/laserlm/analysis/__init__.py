"""Studies of a model, of a reduction and of what it changed; each is one command."""

from laserlm.analysis.flipping import Flip, Flips, flips, likeliest
from laserlm.analysis.matrices import Correlation, MatrixMetrics, best_of_each, correlations, gains, matrix_metrics
from laserlm.analysis.scorebook import Scorebook, scored

__all__ = [
    "Correlation",
    "Flip",
    "Flips",
    "MatrixMetrics",
    "Scorebook",
    "best_of_each",
    "correlations",
    "flips",
    "gains",
    "likeliest",
    "matrix_metrics",
    "scored",
]
