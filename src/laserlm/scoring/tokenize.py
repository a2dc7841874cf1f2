"""Turn examples into the token sequences that a model is run on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from laserlm.errors import LaserError, ScoringError, TokenizationError
from laserlm.models.kinds import TEXT_KINDS
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.chat import ChatTemplate
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.scorers import SCORERS, ScorerDefinition, scorer_for
from laserlm.scoring.texts import encode_texts
from laserlm.tasks.example import Example, Scorer, Split

WINDOW_TOKENS = 1024
"""Length of a window of a text whose perplexity is measured."""
STRIDE_TOKENS = 512
"""Number of tokens scored in a window (arXiv 2312.13558). The tokens before them are context."""
PASSAGE_TOKENS = 50
"""Length of a passage that a masked model reads (arXiv 2312.13558)."""

ERRORS_SHOWN = 5
MODELS = {
    "": "a model that predicts tokens",
    "classifier": "a classifier",
    "reward": "a reward model",
    "embedding": "an embedding model",
}
"""What a scorer needs, by its ``kind``."""
FILES = {
    "": "Give questions with 'prompt' and 'answer', or another model.",
    "classifier": "Give texts with their labels (columns 'text' and 'label'), or another model.",
    "reward": "Give preferences (columns 'prompt', 'chosen' and 'rejected'), or another model.",
    "embedding": "Give sentence pairs (columns 'sentence1', 'sentence2' and 'score'), or another model.",
}
"""The questions that go with a kind of model."""
Tokens = tuple[int, ...]


def encode(lm: LanguageModel, examples: Sequence[Example], scorer: Scorer) -> list[TokenSequence]:
    """Return the token sequences of all examples, in order.

    An example has several sequences if it has several requests, choices of several tokens, or a text longer than a window.
    An answer's tokens are those that it adds to the tokens of the prompt. Programs, and texts whose perplexity is measured,
    are tokenised without the prompt.

    Raises:
        TokenizationError: if a token spans the end of the prompt and the start of the answer, if an answer has no tokens,
            if the model has no embedding for a token, or if the tokenizer has no mask token and needs one.
        ScoringError: if a sequence is longer than the model allows, or an example lacks something that the scorer needs.
    """
    rows, problems = _encode(lm, examples, scorer)
    if problems:
        raise _of_all(list(problems.values()), len(examples))
    return rows


def scorable(lm: LanguageModel, split: Split, scorer: Scorer | None = None) -> Split:
    """Return a split without the examples that cannot be scored, and with their number."""
    _, problems = _encode(lm, split.examples, scorer or scorer_for(lm.kind, split.scorer))
    kept = tuple(e for i, e in enumerate(split.examples) if i not in problems)
    return replace(split, examples=kept, skipped=split.skipped + len(problems))


def _encode(
    lm: LanguageModel, examples: Sequence[Example], scorer: Scorer
) -> tuple[list[TokenSequence], dict[int, LaserError]]:
    """Return the token sequences of the examples, and why an example has none, by its index."""
    definition = SCORERS[scorer]
    tokenizer = lm.require_tokenizer()
    if definition.kind:
        return _encode_texts(lm, examples, scorer)
    problems: dict[int, LaserError] = {}
    requests: list[_Request] = []
    template = ChatTemplate(lm)
    for i, e in enumerate(examples):
        try:
            _check_example(lm, e, scorer)
            chat = template.prompt(e)
        except (TokenizationError, ScoringError) as error:
            problems[i] = error
            continue
        for prompt, answer in definition.requests(e):
            if chat is None:
                requests.append(_Request(i, e, prompt, answer, e.joint))
            else:
                requests.append(_Request(i, e, chat, answer, template.separator, in_chat=True))
    prefix = prefix_tokens(tokenizer)
    tokens = _split_tokens(lm, tokenizer, requests, apart=definition.tokenizes_apart)
    encoder = _Encoder(lm, tokenizer, definition, prefix)
    rows: list[TokenSequence] = []
    for i, group in groupby(zip(requests, tokens, strict=True), key=lambda pair: pair[0].index):
        try:
            parts = [_checked(tokenizer, request, *split, prefix) for request, split in group]
            sequences = encoder.encode(i, examples[i], parts)
            for row in sequences:
                _check_length(lm, examples[i], row)
                check_known(lm, (*row.ids, *row.decoder, *row.targets, *row.choice_tokens), f"example {examples[i].id!r}")
            rows += sequences
        except (TokenizationError, ScoringError) as error:
            problems[i] = error
    return rows, dict(sorted(problems.items()))


def _encode_texts(
    lm: LanguageModel, examples: Sequence[Example], scorer: Scorer
) -> tuple[list[TokenSequence], dict[int, LaserError]]:
    """Return the sequences of examples for a model that gives one output for a text, and why an example has none."""
    problems: dict[int, LaserError] = {}
    rows: list[TokenSequence] = []
    for i, e in enumerate(examples):
        try:
            _check_example(lm, e, scorer)
            sequences = encode_texts(lm, i, e)
            for row in sequences:
                _check_length(lm, e, row)
                check_known(lm, row.ids, f"example {e.id!r}")
            rows += sequences
        except (TokenizationError, ScoringError) as error:
            problems[i] = error
    return rows, problems


def _check_length(lm: LanguageModel, e: Example, row: TokenSequence) -> None:
    if len(row.ids) > max_length(lm):
        raise ScoringError(
            f"example {e.id!r} has {len(row.ids)} tokens, and {lm.name} takes {max_length(lm)}. Shorten the prompt."
        )


def _of_all(problems: Sequence[LaserError], n: int) -> LaserError:
    """Return one error for all examples that cannot be scored, of the kind of the first."""
    if len({*map(str, problems)}) == 1:
        return problems[0]
    shown = "\n  ".join(map(str, problems[:ERRORS_SHOWN]))
    more = f"\n  and {len(problems) - ERRORS_SHOWN} more" if len(problems) > ERRORS_SHOWN else ""
    skip = "" if len(problems) == n else "\n--skip-unscorable (laserlm.scoring.tokenize.scorable) leaves them out."
    return type(problems[0])(f"{len(problems)} of {n} examples cannot be scored:\n  {shown}{more}{skip}")


@dataclass(frozen=True)
class _Request:
    """A text before an answer, the answer, and the text between them, for the example at an index."""

    index: int
    example: Example
    prompt: str
    answer: str
    joint: str
    in_chat: bool = False


@dataclass(frozen=True)
class _Encoder:
    """Builds the token sequences of one example after another; ``prefix`` is put before each context."""

    lm: LanguageModel
    tokenizer: Any
    scorer: ScorerDefinition
    prefix: list[int]

    def encode(self, i: int, e: Example, requests: Sequence[tuple[list[int], Tokens]]) -> list[TokenSequence]:
        """Return the sequences of the example at index ``i``, from the tokens of its contexts and continuations."""
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
        return self.causal(i, e, with_prefix(self.prefix, context), targets)

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
        if not context and self.prefix and list(targets[: len(self.prefix)]) == self.prefix:
            context = self.prefix  # the text has the tokens already that start it
        rows: list[TokenSequence] = []
        for at in range(len(context), len(text), stride):
            scored = text[at : at + stride]
            before = list(text[max(0, at - (window - stride - len(self.prefix))) : at])
            start = with_prefix(self.prefix, before) or start_token(self.tokenizer)
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
    needed = SCORERS[scorer].kind
    if needed != (lm.kind if lm.kind in TEXT_KINDS else ""):
        own = lm.kind if lm.kind in TEXT_KINDS else ""
        step = "Use --scorer choice (scorer='choice')." if (scorer, own) == ("preference", "") else FILES[own]
        raise ScoringError(
            f"scorer {scorer} is for {MODELS[needed]}, and {lm.name} is {MODELS[own]} ({type(lm.model).__name__}). {step}"
        )
    if e.text_pair and not needed:
        raise ScoringError(
            f"example {e.id!r} has a second text (text_pair), which scorer {scorer} does not read. Give a classifier, or put "
            "both texts into the prompt."
        )
    if problem := SCORERS[scorer].problem(e):
        raise ScoringError(f"example {e.id!r} cannot be scored by {scorer}: {problem}. Use another scorer.")
    if not SCORERS[scorer].is_short_answer and lm.kind != "causal":
        raise ScoringError(f"scorer {scorer} needs a causal model, and {lm.name} is {lm.kind}. Use another scorer.")


def _split_tokens(
    lm: LanguageModel, tokenizer: Any, requests: Sequence[_Request], *, apart: bool
) -> list[tuple[list[int], list[int]]]:
    """Return for each request the tokens of the context without special ones, and of context and answer together."""

    def tokenize(texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids] if texts else []

    if lm.kind == "encoder-decoder":
        return [([], ids) for ids in tokenize([r.answer for r in requests])]
    texts = [_context(tokenizer, lm, r.example, r.prompt) for r in requests]
    answers = [_separator(r, text) + r.answer for r, text in zip(requests, texts, strict=True)]
    contexts = tokenize(texts)
    if apart:
        full = [context + answer for context, answer in zip(contexts, tokenize(answers), strict=True)]
    else:
        full = tokenize([text + answer for text, answer in zip(texts, answers, strict=True)])
        for i, (request, context) in enumerate(zip(requests, contexts, strict=True)):
            if request.in_chat and full[i][: len(context)] != context:  # the model answers from the template's last token on
                full[i] = context + tokenize([answers[i]])[0]
    return list(zip(contexts, full, strict=True))


def _checked(
    tokenizer: Any, request: _Request, context: list[int], tokens: list[int], prefix: list[int]
) -> tuple[list[int], Tokens]:
    """Return the tokens of the context and of the answer.

    Raises:
        TokenizationError: if a token belongs to both, the answer has none, or the context begins twice.
    """
    e, answer = request.example, request.answer
    if tokens[: len(context)] != context and not e.pairs:
        start = next((k for k, (a, b) in enumerate(zip(context, tokens, strict=False)) if a != b), len(tokens))
        raise TokenizationError(
            f"example {e.id!r}: the answer {answer!r} straddles a token boundary. The prompt ends in "
            f"{tokenizer.convert_ids_to_tokens(context[start:])}, and with the answer these tokens are "
            f"{tokenizer.convert_ids_to_tokens(tokens[start:])}. End the prompt on a whole word, without a space."
        )
    if len(tokens) <= len(context):
        raise TokenizationError(f"example {e.id!r}: the answer {answer!r} has no tokens")
    n = len(prefix)
    if prefix and context[:n] == prefix == context[n : 2 * n]:
        raise TokenizationError(
            f"example {e.id!r}: the prompt begins with {tokenizer.decode(prefix)!r} twice. Take it out; laserlm puts it there."
        )
    return list(tokens[: len(context)]), tuple(tokens[len(context) :])


def _separator(request: _Request, prompt: str) -> str:
    has_space = not prompt or prompt[-1].isspace() or request.answer[0].isspace()
    return "" if request.example.pairs or has_space else request.joint


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


def with_prefix(prefix: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Return tokens with the special ones that start a text before them, unless they begin with these already."""
    return list(ids) if list(ids[: len(prefix)]) == list(prefix) else [*prefix, *ids]


