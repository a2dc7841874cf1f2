"""Turn examples into the token sequences that a model is run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from laserlm.errors import ScoringError, TokenizationError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.scorers import SCORERS, ScorerDefinition
from laserlm.tasks.example import Example, Scorer

__all__ = ["TokenSequence", "decoder_start", "encode", "masked_text", "max_length", "prefix_tokens", "start_token"]

WINDOW_TOKENS = 1024
"""Length of a window of a text whose perplexity is measured."""
STRIDE_TOKENS = 512
"""Number of tokens scored in a window (arXiv 2312.13558). The tokens before them are context."""
PASSAGE_TOKENS = 50
"""Length of a passage that a masked model reads (arXiv 2312.13558)."""

Tokens = tuple[int, ...]


def encode(lm: LanguageModel, examples: Sequence[Example], scorer: Scorer) -> list[TokenSequence]:
    """Return the token sequences of all examples, in order.

    An example has several sequences if it has several requests, choices of several tokens, or a text longer than a window.
    An answer's tokens are those that it adds to the tokens of the prompt. Programs, and texts whose perplexity is measured,
    are tokenised without the prompt.

    Raises:
        TokenizationError: if a token spans the end of the prompt and the start of the answer, if an answer has no tokens,
            or if the tokenizer has no mask token and needs one.
        ScoringError: if a sequence is longer than the model allows, or an example lacks something that the scorer needs.
    """
    definition = SCORERS[scorer]
    tokenizer = lm.require_tokenizer()
    for e in examples:
        _check_example(lm, e, scorer)
    requests = [(i, e, *request) for i, e in enumerate(examples) for request in definition.requests(e)]
    tokens = _split_tokens(lm, tokenizer, requests, apart=definition.tokenizes_apart)
    prefix = prefix_tokens(tokenizer)
    encoder = _Encoder(lm, tokenizer, definition, prefix)
    rows: list[TokenSequence] = []
    for i, group in groupby(tokens, key=lambda request: request[0]):
        rows += encoder.encode(i, examples[i], [(context, targets) for _, context, targets in group])
    limit = max_length(lm)
    for row in rows:
        if len(row.ids) > limit:
            raise ScoringError(
                f"example {examples[row.example].id!r} has {len(row.ids)} tokens, and {lm.name} takes {limit}. Shorten the "
                "prompt."
            )
    return rows


@dataclass(frozen=True)
class _Encoder:
    """Builds the token sequences of one example after another; ``prefix`` is put before each context."""

    lm: LanguageModel
    tokenizer: Any
    scorer: ScorerDefinition
    prefix: list[int]

    def encode(self, i: int, e: Example, requests: Sequence[tuple[list[int], Tokens]]) -> list[TokenSequence]:
        """Return the sequences of the example at index ``i``, given the tokens of its contexts and continuations."""
        if self.scorer.in_windows:
            return self.windows(i, *requests[0])
        answers = [targets for _, targets in requests]
        if self.scorer.is_choice and all(len(a) == 1 for a in answers):
            choice_tokens = tuple(a[0] for a in answers)
            if len(set(choice_tokens)) < len(choice_tokens):
                raise TokenizationError(
                    f"example {e.id!r}: two of its choices {e.choices} are the same token. Write them in other words."
                )
            answer = answers[e.choices.index(e.answer)]
            return [replace(self.sequence(i, e, requests[0][0], answer), choice_tokens=choice_tokens)]
        first_only = self.scorer.scored_tokens == "first" or (
            self.scorer.scored_tokens == "first if masked" and self.lm.kind == "masked"
        )
        rows = [self.sequence(i, e, context, targets[:1] if first_only else targets) for context, targets in requests]
        if self.scorer.reads_ranks:
            rows = [replace(row, ranked=True) for row in rows]
        return [_truncate(row, max_length(self.lm)) for row in rows] if self.scorer.truncates else rows

    def sequence(self, i: int, e: Example, context: list[int], targets: Tokens) -> TokenSequence:
        """Return the sequence for one context and its targets, as the kind of model needs it."""
        if self.lm.kind == "masked":
            return self.masked(i, e, targets)
        if self.lm.kind == "encoder-decoder":
            return self.encoder_decoder(i, e, targets)
        return self.causal(i, e, self.prefix + context, targets)

    def causal(self, i: int, e: Example, context: list[int], targets: Tokens) -> TokenSequence:
        context = context or (start_token(self.tokenizer) if e.pairs else [])
        if not context:
            raise TokenizationError(
                f"example {e.id!r} has an empty prompt, and this tokenizer starts a text with no token. Write a prompt."
            )
        ids = (*context, *targets[:-1])
        return TokenSequence(i, ids, targets, tuple(range(len(context) - 1, len(ids))))

    def masked(self, i: int, e: Example, targets: Tokens) -> TokenSequence:
        if self.tokenizer.mask_token is None:
            raise TokenizationError(f"the tokenizer of {self.lm.name} has no mask token, which scoring a masked model needs")
        mask_id = self.tokenizer.mask_token_id
        ids = self.tokenizer(masked_text(self.tokenizer, e)).input_ids
        if ids.count(mask_id) != 1:
            raise TokenizationError(f"example {e.id!r} has {ids.count(mask_id)} mask tokens; at most one is allowed")
        at = ids.index(mask_id)
        ids = (*ids[:at], *[mask_id] * len(targets), *ids[at + 1 :])
        return TokenSequence(i, ids, targets, tuple(range(at, at + len(targets))))

    def encoder_decoder(self, i: int, e: Example, targets: Tokens) -> TokenSequence:
        start = decoder_start(self.lm)
        decoder = (*start, *targets[:-1])
        positions = tuple(range(len(start) - 1, len(decoder)))
        return TokenSequence(i, tuple(self.tokenizer(e.prompt).input_ids), targets, positions, decoder)

    def windows(self, i: int, context: list[int], targets: Tokens) -> list[TokenSequence]:
        """Return the windows of a text. Each scores up to ``STRIDE_TOKENS`` tokens after the context that fits before them."""
        window = min(WINDOW_TOKENS, max_length(self.lm))
        stride = min(STRIDE_TOKENS, window // 2)
        text = (*context, *targets)
        rows: list[TokenSequence] = []
        for at in range(len(context), len(text), stride):
            scored = text[at : at + stride]
            before = list(text[max(0, at - (window - stride - len(self.prefix))) : at])
            start = self.prefix + before or start_token(self.tokenizer)
            if not start:
                raise TokenizationError(
                    f"the tokenizer of {self.lm.name} has no token that starts a text, which perplexity needs to score the "
                    "first token"
                )
            ids = (*start, *scored[:-1])
            rows.append(TokenSequence(i, ids, scored, tuple(range(len(start) - 1, len(ids)))))
        return rows


def _truncate(row: TokenSequence, limit: int) -> TokenSequence:
    """Return a sequence without the tokens on its left that exceed the limit."""
    cut = len(row.ids) - limit
    return row if cut <= 0 else replace(row, ids=row.ids[cut:], positions=tuple(p - cut for p in row.positions))


def masked_text(tokenizer: Any, e: Example, masks: int = 1) -> str:
    """Return the text for a masked model, with a number of masks side by side."""
    mask = " ".join([tokenizer.mask_token] * masks)
    if e.masked:
        tokens = tokenizer(e.passage, add_special_tokens=False).input_ids[-PASSAGE_TOKENS:] if e.passage else []
        passage = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return e.masked.replace("{passage}", passage).replace("{mask}", mask)
    return e.prompt.replace(tokenizer.mask_token, mask) if tokenizer.mask_token in e.prompt else f"{e.prompt} {mask}."


def start_token(tokenizer: Any) -> list[int]:
    """Return the BOS token (the EOS token if there is no BOS) as a list, or an empty list."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if token is None else [int(token)]


