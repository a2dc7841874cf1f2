"""Turn examples into the token sequences that a model is run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from laserlm.errors import ScoringError, TokenizationError
from laserlm.models.language_model import LanguageModel
from laserlm.tasks.example import Example, Scorer

__all__ = [
    "TokenSequence",
    "answer_row",
    "decoder_start",
    "encode",
    "masked_text",
    "max_length",
    "prefix_tokens",
    "start_token",
]

WINDOW = 1024
"""Tokens of a window of a text whose perplexity is measured."""
STRIDE = 512
"""Tokens scored in a window (arXiv 2312.13558); those before them are read only."""
PASSAGE = 50
"""Tokens of a passage that a masked model reads (arXiv 2312.13558)."""


@dataclass(frozen=True)
class TokenSequence:
    """One sequence to run and what is read off it.

    Args:
        example: index of the example it belongs to.
        ids: input tokens, in full; for an encoder-decoder those of the encoder.
        targets: the answer's tokens, whose log-probabilities are read.
        places: positions in ``ids`` (in ``decoder`` for an encoder-decoder) whose logits predict the targets.
        decoder: the decoder's input tokens, empty for other kinds.
        options: tokens whose log-probabilities are read at the first place: all choices, where each is one token.
        ranked: whether the ranks of the targets are read too.
        top: number of likeliest tokens that are read at the first place.
    """

    example: int
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    places: tuple[int, ...]
    decoder: tuple[int, ...] = ()
    options: tuple[int, ...] = ()
    ranked: bool = False
    top: int = 0


def encode(lm: LanguageModel, examples: Sequence[Example], scorer: Scorer) -> list[TokenSequence]:
    """Return the rows of all examples, in order: one each, or several.

    There are several for an example with pairs, with choices of several tokens, or with a text longer than a window.
    An answer's tokens are what it adds to the tokens of the prompt. Of a program and of a text whose perplexity is
    measured they are the tokens that it has by itself.

    Raises:
        TokenizationError: if a token spans the end of the prompt and the start of the answer, an answer has no tokens,
            or the tokenizer has no mask token where one is needed.
        ScoringError: if a sequence is longer than the model takes, or an example lacks what the scorer needs.
    """
    tokenizer = lm.need_tokenizer()
    for e in examples:
        _check(lm, e, scorer)
    split = _split_tokens(lm, tokenizer, [(i, e, *pair) for i, e in enumerate(examples) for pair in _pairs(e, scorer)], scorer)
    prefix = prefix_tokens(tokenizer)
    # A masked prompt has one mask in the published scoring, however many tokens the answer has.
    first_only = scorer in ("first_token", "top5", "top10") or (lm.kind == "masked" and scorer == "next_token")
    make = {"causal": _causal, "masked": _masked, "encoder-decoder": _encoder_decoder}[lm.kind]
    limit = max_length(lm)
    rows: list[TokenSequence] = []
    for i, group in groupby(split, key=lambda s: s[0]):
        e = examples[i]
        sides = [(before, targets) for _, before, targets in group]
        answers = [targets for _, targets in sides]
        if scorer == "perplexity":
            rows += _windows(lm, tokenizer, i, prefix, *sides[0], limit)
        elif scorer == "choice" and all(len(a) == 1 for a in answers):
            options = tuple(a[0] for a in answers)
            if len(set(options)) < len(options):
                raise TokenizationError(f"example {e.id!r}: two of its choices {e.choices} are the same token; reword them")
            before = prefix + sides[0][0]
            rows.append(make(lm, tokenizer, i, e, before, answers[e.choices.index(e.answer)], options))
        else:
            rows += [make(lm, tokenizer, i, e, prefix + b, a[:1] if first_only else a, ()) for b, a in sides]
    if scorer in ("top5", "top10"):
        rows = [replace(row, ranked=True) for row in rows]
    if scorer == "lm_eval":  # the harness reads the end of what is too long
        rows = [_shortened(row, limit) for row in rows]
    for row in rows:
        if len(row.ids) > limit:
            raise ScoringError(
                f"example {examples[row.example].id!r} has {len(row.ids)} tokens; {lm.name} takes {limit}: shorten the prompt"
            )
    return rows


def answer_row(e: Example, scorer: Scorer) -> int:
    """Return which of an example's rows is its answer's, where each row is another one's."""
    return e.choices.index(e.answer) if scorer == "choice" else e.right if scorer == "lm_eval" else 0


