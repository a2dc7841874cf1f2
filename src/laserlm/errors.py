"""The exceptions of laserlm.

    LaserError                 base class; the command line ends with exit code 1
    ├── SpecError              a reduction, intervention or grid that cannot be parsed
    ├── MatrixError            a layer, matrix or group that the model does not have
    ├── ModelError             a model that cannot be found, loaded or used as requested
    │   └── WeightError        a weight that cannot be decomposed (NaN, inf, quantised, offloaded)
    ├── TaskError              an unknown task, or an invalid data file
    │   └── TokenizationError  an answer whose tokens cannot be separated from the prompt's tokens
    ├── ScoringError           scores that cannot be computed or compared
    ├── StoreError             a results database that cannot be opened or written
    │   └── RunBusyError       a run that another live process is working on
    ├── AnalysisError          a study that lacks the data it needs
    ├── ReportError            a report, leaderboard or submission that cannot be built
    ├── ExportError            a model that cannot be saved, checked or rebuilt
    ├── WriteError             a file or folder that cannot be written; also an OSError
    └── MissingExtraError      an optional package that is not installed

Every message says what failed, the value received, the allowed values and the next step.
"""


class LaserError(Exception):
    """The base class of all errors of laserlm."""


class SpecError(LaserError, ValueError):
    """A reduction, intervention or grid that cannot be parsed."""


class MatrixError(LaserError, LookupError):
    """A layer, matrix or group that the model does not have."""


class ModelError(LaserError):
    """A model that cannot be found, loaded or used as requested."""


class WeightError(ModelError):
    """A weight that cannot be decomposed or replaced."""


class TaskError(LaserError):
    """An unknown task, or an invalid data file."""


class TokenizationError(TaskError):
    """An answer whose tokens cannot be separated from the prompt's tokens."""


class ScoringError(LaserError):
    """Scores that cannot be computed or compared."""


class StoreError(LaserError):
    """A results database that cannot be opened, migrated or written."""


class RunBusyError(StoreError):
    """A run that another live process is working on."""


class MissingExtraError(LaserError, ImportError):
    """An optional package that is not installed; the message gives the command that installs it."""


class ExportError(LaserError):
    """A model that cannot be saved, or a saved model that does not match its record."""


class AnalysisError(LaserError):
    """A study that lacks the data it needs."""


class ReportError(LaserError):
    """A page, leaderboard or submission that cannot be built."""


class WriteError(LaserError, OSError):
    """A file or folder that cannot be written, for example because the disk is full."""
