"""Generate text: greedy continuations of prompts, samples, and the fillings of masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import TextStreamer

from laserlm.edit.apply import default_cache
from laserlm.errors import ScoringError, TokenizationError
from laserlm.linalg.decomposition import seeded
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.chat import ChatTemplate, without_thoughts
from laserlm.scoring.forward import Progress
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.memory import halve_until_it_fits
from laserlm.scoring.model_errors import as_scoring_error, finite_logits
from laserlm.scoring.tokenize import check_known, masked_text, max_length, prefix_tokens, with_prefix
from laserlm.tasks.example import Decoding, Example

STOP_LOOKBACK_TOKENS = 16
"""Number of last tokens that are searched for a stop string."""


@torch.no_grad()
def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 20,
    stops: Sequence[str] = (),
    temperature: float | None = None,
    end_tokens: Sequence[int] = (),
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Return the continuation of each prompt without the prompt; for an encoder-decoder, the decoder's text.

    Args:
        lm: the model, with the intervention that is applied at the moment.
        prompts: continued in one batch, padded on the left (for an encoder-decoder, on the right).
        max_new_tokens: largest number of new tokens, at least 1.
        stops: stop strings. A continuation is cut before the first one.
        temperature: sampling temperature. None decodes greedily.
        end_tokens: tokens that end a text, in addition to the model's own.
        on_text: is called with each piece of the text of a single prompt as it is generated.

    Raises:
        ScoringError: if the model is a masked one, which does not generate, a text grows longer than the model allows, or
            logits are not finite.
        TokenizationError: if the model has no embedding for a token.
        ModelError: if the model has no head or no tokenizer.
    """
    tokenizer = lm.require_tokenizer()
    lm.require_evaluation_mode()
    model: Any = lm.model
    if lm.kind == "masked":
        raise ScoringError(f"{lm.name} is a masked model and does not generate. Score it with 'laser evaluate'.")
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise ScoringError(
            f"nothing to generate from {list(prompts)!r} with {max_new_tokens} new tokens. Write a prompt, and 1 token or more."
        )
    if lm.kind == "encoder-decoder":
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)
    else:
        inputs = tokenizer.pad({"input_ids": _tokens(lm, prompts)}, return_tensors="pt", padding_side="left")
    check_known(lm, inputs["input_ids"].flatten().tolist(), "a prompt")
    tokens = inputs["input_ids"].shape[1] + (max_new_tokens if lm.kind == "causal" else 0)
    if tokens > max_length(lm):
        raise ScoringError(
            f"prompt and new tokens are {tokens} tokens, and {lm.name} takes {max_length(lm)}. Ask for fewer new tokens."
        )
    start = 0 if lm.kind == "encoder-decoder" else inputs["input_ids"].shape[1]
    # Plain decoding, whatever the checkpoint's own generation settings are.
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if end_tokens:
        own = model.generation_config.eos_token_id
        sampling["eos_token_id"] = sorted({*(own if isinstance(own, list) else [own] if own is not None else []), *end_tokens})
    with fast_cpu_kernels(lm.device, tokens), as_scoring_error(lm):
        outputs = model.generate(
            **inputs.to(lm.device),
            **sampling,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_new_tokens=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=finite_logits(lm),
            stopping_criteria=StoppingCriteriaList([_StopStrings(tokenizer, stops, start)] if stops else []),
            streamer=None if on_text is None else _Streamer(tokenizer, on_text),
        )
    texts = [continuation(tokenizer, row[:start], row) for row in outputs.tolist()]
    return [text[: min([len(text), *(text.index(s) for s in stops if s in text)])] for text in texts]


def room_for_new_tokens(lm: LanguageModel, prompt: str) -> int:
    """Return how many tokens a causal model can write after a prompt; 0 or less where the prompt leaves no room."""
    return max_length(lm) - len(_tokens(lm, [prompt])[0])


def continuation(tokenizer: Any, prompt_ids: list[int], ids: list[int]) -> str:
    """Return the text of the tokens after a prompt's. Decoded by themselves, they may lose a space at their start."""
    prompt, text = (str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in (prompt_ids, ids))
    if text.startswith(prompt):
        return text[len(prompt) :]
    return str(tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True))


class _Streamer(TextStreamer):
    """Passes the text on that follows the prompt, as soon as no later token can change it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


class _StopStrings(StoppingCriteria):
    """Ends a sequence when a stop string occurs in its new tokens."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int) -> None:
        self.tokenizer = tokenizer
        self.stops = stops
        self.start = start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, max(self.start, input_ids.shape[1] - STOP_LOOKBACK_TOKENS) :])
        return torch.tensor([any(s in text for s in self.stops) for text in texts], device=input_ids.device)


