"""Turn examples into the token sequences that a model is run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laserlm.errors import ScoringError, TokenizationError
from laserlm.models.language_model import LanguageModel
from laserlm.tasks.example import Example, Scorer

__all__ = ["Row", "encode", "longest"]


@dataclass(frozen=True)
class Row:
    """One sequence to run and what is read off it.

    Args:
        example: index of the example it belongs to.
        ids: input tokens, in full; for an encoder-decoder those of the encoder.
        targets: the answer's tokens, whose log-probabilities are read.
        places: positions in ``ids`` (in ``decoder`` for an encoder-decoder) whose logits predict the targets.
        decoder: the decoder's input tokens, empty for other kinds.
        options: tokens whose log-probabilities are read at the first place: all choices, where each is one token.
    """

    example: int
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    places: tuple[int, ...]
    decoder: tuple[int, ...] = ()
    options: tuple[int, ...] = ()


def encode(lm: LanguageModel, examples: Sequence[Example], scorer: Scorer) -> list[Row]:
    """Return the rows of all examples, in order: one each, or one for each choice where choices have several tokens.

    An answer's tokens are what it adds to the tokens of the prompt.

    Raises:
        TokenizationError: if a token spans the end of the prompt and the start of the answer, an answer has no tokens,
            or the tokenizer has no mask token where one is needed.
        ScoringError: if a sequence is longer than the model takes, or an example has no choices to choose from.
    """
    tokenizer = lm.need_tokenizer()
    if scorer == "choice":
        for e in examples:
            if len(e.choices) < 2 or e.answer not in e.choices:
                raise ScoringError(
                    f"example {e.id!r} cannot be scored by choice: its choices {e.choices} must hold the answer and one more "
                    "at least; use another scorer"
                )
    pairs = [(i, e, answer) for i, e in enumerate(examples) for answer in (e.choices if scorer == "choice" else (e.answer,))]
    prefix = _prefix(tokenizer)
    by_example: dict[int, list[tuple[list[int], tuple[int, ...]]]] = {}
    for (i, _, _), split in zip(pairs, _split_tokens(lm, tokenizer, [(e, answer) for _, e, answer in pairs]), strict=True):
        by_example.setdefault(i, []).append(split)
    # A masked prompt has one mask in the published scoring, however many tokens the answer has.
    first_only = scorer == "first_token" or (lm.kind == "masked" and scorer == "next_token")
    make = {"causal": _causal, "masked": _masked, "encoder-decoder": _encoder_decoder}[lm.kind]
    rows: list[Row] = []
    for i, e in enumerate(examples):
        before = prefix + by_example[i][0][0]
        answers = [targets for _, targets in by_example[i]]
        if scorer == "choice" and all(len(a) == 1 for a in answers):
            options = tuple(a[0] for a in answers)
            if len(set(options)) < len(options):
                raise TokenizationError(f"example {e.id!r}: two of its choices {e.choices} are the same token; reword them")
            rows.append(make(lm, tokenizer, i, e, before, answers[e.choices.index(e.answer)], options))
        else:
            rows += [make(lm, tokenizer, i, e, before, a[:1] if first_only else a, ()) for a in answers]
    limit = longest(lm)
    for row in rows:
        if len(row.ids) > limit:
            raise ScoringError(
                f"example {examples[row.example].id!r} has {len(row.ids)} tokens; {lm.name} takes {limit}: shorten the prompt"
            )
    return rows


def _split_tokens(
    lm: LanguageModel, tokenizer: Any, pairs: Sequence[tuple[Example, str]]
) -> list[tuple[list[int], tuple[int, ...]]]:
    """Return the tokens of each prompt, special ones left out, and those that its answer adds."""
    if lm.kind == "encoder-decoder":
        ids = tokenizer([answer for _, answer in pairs], add_special_tokens=False).input_ids
        befores: list[list[int]] = [[] for _ in pairs]
    else:
        texts = [_before(tokenizer, lm, e.prompt) for e, _ in pairs]
        befores = tokenizer(texts, add_special_tokens=False).input_ids
        wholes = [text + _joint(text, answer) + answer for text, (_, answer) in zip(texts, pairs, strict=True)]
        ids = tokenizer(wholes, add_special_tokens=False).input_ids
    for (e, answer), before, whole in zip(pairs, befores, ids, strict=True):
        if list(whole[: len(before)]) != list(before):
            start = next((k for k, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
            raise TokenizationError(
                f"example {e.id!r}: the answer {answer!r} straddles a token boundary; the prompt ends in "
                f"{tokenizer.convert_ids_to_tokens(before[start:])}, with the answer that becomes "
                f"{tokenizer.convert_ids_to_tokens(whole[start:])}: end the prompt on a whole word, without a space"
            )
        if len(whole) == len(before):
            raise TokenizationError(f"example {e.id!r}: the answer {answer!r} has no tokens")
    return [(list(before), tuple(whole[len(before) :])) for before, whole in zip(befores, ids, strict=True)]


def _joint(prompt: str, answer: str) -> str:
    return "" if not prompt or prompt[-1].isspace() or answer[0].isspace() else " "


def _before(tokenizer: Any, lm: LanguageModel, prompt: str) -> str:
    """Return the text before the answer: all of the prompt, or what stands before its own mask."""
    if lm.kind == "masked" and tokenizer.mask_token is not None:
        return prompt.partition(tokenizer.mask_token)[0].rstrip() if tokenizer.mask_token in prompt else prompt
    return prompt


def _prefix(tokenizer: Any) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    return next((whole[:i] for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), [])


Tokens = tuple[int, ...]


def _causal(lm: LanguageModel, tokenizer: Any, i: int, e: Example, before: list[int], targets: Tokens, options: Tokens) -> Row:
    if not before:
        raise TokenizationError(f"example {e.id!r} has an empty prompt, and this tokenizer starts a text with no token")
    ids = (*before, *targets[:-1])
    return Row(i, ids, targets, tuple(range(len(before) - 1, len(ids))), options=options)


def _masked(lm: LanguageModel, tokenizer: Any, i: int, e: Example, before: list[int], targets: Tokens, options: Tokens) -> Row:
    mask = tokenizer.mask_token
    if mask is None:
        raise TokenizationError(f"the tokenizer of {lm.name} has no mask token, which scoring a masked model needs")
    whole = tokenizer(e.prompt if mask in e.prompt else f"{e.prompt} {mask}.").input_ids
    if whole.count(tokenizer.mask_token_id) != 1:
        raise TokenizationError(f"example {e.id!r} holds {whole.count(tokenizer.mask_token_id)} mask tokens; write one at most")
    at = whole.index(tokenizer.mask_token_id)
    ids = (*whole[:at], *[tokenizer.mask_token_id] * len(targets), *whole[at + 1 :])
    return Row(i, ids, targets, tuple(range(at, at + len(targets))), options=options)


def _encoder_decoder(
    lm: LanguageModel, tokenizer: Any, i: int, e: Example, before: list[int], targets: Tokens, options: Tokens
) -> Row:
    start = lm.model.config.decoder_start_token_id
    if start is None:
        raise ScoringError(f"{lm.name} has no decoder_start_token_id in its config; set it to score an encoder-decoder")
    generation = lm.model.generation_config
    forced = generation.forced_bos_token_id if generation is not None else None  # BART's decoder begins with two tokens
    starts = (int(start),) if forced is None else (int(start), int(forced))
    decoder = (*starts, *targets[:-1])
    places = tuple(range(len(starts) - 1, len(decoder)))
    return Row(i, tuple(tokenizer(e.prompt).input_ids), targets, places, decoder, options)


def longest(lm: LanguageModel) -> int:
    """Return the number of tokens that the model takes at most."""
    tokenizer = lm.need_tokenizer()
    positions = getattr(lm.model.config, "max_position_embeddings", None)
    return min(int(positions or tokenizer.model_max_length), int(tokenizer.model_max_length))
