"""The exceptions of laserlm.

    LaserError                 everything below; the command line ends with exit code 1
    ├── SpecError              text of a reduction, intervention or grid that cannot be read
    ├── MatrixError            a layer, matrix or group that this model does not have
    ├── ModelError             a model that cannot be found, loaded or used for what was asked
    │   └── WeightError        weights that cannot be decomposed (NaN, inf, quantised, offloaded)
    ├── TaskError              an unknown task, or a data file that cannot be used
    │   └── TokenizationError  an answer or choice whose tokens cannot be told from the prompt's
    ├── ScoringError           scores that cannot be computed or compared
    ├── StoreError             a results database that cannot be opened or written
    │   └── RunBusyError       a run that another live process is working on
    ├── AnalysisError          a study that cannot be made of what is there
    ├── ReportError            a report, leaderboard or submission that cannot be made of what is there
    ├── ExportError            a model that cannot be saved, checked or made again
    └── MissingExtraError      an optional package that is not installed

Every message says what failed, the value received, what is allowed and the next step.
"""

__all__ = [
    "AnalysisError",
    "ExportError",
    "LaserError",
    "MatrixError",
    "MissingExtraError",
    "ModelError",
    "ReportError",
    "RunBusyError",
    "ScoringError",
    "SpecError",
    "StoreError",
    "TaskError",
    "TokenizationError",
    "WeightError",
]


class LaserError(Exception):
    """Stand at the root of all errors that laserlm raises on purpose."""


class SpecError(LaserError, ValueError):
    """Report text of a reduction, intervention or grid that cannot be read."""


class MatrixError(LaserError, LookupError):
    """Report a layer, matrix or group that the model does not have."""


class ModelError(LaserError):
    """Report a model that cannot be found, loaded or used for what was asked."""


class WeightError(ModelError):
    """Report a weight that cannot be decomposed or replaced."""


class TaskError(LaserError):
    """Report an unknown task or a data file that cannot be used."""


class TokenizationError(TaskError):
    """Report an answer whose tokens cannot be told from those of its prompt."""


class ScoringError(LaserError):
    """Report scores that cannot be computed or compared."""


class StoreError(LaserError):
    """Report a results database that cannot be opened, migrated or written."""


class RunBusyError(StoreError):
    """Report a run that another live process is working on."""


class MissingExtraError(LaserError, ImportError):
    """Report an optional package that is not installed, and the command that installs it."""


class ExportError(LaserError):
    """Report a model that cannot be saved, or a saved one that is not what its record says."""


class AnalysisError(LaserError):
    """Report a study that cannot be made of what is there."""


class ReportError(LaserError):
    """Report a page, a leaderboard or a submission that cannot be made of what is there."""
