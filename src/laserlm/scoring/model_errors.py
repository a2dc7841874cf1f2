"""Turn the errors of a model that computes nothing from tokens alone, or no finite number, into an error that says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from laserlm.errors import LaserError, ScoringError
from laserlm.models.finite import overflow
from laserlm.models.language_model import LanguageModel


class _FiniteLogits(LogitsProcessor):
    """Pass logits (B, V) on unless the largest one of a text is NaN or infinite: no next token follows from them."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(scores.amax(-1).isfinite().all()):
            lm, under = self._lm, f" under {self._lm.intervention}" if self._lm.active else ""
            raise ScoringError(
                f"the logits of {lm.name}{under} are not finite, so it writes no text: {overflow(lm.model, lm.dtype)}"
            )
        return scores


def finite_logits(lm: LanguageModel) -> LogitsProcessorList:
    """Return what ``generate`` takes so that it ends with a ScoringError where the logits of a text are not finite."""
    return LogitsProcessorList([_FiniteLogits(lm)])


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
