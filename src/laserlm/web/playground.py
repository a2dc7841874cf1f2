"""Run a prompt through three variants of a model: unchanged, reduced, and with only the part that the reduction removes."""

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
from laserlm.models.finite import overflow
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.conversation import Conversation
from laserlm.scoring.generation import generate, generate_for
from laserlm.scoring.output_layer import float32_output_layer
from laserlm.store import Store
from laserlm.tasks import Decoding, Example
from laserlm.web.batched_variants import CannotBatchError, run_variants

MAX_NEW_TOKENS = 64
"""Maximum tokens of a continuation, because every request delays all other users."""
MAX_PROMPT_CHARACTERS = 4000
"""Maximum length of a prompt, for the same reason."""
N_TOP_TOKENS = 5
RUN = "run "
"""What comes before the id of a search whose choice is meant."""
ANSWER_CACHE_SIZE = 256
"""Number of cached answers; each takes a few kilobytes."""
SMALL_MODEL_BYTES = 2**30
"""Size of weights that one core reads in about 0.1 s."""
SHORT_PROMPT_CHARACTERS = 500
"""Length of a prompt whose computation takes no longer than reading the weights."""


@dataclass(frozen=True)
class Variant:
    """The output of one variant of a model for a prompt.

    Args:
        intervention: canonical text of the intervention, empty for the unchanged model.
        text: greedy continuation; of a masked model, the text in place of the masks.
        top: the likeliest first tokens with their probabilities, in descending order.
    """

    intervention: str
    text: str
    top: tuple[tuple[str, float], ...]


Variants = tuple[Variant, ...]
Turns = tuple[tuple[str, str], ...]
"""A conversation in pairs of role and text."""


class Playground:
    """Answers prompts of several users with one model.

    An answer changes weights in place and restores them. A lock therefore allows one request at a time, and no user sees
    the reduction of another user. Answers are cached.

    Args:
        lm: the unchanged model; no other code may use it at the same time.
        store: the results database. With it, ``run ID`` means what a search chose.

    Raises:
        ModelError: if the model has no head or no tokenizer.
    """

    def __init__(self, lm: LanguageModel, store: Store | None = None) -> None:
        lm.require_tokenizer()
        self.lm = lm
        self.store = store
        self._lock = Lock()
        self._cache: OrderedDict[tuple[str, str, int], Variants] = OrderedDict()

    def answer(self, prompt: str, intervention: str, tokens: int) -> Variants:
        """Return the three variants as ``answer`` does, one request at a time.

        Raises:
            ReportError: if the prompt or the number of tokens is empty or too large, or there is no reduction.
            LaserError: as ``answer``.
        """
        if not prompt or len(prompt) > MAX_PROMPT_CHARACTERS:
            raise ReportError(f"a prompt must have 1 to {MAX_PROMPT_CHARACTERS} characters, got {len(prompt)}; shorten it")
        if not 1 <= tokens <= MAX_NEW_TOKENS:
            raise ReportError(f"the number of new tokens must be 1 to {MAX_NEW_TOKENS}, got {tokens}")
        key = (prompt, self._canonical(intervention), tokens)
        with self._lock:
            if key not in self._cache:
                self._cache[key] = answer(self.lm, *key)
                if len(self._cache) > ANSWER_CACHE_SIZE:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
            return self._cache[key]

    def chat(self, conversations: Sequence[Turns], intervention: str, tokens: int) -> list[str]:
        """Return what the unchanged and the edited model answer, each in its own conversation, one request at a time.

        Args:
            conversations: with the unchanged and with the edited model. A user's turn ends each.
            intervention: text of the reductions.
            tokens: maximum number of new tokens.

        Raises:
            ReportError: if a conversation is too long, its last turn is empty, or there is no reduction.
            LaserError: if the model cannot answer, or has no chat template.
        """
        for turns in conversations:
            length = sum(len(text) for _, text in turns)
            if not turns[-1][1].strip() or length > MAX_PROMPT_CHARACTERS:
                raise ReportError(
                    f"a conversation must end with a message and have at most {MAX_PROMPT_CHARACTERS} characters, got "
                    f"{length}; write a message, or start a new conversation"
                )
        replies = []
        with self._lock:
            for text, turns in zip(("", self._canonical(intervention)), conversations, strict=True):
                conversation, question = Conversation(self.lm, text, max_new_tokens=tokens), turns[-1][1]
                conversation.messages += turns[:-1]
                with _threads(self.lm, question):
                    replies.append(conversation.reply(question))
        return replies

    def _canonical(self, intervention: str) -> str:
        """Return the canonical text of reductions, or of what the search chose that ``run ID`` names."""
        if self.store is not None and intervention.strip().startswith(RUN):
            run = intervention.strip().removeprefix(RUN).strip()
            intervention = str((self.store.find(run, kind="search").outcome or {}).get("best") or "")
        canonical = str(Intervention.parse(intervention))
        if not canonical:
            raise ReportError("no reduction to compare with the unchanged model; write one such as 3.fc_in@0.1")
        return canonical


