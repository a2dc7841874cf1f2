"""Turn the errors of a model that computes nothing from tokens alone into an error that says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from laserlm.errors import LaserError, ScoringError
from laserlm.models.language_model import LanguageModel


@contextmanager
def as_scoring_error(lm: LanguageModel) -> Iterator[None]:
    """Turn what a model raises in a forward pass into a ScoringError, except errors of laserlm and RuntimeErrors."""
    try:
        yield
    except LaserError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ScoringError(
            f"{lm.name} ({type(lm.model).__name__}) cannot be scored on text, as laserlm scores every model: its forward pass "
            f"ends with {type(error).__name__}: {reason}. If it needs images or sound, reduce its matrices without a score: "
            "laser save MODEL --reduce REDUCTION"
        ) from error