def _check_example(lm: LanguageModel, e: Example, scorer: Scorer) -> None:
    """Raise a ScoringError if a scorer cannot score this model on an example."""
    if problem := SCORERS[scorer].problem(e):
        raise ScoringError(f"example {e.id!r} cannot be scored by {scorer}: {problem}. Use another scorer.")
    if not SCORERS[scorer].is_short_answer and lm.kind != "causal":
        raise ScoringError(f"scorer {scorer} needs a causal model, and {lm.name} is {lm.kind}. Use another scorer.")


def _split_tokens(
    lm: LanguageModel, tokenizer: Any, requests: Sequence[tuple[int, Example, str, str]], *, apart: bool
) -> list[tuple[int, list[int], Tokens]]:
    """Return for each request the index of its example, the context's tokens without special ones, and the answer's."""

    def tokenize(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False).input_ids)

    if lm.kind == "encoder-decoder":
        contexts: list[list[int]] = [[] for _ in requests]
        full = tokenize([answer for *_, answer in requests])
    else:
        texts = [_context(tokenizer, lm, e, prompt) for _, e, prompt, _ in requests]
        answers = [_separator(e, text, answer) + answer for text, (_, e, _, answer) in zip(texts, requests, strict=True)]
        contexts = tokenize(texts)
        if apart:
            full = [context + answer for context, answer in zip(contexts, tokenize(answers), strict=True)]
        else:
            full = tokenize([text + answer for text, answer in zip(texts, answers, strict=True)])
    for (_, e, _, answer), context, tokens in zip(requests, contexts, full, strict=True):
        if list(tokens[: len(context)]) != list(context) and not e.pairs:
            start = next((k for k, (a, b) in enumerate(zip(context, tokens, strict=False)) if a != b), len(tokens))
            raise TokenizationError(
                f"example {e.id!r}: the answer {answer!r} straddles a token boundary. The prompt ends in "
                f"{tokenizer.convert_ids_to_tokens(context[start:])}, and with the answer these tokens are "
                f"{tokenizer.convert_ids_to_tokens(tokens[start:])}. End the prompt on a whole word, without a space."
            )
        if len(tokens) <= len(context):
            raise TokenizationError(f"example {e.id!r}: the answer {answer!r} has no tokens")
    return [
        (i, list(tokens[: len(context)]), tuple(tokens[len(context) :]))
        for (i, *_), context, tokens in zip(requests, contexts, full, strict=True)
    ]