def answer(lm: LanguageModel, prompt: str, intervention: str, tokens: int) -> Variants:
    """Return the outputs of the unchanged model, the reduced model and the model with only the removed part.

    One batch computes all three if the model allows it. The results then differ in the last bits.

    Args:
        lm: the unchanged model.
        prompt: some text; for a masked model, with its mask token, or else the mask is appended.
        intervention: text of a reduction, or of several with ``+`` between them.
        tokens: maximum number of new tokens; for a masked model, the number of masks.

    Raises:
        SpecError: if the intervention cannot be parsed.
        MatrixError: if the model has no such matrix.
        ScoringError: if the prompt is too long for the model, or the model overflows its dtype.
    """
    interventions = ["", str(Intervention.parse(intervention)), str(removed_part(lm.matrices, intervention))]
    with _threads(lm, prompt):
        try:
            with run_variants(lm, interventions), _first_logits(lm) as passes:
                texts = _texts(lm, [prompt] * len(interventions), tokens)
            firsts = list(_first(lm, passes))
        except CannotBatchError:
            texts, firsts = [], []
            for text in interventions:
                with applied(lm, text), _first_logits(lm) as passes:
                    texts += _texts(lm, [prompt], tokens)
                firsts += _first(lm, passes)
    return tuple(_variant(lm, *outputs) for outputs in zip(interventions, texts, firsts, strict=True))


@contextmanager
def _threads(lm: LanguageModel, prompt: str) -> Iterator[None]:
    """Use one thread for a small model and a short prompt, until the end of the context.

    Threads wait for each other after every product. On a busy machine, for example during a search, this waiting takes many
    times as long as the products.
    """
    n_threads = torch.get_num_threads()
    is_small = (
        lm.device.type == "cpu"
        and lm.model.get_memory_footprint() <= SMALL_MODEL_BYTES
        and len(prompt) <= SHORT_PROMPT_CHARACTERS
    )
    torch.set_num_threads(1 if is_small else n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _texts(lm: LanguageModel, prompts: Sequence[str], tokens: int) -> list[str]:
    if lm.kind != "masked":
        return generate(lm, prompts, max_new_tokens=tokens)
    examples = [Example(str(i), prompt, "") for i, prompt in enumerate(prompts)]
    return [text for (text,) in generate_for(lm, examples, Decoding(masks=tokens))]


@contextmanager
def _first_logits(lm: LanguageModel) -> Iterator[list[Tensor]]:
    """Yield a list that collects the logits (B, V) of the next tokens in each pass; of a masked model, of the first masks.

    A forward hook reads them during generation, because a pass of their own would take as long as another token. They are
    computed in float32, as scores are, and the continuation is chosen by the same logits.
    """
    logits: list[Tensor] = []

    def read(_module: Any, _args: Any, inputs: dict[str, Any], output: Any) -> None:
        position = -1
        if lm.kind == "masked":
            position = int((inputs["input_ids"][0] == lm.require_tokenizer().mask_token_id).nonzero()[0])
        logits.append(output.logits[:, position])

    handle = lm.model.register_forward_hook(read, with_kwargs=True)
    try:
        with float32_output_layer(lm.model, is_module=False):
            yield logits
    finally:
        handle.remove()


def _first(lm: LanguageModel, passes: Sequence[Tensor]) -> Tensor:
    """Return the logits (B, V) of the first generated tokens."""
    if lm.kind != "encoder-decoder":
        return passes[0]
    settings: Any = lm.model.generation_config
    # With a forced first token, the decoder chooses its first token in the second pass.
    forced = settings is not None and settings.forced_bos_token_id is not None
    return passes[min(int(forced), len(passes) - 1)]


def _variant(lm: LanguageModel, intervention: str, text: str, logits: Tensor) -> Variant:
    probabilities = logits.float().softmax(-1)  # (V,)
    if not bool(probabilities.isfinite().all()):
        raise ScoringError(
            f"{intervention or 'the unchanged model'} gives probabilities that are not finite: {overflow(lm.model, lm.dtype)}"
        )
    best = probabilities.topk(min(N_TOP_TOKENS, len(probabilities)))
    tokenizer = lm.require_tokenizer()
    top = [(str(tokenizer.decode([t])), p) for t, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return Variant(intervention, text, tuple(top))
