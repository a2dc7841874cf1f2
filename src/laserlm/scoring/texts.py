"""Texts as classifiers, reward models and embedding models read them, and what these models give for a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laserlm.errors import ScoringError, TokenizationError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.chat import ChatTemplate
from laserlm.scoring.output_layer import float32_output_layer
from laserlm.scoring.records import TokenSequence
from laserlm.tasks.example import Example

HEADS = ("classifier", "reward")


def encode_texts(lm: LanguageModel, i: int, e: Example) -> list[TokenSequence]:
    """Return the sequences of the example at index ``i``: of a text, of each answer to a prompt, or of two sentences.

    Raises:
        ScoringError: if the model has no such label, or laserlm does not compute its vectors.
        TokenizationError: if the chat template refuses the conversation.
    """
    return READERS[lm.kind](lm, i, e)


def _labelled(lm: LanguageModel, i: int, e: Example) -> list[TokenSequence]:
    config: Any = lm.model.config
    if config.problem_type in ("multi_label_classification", "regression"):
        raise ScoringError(
            f"{lm.name} was trained for {config.problem_type.replace('_', ' ')}, and a label task needs one right label for "
            "each text. Give a classifier of single labels."
        )
    names = {str(name).strip().lower(): int(index) for index, name in config.id2label.items()}
    label = names.get(e.answer.strip().lower(), int(e.answer) if e.answer.strip().isdecimal() else -1)
    if not 0 <= label < config.num_labels:
        raise ScoringError(
            f"example {e.id!r} has the label {e.answer!r}, and {lm.name} has the labels {', '.join(map(repr, names))} (or 0 to "
            f"{config.num_labels - 1}). Write one of them, or name the column with --answer-column."
        )
    return [_sequence(lm, i, e.prompt, e.text_pair, targets=(label,))]


def _compared(lm: LanguageModel, i: int, e: Example) -> list[TokenSequence]:
    template = ChatTemplate(lm)
    return [_answered(lm, template, i, e, answer) for answer in e.choices]


def _answered(lm: LanguageModel, template: ChatTemplate, i: int, e: Example, answer: str) -> TokenSequence:
    """Return a prompt with an answer: by the chat template, as a pair of texts, or one after the other."""
    text = template.answered(e, answer)
    if text is not None:
        return _sequence(lm, i, text, add_special_tokens=False)
    if lm.require_tokenizer().sep_token is not None and e.prompt:
        return _sequence(lm, i, e.prompt, answer)
    has_space = not e.prompt or e.prompt[-1].isspace() or answer[:1].isspace()
    return _sequence(lm, i, e.prompt + ("" if has_space else e.joint) + answer)


def _embedded(lm: LanguageModel, i: int, e: Example) -> list[TokenSequence]:
    if lm.pooling is not None and lm.pooling.problem:
        raise ScoringError(
            f"laserlm does not compute the vectors of {lm.name}: {lm.pooling.problem}. It pools by mean, first token, last "
            "token or largest values, and runs dense modules after that."
        )
    dense = () if lm.pooling is None else lm.pooling.dense
    width = len(dense[-1].weight) if dense else int(lm.model.config.get_text_config().hidden_size)
    coordinates = tuple(range(width if lm.pooling is None else min(width, lm.pooling.truncate_dim or width)))
    return [_sequence(lm, i, text, choice_tokens=coordinates) for text in (e.prompt, e.text_pair)]


READERS: dict[str, Callable[[LanguageModel, int, Example], list[TokenSequence]]] = {
    "classifier": _labelled,
    "reward": _compared,
    "embedding": _embedded,
}
"""What reads an example, by the kind of model."""


def _sequence(
    lm: LanguageModel,
    i: int,
    text: str,
    pair: str = "",
    *,
    targets: tuple[int, ...] = (0,),
    choice_tokens: tuple[int, ...] = (),
    add_special_tokens: bool = True,
) -> TokenSequence:
    encoded = lm.require_tokenizer()(text, pair or None, add_special_tokens=add_special_tokens)
    ids, types = tuple(encoded["input_ids"]), tuple(encoded.get("token_type_ids", ()))
    if not ids:
        raise TokenizationError(f"the text {text!r:.60} has no tokens. Take the example out, or write a text.")
    return TokenSequence(i, ids, targets, (0,), choice_tokens=choice_tokens, type_ids=types if any(types) else ())


def padding_token(lm: LanguageModel, rows: Sequence[TokenSequence]) -> int:
    """Return the token that rows are padded with. A model that looks for it needs one that is in none of the rows."""
    config = lm.model.config.get_text_config()
    if lm.kind in HEADS and config.pad_token_id is None:
        taken = {token for row in rows for token in row.ids}
        return next(token for token in range(len(taken) + 1) if token not in taken)
    return int(lm.require_tokenizer().pad_token_id if lm.kind not in HEADS else config.pad_token_id)


def text_outputs(lm: LanguageModel, inputs: dict[str, Any], pad: int) -> Tensor:
    """Return what a model gives for each text of a batch, (B, V): logits of labels, a reward, or a vector of length 1."""
    with _configured_padding(lm, pad), float32_output_layer(lm.model, is_module=False):
        output = lm.model(**inputs)
    if lm.kind in HEADS:
        logits: Tensor = output.logits
        return logits
    mode = "mean" if lm.pooling is None else lm.pooling.mode
    vectors = _pooled(output.last_hidden_state.float(), inputs["attention_mask"], mode)
    for module in () if lm.pooling is None else lm.pooling.dense:
        vectors = module(vectors)
    kept = None if lm.pooling is None else lm.pooling.truncate_dim
    return F.normalize(vectors[:, :kept], dim=-1)


def _pooled(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    """Return one vector for each text, (B, H), of hidden states (B, T, H) that are padded on the right."""
    mask = mask.to(hidden.device)
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    if mode == "max":
        return hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@contextmanager
def _configured_padding(lm: LanguageModel, pad: int) -> Iterator[None]:
    """Let a model whose config names no padding token find the end of each text: it refuses batches otherwise."""
    config = lm.model.config.get_text_config()
    if lm.kind not in HEADS or config.pad_token_id is not None:
        yield
        return
    config.pad_token_id = pad
    try:
        yield
    finally:
        config.pad_token_id = None