def _separator(e: Example, prompt: str, answer: str) -> str:
    return "" if e.pairs or not prompt or prompt[-1].isspace() or answer[0].isspace() else e.joint


def _context(tokenizer: Any, lm: LanguageModel, e: Example, prompt: str) -> str:
    """Return the text before the answer: the prompt, or the part of it before a mask."""
    if lm.kind == "masked" and tokenizer.mask_token is not None and (e.masked or tokenizer.mask_token in prompt):
        return masked_text(tokenizer, e).partition(tokenizer.mask_token)[0].rstrip()
    return prompt


def prefix_tokens(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    return next((full[:i] for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), [])


def decoder_start(lm: LanguageModel) -> Tokens:
    """Return the tokens that the decoder of an encoder-decoder begins with.

    Raises:
        ScoringError: if its config names none.
    """
    start = lm.model.config.decoder_start_token_id
    if start is None:
        raise ScoringError(f"{lm.name} has no decoder_start_token_id in its config. Set it to score an encoder-decoder.")
    generation = lm.model.generation_config
    forced = generation.forced_bos_token_id if generation is not None else None  # BART's decoder begins with two tokens
    return (int(start),) if forced is None else (int(start), int(forced))


def max_length(lm: LanguageModel) -> int:
    """Return the largest number of tokens that the model takes."""
    tokenizer = lm.require_tokenizer()
    positions = getattr(lm.model.config, "max_position_embeddings", None)
    return min(int(positions or tokenizer.model_max_length), int(tokenizer.model_max_length))
