"""One prompt through three versions of a model: unchanged, reduced, and with only what the reduction takes away."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from laserlm.edit import applied
from laserlm.edit.apply import removed_part
from laserlm.errors import ReportError, ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.generation import generate, generate_for
from laserlm.tasks import Decoding, Example
from laserlm.web.batched_variants import CannotBatchError, run_variants

__all__ = ["LONGEST_PROMPT", "MOST_TOKENS", "Playground", "Variant", "answer"]

MOST_TOKENS = 64
"""Tokens of a continuation: one user's question holds up all others."""
LONGEST_PROMPT = 4000
"""Characters of a prompt, for the same reason."""
LIKELIEST = 5
KEPT = 256
"""Answers that are remembered; each takes a few kilobytes."""
SMALL = 2**30
"""Bytes of weights that a single core reads in about a tenth of a second."""
SHORT = 500
"""Characters of a prompt whose tokens take no longer to compute than the weights take to be read."""


@dataclass(frozen=True)
class Variant:
    """What one version of a model makes of a prompt.

    Args:
        intervention: canonical text of what was changed, empty for the unchanged model.
        text: how it goes on, greedily; of a masked model, what it fills in.
        top: the likeliest first tokens with their probabilities, the likeliest first.
    """

    intervention: str
    text: str
    top: tuple[tuple[str, float], ...]


Sides = tuple[Variant, ...]


class Playground:
    """Answer prompts by one model, for several users at once.

    Weights are changed in place for a moment, so that one question is answered at a time and nothing is left changed for
    the next: no user meets the reduction of another. Answers are remembered.

    Args:
        lm: the unchanged model; nobody else may use it meanwhile.

    Raises:
        ModelError: if the model has no head or no tokenizer.
    """

    def __init__(self, lm: LanguageModel) -> None:
        lm.need_tokenizer()
        self.lm = lm
        self._lock = Lock()
        self._known: OrderedDict[tuple[str, str, int], Sides] = OrderedDict()

    def answer(self, prompt: str, intervention: str, tokens: int) -> Sides:
        """Return what ``answer`` does, by one user after another.

        Raises:
            ReportError: if the prompt or the number of tokens is too large here, or there is none; or no reduction.
            LaserError: as ``answer``.
        """
        if not prompt or len(prompt) > LONGEST_PROMPT:
            raise ReportError(f"a prompt of {len(prompt)} characters cannot be answered here; write 1 to {LONGEST_PROMPT}")
        if not 1 <= tokens <= MOST_TOKENS:
            raise ReportError(f"cannot go on by {tokens} tokens here; ask for 1 to {MOST_TOKENS}")
        wanted = str(Intervention.parse(intervention))
        if not wanted:
            raise ReportError("no reduction to set beside the unchanged model; write one such as 3.fc_in@0.1")
        key = (prompt, wanted, tokens)
        with self._lock:
            if key not in self._known:
                self._known[key] = answer(self.lm, *key)
                if len(self._known) > KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return self._known[key]


def answer(lm: LanguageModel, prompt: str, intervention: str, tokens: int) -> Sides:
    """Return what the unchanged model makes of a prompt, the reduced one, and one with only what was taken away.

    The three are run together where the model can be, which moves low bits.

    Args:
        lm: the unchanged model.
        prompt: some text; of a masked model, with its mask token, or the mask comes after it.
        intervention: text of a reduction, or of several joined by ``+``.
        tokens: new tokens at most; of a masked model, masks filled in at once.

    Raises:
        SpecError: if the intervention cannot be read.
        MatrixError: if it names a matrix that the model does not have.
        ScoringError: if the prompt is longer than the model takes, or the model overflows its dtype.
    """
    versions = ["", str(Intervention.parse(intervention)), str(removed_part(lm.matrices, intervention))]
    with _threads(lm, prompt):
        try:
            with run_variants(lm, versions), _first_logits(lm) as passes:
                texts = _texts(lm, [prompt] * len(versions), tokens)
            firsts = list(_first(lm, passes))
        except CannotBatchError:
            texts, firsts = [], []
            for version in versions:
                with applied(lm, version), _first_logits(lm) as passes:
                    texts += _texts(lm, [prompt], tokens)
                firsts += _first(lm, passes)
    return tuple(_side(lm, *of) for of in zip(versions, texts, firsts, strict=True))


@contextmanager
def _threads(lm: LanguageModel, prompt: str) -> Iterator[None]:
    """Compute on one core what one core does in time, until the end of the context.

    Several threads wait for each other after every product. On a machine that does something else too, such as a search,
    that takes many times as long as the products.
    """
    before = torch.get_num_threads()
    small = lm.device.type == "cpu" and lm.model.get_memory_footprint() <= SMALL and len(prompt) <= SHORT
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _texts(lm: LanguageModel, prompts: Sequence[str], tokens: int) -> list[str]:
    if lm.kind != "masked":
        return generate(lm, prompts, max_new_tokens=tokens)
    examples = [Example(str(i), prompt, "") for i, prompt in enumerate(prompts)]
    return [text for (text,) in generate_for(lm, examples, Decoding(masks=tokens))]


@contextmanager
def _first_logits(lm: LanguageModel) -> Iterator[list[Tensor]]:
    """Yield a list that gets the logits (B, V) of the next tokens, pass by pass; of a masked model, of its first masks.

    They are read off while the model writes, for a pass of their own would take as long as another token.
    """
    found: list[Tensor] = []

    def read(_module: Any, _args: Any, given: dict[str, Any], output: Any) -> None:
        place = -1
        if lm.kind == "masked":
            place = int((given["input_ids"][0] == lm.need_tokenizer().mask_token_id).nonzero()[0])
        found.append(output.logits[:, place])

    handle = lm.model.register_forward_hook(read, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def _first(lm: LanguageModel, passes: Sequence[Tensor]) -> Tensor:
    """Return the logits (B, V) of the first tokens that were chosen."""
    if lm.kind != "encoder-decoder":
        return passes[0]
    settings: Any = lm.model.generation_config
    # A decoder that is made to begin with a certain token chooses its first one in the second pass.
    forced = settings is not None and settings.forced_bos_token_id is not None
    return passes[min(int(forced), len(passes) - 1)]


def _side(lm: LanguageModel, intervention: str, text: str, logits: Tensor) -> Variant:
    probabilities = logits.float().softmax(-1)  # (V,)
    if not bool(probabilities.isfinite().all()):
        raise ScoringError(
            f"{intervention or 'the unchanged model'} gives probabilities that are not numbers; the model overflows its "
            "dtype: load it with dtype float32 or bfloat16"
        )
    best = probabilities.topk(min(LIKELIEST, len(probabilities)))
    tokenizer = lm.need_tokenizer()
    top = [(str(tokenizer.decode([t])), p) for t, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return Variant(intervention, text, tuple(top))
