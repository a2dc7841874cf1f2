"""Greedy continuations of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from laserlm.errors import ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.encoding import longest

__all__ = ["generate"]


@torch.no_grad()
def generate(lm: LanguageModel, prompts: Sequence[str], *, max_new_tokens: int = 20) -> list[str]:
    """Return the greedy continuation of each prompt (for an encoder-decoder, the decoder's text), prompt left out.

    Args:
        lm: the model, under whatever intervention is applied at the moment.
        prompts: continued in one batch, padded on the left (for an encoder-decoder, on the right).
        max_new_tokens: at most so many tokens, one at least.

    Raises:
        ScoringError: if the model is a masked one, which does not generate, or a text grows longer than it takes.
        ModelError: if the model has no head or no tokenizer.
    """
    tokenizer = lm.need_tokenizer()
    model: Any = lm.model
    if lm.kind == "masked":
        raise ScoringError(f"{lm.name} is a masked model and does not generate; score it with 'laser evaluate'")
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise ScoringError(
            f"nothing to generate from {list(prompts)!r} with {max_new_tokens} new tokens; write a prompt, and 1 or more"
        )
    side = "right" if lm.kind == "encoder-decoder" else "left"
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side=side, return_token_type_ids=False)
    tokens = inputs["input_ids"].shape[1] + (max_new_tokens if lm.kind == "causal" else 0)
    if tokens > longest(lm):
        raise ScoringError(
            f"{tokens} tokens with the new ones are more than the {longest(lm)} that {lm.name} takes; ask for fewer"
        )
    made = model.generate(
        **inputs.to(lm.device),
        # Plain greedy decoding, whatever the checkpoint's own generation settings are.
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    start = 0 if lm.kind == "encoder-decoder" else inputs["input_ids"].shape[1]
    return [str(text) for text in tokenizer.batch_decode(made[:, start:], skip_special_tokens=True)]