@torch.no_grad()
def generate_for(
    lm: LanguageModel,
    examples: Sequence[Example],
    decoding: Decoding,
    batch_size: int = 32,
    on_progress: Progress | None = None,
) -> list[list[str]]:
    """Return the generations for each example: ``decoding.samples`` texts, in the order of the examples.

    A masked model fills several masks at once. Prompts are batched by length, and a batch that does not fit is halved. If
    padding changes a model's scores, a batch has prompts of one length. New tokens are as many as the model has room for.

    Raises:
        ScoringError: if a prompt leaves no room for a new token.
        TokenizationError: if a masked model's tokenizer has no mask token.
        torch.OutOfMemoryError: if a single prompt does not fit into memory.
    """
    tokenizer = lm.require_tokenizer()
    is_masked = lm.kind == "masked"
    if is_masked and tokenizer.mask_token is None:
        raise TokenizationError(f"the tokenizer of {lm.name} has no mask token, which scoring a masked model needs")
    template = ChatTemplate(lm)
    chats = [template.prompt(e) for e in examples]
    prompts = [
        masked_text(tokenizer, e, decoding.masks) if is_masked else e.prompt if chat is None else chat
        for e, chat in zip(examples, chats, strict=True)
    ]
    end_tokens = template.end_tokens if any(chat is not None for chat in chats) else ()
    lengths = [len(ids) for ids in _tokens(lm, prompts)]
    for e, n in zip(examples, lengths, strict=True):
        if n + (lm.kind == "causal") > max_length(lm):
            raise ScoringError(f"example {e.id!r} has {n} tokens, and {lm.name} takes {max_length(lm)}. Shorten the prompt.")
    texts: dict[int, list[str]] = {}

    def run(batch: Sequence[int]) -> None:
        generations = _generate_batch(lm, [prompts[i] for i in batch], lengths[batch[0]], decoding, end_tokens)
        for i, samples in zip(batch, generations, strict=True):
            texts[i] = samples if chats[i] is None else [without_thoughts(text) for text in samples]
        if on_progress is not None:
            on_progress(len(texts), len(examples))

    halve_until_it_fits(_prompt_batches(lm, lengths, decoding, batch_size), run, default_cache(lm.cache).clear)
    return [texts[i] for i in range(len(examples))]


def _prompt_batches(lm: LanguageModel, lengths: Sequence[int], decoding: Decoding, batch_size: int) -> list[list[int]]:
    """Return the indices of prompts in batches, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if lm.kind != "causal":
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def batch_key(i: int) -> tuple[int, int]:
        # A prompt that leaves little room has its own batch, for it would take the room from the others.
        has_room = lengths[i] + decoding.new_tokens <= max_length(lm)
        return -1 if has_room else i, lengths[i] if lm.pads_exactly is False else 0

    groups = [list(group) for _, group in groupby(order, key=batch_key)]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def _tokens(lm: LanguageModel, prompts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of the prompts, with those that start a text, once."""
    tokenizer = lm.require_tokenizer()
    if lm.kind != "causal":
        return [list(ids) for ids in tokenizer(list(prompts)).input_ids]
    # Without the tokens that end a text, after which a model would start another one.
    prefix = prefix_tokens(tokenizer)
    return [with_prefix(prefix, ids) for ids in tokenizer(list(prompts), add_special_tokens=False).input_ids]


def _generate_batch(
    lm: LanguageModel, prompts: Sequence[str], length: int, decoding: Decoding, end_tokens: Sequence[int]
) -> list[list[str]]:
    if lm.kind == "masked":
        return [[text] for text in _fill_masks(lm, prompts)]
    room = max_length(lm) - length if lm.kind == "causal" else max_length(lm)
    new_tokens = min(decoding.new_tokens, room)
    more: dict[str, Any] = {"max_new_tokens": new_tokens, "stops": decoding.stops, "end_tokens": end_tokens}
    if decoding.samples == 1:
        return [[text] for text in generate(lm, prompts, **more)]
    with seeded(decoding.seed):
        samples = [generate(lm, prompts, temperature=decoding.temperature, **more) for _ in range(decoding.samples)]
    return [list(of_prompt) for of_prompt in zip(*samples, strict=True)]


def _fill_masks(lm: LanguageModel, prompts: Sequence[str]) -> list[str]:
    """Return the fillings of each prompt's masks, all filled at once."""
    tokenizer = lm.require_tokenizer()
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="right").to(lm.device)
    best = lm.model(**inputs).logits.argmax(-1)  # (B, T)
    masks = inputs["input_ids"] == tokenizer.mask_token_id
    return [str(tokenizer.decode(tokens[mask], skip_special_tokens=True)) for tokens, mask in zip(best, masks, strict=True)]