def masked_text(tokenizer: Any, e: Example, masks: int = 1) -> str:
    """Return what a masked model is given, with so many masks side by side."""
    mask = " ".join([tokenizer.mask_token] * masks)
    if e.masked:
        tokens = tokenizer(e.passage, add_special_tokens=False).input_ids[-PASSAGE:] if e.passage else []
        return e.masked.replace("{passage}", tokenizer.decode(tokens, skip_special_tokens=True).strip()).replace("{mask}", mask)
    return e.prompt.replace(tokenizer.mask_token, mask) if tokenizer.mask_token in e.prompt else f"{e.prompt} {mask}."


def start_token(tokenizer: Any) -> list[int]:
    """Return the token that a text without anything before it is read after, where the tokenizer has one."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if token is None else [int(token)]


def _check(lm: LanguageModel, e: Example, scorer: Scorer) -> None:
    """Raise a ScoringError unless the model can be scored on an example in this way."""
    if scorer == "choice" and (len(e.choices) < 2 or e.answer not in e.choices):
        raise ScoringError(
            f"example {e.id!r} cannot be scored by choice: its choices {e.choices} must hold the answer and one more at "
            "least; use another scorer"
        )
    if scorer in ("perplexity", "program", "rollout", "lm_eval", "lm_eval_text") and lm.kind != "causal":
        raise ScoringError(f"{lm.name} is {lm.kind}; {scorer} needs a causal model, which reads from left to right")
    if (scorer == "program" and not e.program) or (scorer == "lm_eval" and not e.pairs):
        raise ScoringError(f"example {e.id!r} has nothing that {scorer} could go by; use another scorer")


def _pairs(e: Example, scorer: Scorer) -> list[tuple[str, str]]:
    """Return the prompts and answers whose tokens are wanted."""
    if e.pairs:
        return list(e.pairs) if scorer == "lm_eval" else [e.pairs[e.right]]
    return [(e.prompt, answer) for answer in (e.choices if scorer == "choice" else (e.answer,))]


Asked = tuple[int, Example, str, str]


def _split_tokens(
    lm: LanguageModel, tokenizer: Any, asked: Sequence[Asked], scorer: Scorer
) -> list[tuple[int, list[int], tuple[int, ...]]]:
    """Return of each pair its example, the tokens of the prompt, special ones left out, and those of the answer."""

    def tokens(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False).input_ids)

    answers = [answer for *_, answer in asked]
    if lm.kind == "encoder-decoder":
        befores: list[list[int]] = [[] for _ in asked]
        wholes = tokens(answers)
    else:
        texts = [_before(tokenizer, lm, e, prompt) for _, e, prompt, _ in asked]
        befores = tokens(texts)
        if scorer in ("perplexity", "program"):
            alone = [_joint(e, text, answer) + answer for text, (_, e, _, answer) in zip(texts, asked, strict=True)]
            wholes = [before + after for before, after in zip(befores, tokens(alone), strict=True)]
        else:
            wholes = tokens(
                [text + _joint(e, text, answer) + answer for text, (_, e, _, answer) in zip(texts, asked, strict=True)]
            )
    for (_, e, _, answer), before, whole in zip(asked, befores, wholes, strict=True):
        if list(whole[: len(before)]) != list(before) and not e.pairs:
            start = next((k for k, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
            raise TokenizationError(
                f"example {e.id!r}: the answer {answer!r} straddles a token boundary; the prompt ends in "
                f"{tokenizer.convert_ids_to_tokens(before[start:])}, with the answer that becomes "
                f"{tokenizer.convert_ids_to_tokens(whole[start:])}: end the prompt on a whole word, without a space"
            )
        if len(whole) <= len(before):
            raise TokenizationError(f"example {e.id!r}: the answer {answer!r} has no tokens")
    return [
        (i, list(whole[: len(before)]), tuple(whole[len(before) :]))
        for (i, *_), before, whole in zip(asked, befores, wholes, strict=True)
    ]


def _joint(e: Example, prompt: str, answer: str) -> str:
    return "" if e.pairs or not prompt or prompt[-1].isspace() or answer[0].isspace() else e.joint


def _before(tokenizer: Any, lm: LanguageModel, e: Example, prompt: str) -> str:
    """Return the text before the answer: all of the prompt, or what stands before a mask."""
    if lm.kind == "masked" and tokenizer.mask_token is not None and (e.masked or tokenizer.mask_token in prompt):
        return masked_text(tokenizer, e).partition(tokenizer.mask_token)[0].rstrip()
    return prompt


def prefix_tokens(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    return next((whole[:i] for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), [])


Tokens = tuple[int, ...]


def _causal(
    lm: LanguageModel, tokenizer: Any, i: int, e: Example, before: list[int], targets: Tokens, options: Tokens
) -> TokenSequence:
    before = before or (start_token(tokenizer) if e.pairs else [])
    if not before:
        raise TokenizationError(f"example {e.id!r} has an empty prompt, and this tokenizer starts a text with no token")
    ids = (*before, *targets[:-1])
    return TokenSequence(i, ids, targets, tuple(range(len(before) - 1, len(ids))), options=options)


def _masked(
    lm: LanguageModel, tokenizer: Any, i: int, e: Example, before: list[int], targets: Tokens, options: Tokens
) -> TokenSequence:
    mask = tokenizer.mask_token
    if mask is None:
        raise TokenizationError(f"the tokenizer of {lm.name} has no mask token, which scoring a masked model needs")
    whole = tokenizer(masked_text(tokenizer, e)).input_ids
    if whole.count(tokenizer.mask_token_id) != 1:
        raise TokenizationError(f"example {e.id!r} holds {whole.count(tokenizer.mask_token_id)} mask tokens; write one at most")
    at = whole.index(tokenizer.mask_token_id)
    ids = (*whole[:at], *[tokenizer.mask_token_id] * len(targets), *whole[at + 1 :])
    return TokenSequence(i, ids, targets, tuple(range(at, at + len(targets))), options=options)


def decoder_start(lm: LanguageModel) -> Tokens:
    """Return the tokens that an encoder-decoder's decoder begins with.

    Raises:
        ScoringError: if its config names none.
    """
    start = lm.model.config.decoder_start_token_id
    if start is None:
        raise ScoringError(f"{lm.name} has no decoder_start_token_id in its config; set it to score an encoder-decoder")
    generation = lm.model.generation_config
    forced = generation.forced_bos_token_id if generation is not None else None  # BART's decoder begins with two tokens
    return (int(start),) if forced is None else (int(start), int(forced))


def _encoder_decoder(
    lm: LanguageModel, tokenizer: Any, i: int, e: Example, before: list[int], targets: Tokens, options: Tokens
) -> TokenSequence:
    starts = decoder_start(lm)
    decoder = (*starts, *targets[:-1])
    places = tuple(range(len(starts) - 1, len(decoder)))
    return TokenSequence(i, tuple(tokenizer(e.prompt).input_ids), targets, places, decoder, options)


def _windows(
    lm: LanguageModel, tokenizer: Any, i: int, prefix: list[int], before: list[int], targets: Tokens, limit: int
) -> list[TokenSequence]:
    """Return the rows of a text: each reads up to ``STRIDE`` of its tokens, after what stands before them in the window."""
    window = min(WINDOW, limit)
    stride = min(STRIDE, window // 2)
    text = (*before, *targets)
    rows: list[TokenSequence] = []
    for at in range(len(before), len(text), stride):
        scored = text[at : at + stride]
        context = list(text[max(0, at - (window - stride - len(prefix))) : at])
        start = prefix + context or start_token(tokenizer)
        if not start:
            raise TokenizationError(f"{lm.name} has no token that a text begins with; perplexity needs one to score the first")
        ids = (*start, *scored[:-1])
        rows.append(TokenSequence(i, ids, scored, tuple(range(len(start) - 1, len(ids)))))
    return rows


def _shortened(row: TokenSequence, limit: int) -> TokenSequence:
    """Return a row without what is more than a model takes, on the left."""
    cut = len(row.ids) - limit
    return row if cut <= 0 else replace(row, ids=row.ids[cut:], places=tuple(p - cut for p in row.places))


def max_length(lm: LanguageModel) -> int:
    """Return the number of tokens that the model takes at most."""
    tokenizer = lm.need_tokenizer()
    positions = getattr(lm.model.config, "max_position_embeddings", None)
    return min(int(positions or tokenizer.model_max_length), int(tokenizer.model_max_length))
