"""What a model writes: greedy continuations of prompts, samples, and what a masked model fills in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from laserlm.errors import ScoringError, TokenizationError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.forward import Progress
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.tokenize import masked_text, max_length, prefix_tokens
from laserlm.tasks.example import Decoding, Example

__all__ = ["continuation", "generate", "generate_for"]

SEEN = 16
"""Last tokens in which a text that ends the generation is looked for."""


@torch.no_grad()
def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 20,
    stops: Sequence[str] = (),
    temperature: float | None = None,
) -> list[str]:
    """Return the continuation of each prompt (for an encoder-decoder, the decoder's text), prompt left out.

    Args:
        lm: the model, under whatever intervention is applied at the moment.
        prompts: continued in one batch, padded on the left (for an encoder-decoder, on the right).
        max_new_tokens: at most so many tokens, one at least.
        stops: texts before which a continuation ends.
        temperature: of sampling with torch's random numbers; None decodes greedily.

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
    if lm.kind == "encoder-decoder":
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
    else:  # without what a tokenizer puts at the end of a text, after which a model would write another one
        prefix = prefix_tokens(tokenizer)
        ids = [prefix + list(of) for of in tokenizer(list(prompts), add_special_tokens=False).input_ids]
        inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="left")
    tokens = inputs["input_ids"].shape[1] + (max_new_tokens if lm.kind == "causal" else 0)
    if tokens > max_length(lm):
        raise ScoringError(
            f"{tokens} tokens with the new ones are more than the {max_length(lm)} that {lm.name} takes; ask for fewer"
        )
    start = 0 if lm.kind == "encoder-decoder" else inputs["input_ids"].shape[1]
    # Plain decoding, whatever the checkpoint's own generation settings are.
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with fast_cpu_kernels(lm.device, tokens):
        made = model.generate(
            **inputs.to(lm.device),
            **sampling,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_new_tokens=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([_Stops(tokenizer, stops, start)] if stops else []),
        )
    texts = [continuation(tokenizer, row[:start], row) for row in made.tolist()]
    return [text[: min([len(text), *(text.index(s) for s in stops if s in text)])] for text in texts]


def continuation(tokenizer: Any, before: list[int], whole: list[int]) -> str:
    """Return the text of what follows some tokens; decoded by itself it may lose a space at its start."""
    first, both = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (before, whole))
    if both.startswith(first):
        return both[len(first) :]
    return str(tokenizer.decode(whole[len(before) :], skip_special_tokens=True))


class _Stops(StoppingCriteria):
    """Ends a sequence when one of some texts occurs in its new tokens."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, max(self.start, input_ids.shape[1] - SEEN) :])
        return torch.tensor([any(s in text for s in self.stops) for text in texts], device=input_ids.device)


@torch.no_grad()
def generate_for(
    lm: LanguageModel,
    examples: Sequence[Example],
    decoding: Decoding,
    batch_size: int = 32,
    on_progress: Progress | None = None,
) -> list[list[str]]:
    """Return what the model writes for each example: ``decoding.samples`` texts, in the order of the examples.

    A masked model fills some masks at once. Prompts are batched by length; a batch that does not fit is halved. Where a
    model takes no padding, prompts of one length go together. New tokens are as many as the model has room for.

    Raises:
        ScoringError: if a prompt leaves no room for a new token.
        TokenizationError: if a masked model's tokenizer has no mask token.
        torch.OutOfMemoryError: if a single prompt does not fit into memory.
    """
    tokenizer = lm.need_tokenizer()
    masked = lm.kind == "masked"
    if masked and tokenizer.mask_token is None:
        raise TokenizationError(f"the tokenizer of {lm.name} has no mask token, which scoring a masked model needs")
    prompts = [masked_text(tokenizer, e, decoding.masks) if masked else e.prompt for e in examples]
    lengths = [len(ids) for ids in tokenizer(prompts).input_ids]
    for e, n in zip(examples, lengths, strict=True):
        if n + (lm.kind == "causal") > max_length(lm):
            raise ScoringError(f"example {e.id!r} has {n} tokens; {lm.name} takes {max_length(lm)}: shorten the prompt")
    order = sorted(range(len(examples)), key=lambda i: (-lengths[i], i))
    apart = lm.kind == "causal" and lm.pads_exactly is False
    # Prompts that leave little room are continued one by one, for they would take it from the others.
    full = [lm.kind == "causal" and n + decoding.new_tokens > max_length(lm) for n in lengths]
    groups = [list(same) for _, same in groupby(order, key=lambda i: (i if full[i] else -1, lengths[i] if apart else 0))]
    pending = [same[i : i + batch_size] for same in groups for i in range(0, len(same), batch_size)][::-1]
    texts: dict[int, list[str]] = {}
    while pending:
        batch = pending.pop()
        halved = False
        try:
            texts.update(zip(batch, _written(lm, [prompts[i] for i in batch], lengths[batch[0]], decoding), strict=True))
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            halved = True
        if halved:  # outside the handler, whose traceback holds the failed pass's tensors
            torch.cuda.empty_cache()
            half = len(batch) // 2
            pending += [batch[half:], batch[:half]]
            continue
        if on_progress is not None:
            on_progress(len(texts), len(examples))
    return [texts[i] for i in range(len(examples))]


def _written(lm: LanguageModel, prompts: Sequence[str], length: int, decoding: Decoding) -> list[list[str]]:
    if lm.kind == "masked":
        return [[text] for text in _filled(lm, prompts)]
    room = max_length(lm) - length if lm.kind == "causal" else max_length(lm)
    given: dict[str, Any] = {"max_new_tokens": min(decoding.new_tokens, room), "stops": decoding.stops}
    if decoding.samples == 1:
        return [[text] for text in generate(lm, prompts, **given)]
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(decoding.seed)
        samples = [generate(lm, prompts, temperature=decoding.temperature, **given) for _ in range(decoding.samples)]
    return [list(of) for of in zip(*samples, strict=True)]


def _filled(lm: LanguageModel, prompts: Sequence[str]) -> list[str]:
    """Return what a masked model fills in at all masks of each prompt at once."""
    tokenizer = lm.need_tokenizer()
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="right").to(lm.device)
    best = lm.model(**inputs).logits.argmax(-1)  # (B, T)
    masks = inputs["input_ids"] == tokenizer.mask_token_id
    return [str(tokenizer.decode(tokens[mask], skip_special_tokens=True)) for tokens, mask in zip(best, masks, strict=True)]