def check_known(lm: LanguageModel, ids: Collection[int], what: str) -> None:
    """Raise a TokenizationError if the model has no embedding for a token of a text, which was added to the tokenizer alone."""
    last = max(ids, default=0)
    if 0 < lm.known_tokens <= last:
        token = lm.require_tokenizer().convert_ids_to_tokens(last)
        raise TokenizationError(
            f"{what} has the token {token!r} ({last}), and {lm.name} has embeddings for the tokens 0 to {lm.known_tokens - 1}. "
            f"Take it out, or resize the model's embeddings to its tokenizer "
            "(resize_token_embeddings) and train them."
        )


def decoder_start(lm: LanguageModel) -> Tokens:
    """Return the tokens that the decoder of an encoder-decoder begins with.

    Raises:
        ScoringError: if neither its config nor its generation config names one.
    """
    generation = lm.model.generation_config
    configs = (lm.model.config, lm.model.config.get_text_config(decoder=True), generation)
    starts = (getattr(config, "decoder_start_token_id", None) for config in configs)
    start = next((start for start in starts if start is not None), None)
    if start is None:
        raise ScoringError(
            f"neither config.json nor generation_config.json of {lm.name} has a decoder_start_token_id, with which the decoder "
            "begins. Write the token's number into one of them."
        )
    forced = generation.forced_bos_token_id if generation is not None else None  # BART's decoder begins with two tokens
    return (int(start),) if forced is None else (int(start), int(forced))


def max_length(lm: LanguageModel) -> int:
    """Return the largest number of tokens that the model takes."""
    tokenizer = lm.require_tokenizer()
    positions = max(0, getattr(lm.model.config, "max_position_embeddings", None) or 0)  # XLNet's -1 means no limit
    limit = None if lm.pooling is None else lm.pooling.max_length
    most = int(tokenizer.model_max_length)
    return min(int(positions or most), most, int(limit or most))
