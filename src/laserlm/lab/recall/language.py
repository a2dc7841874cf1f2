"""Sequences of a bigram language where the sequence's output word, or a noise word, follows each trigger word.

Source: Chen, Bruna and Bietti, arXiv 2406.03068.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from laserlm.errors import TaskError
from laserlm.paths import atomic_file
from laserlm.tasks import Example

TRIGGER, NOISE = "in", "the"
"""The word before a sequence's output word, and the word that may replace the output."""
START, PAD = "<s>", "<pad>"
QUESTION_SEED_OFFSET = 1_000_000
"""Offset of the seed of test sequences, so that none of them is a training sequence."""
LossOn = Literal["outputs", "all"]


@dataclass(frozen=True)
class RecallConfig:
    """The language and the training of a model; equal configurations give equal models on one machine.

    Args:
        alpha: probability of the noise word after a trigger.
        words: ordinary words of the language.
        length: words of a sequence.
        width: hidden size of the model.
        triggers: probability of a trigger after an ordinary word.
        loss_on: ``outputs`` for the loss over the words after a trigger, ``all`` for the loss over all words.
        steps: training steps.
        batch_size: sequences per step.
        learning_rate: learning rate of SGD.
        momentum: momentum of SGD.
        seed: seed of the language, the sequences and the model.
    """

    alpha: float = 0.65
    words: int = 24
    length: int = 48
    width: int = 96
    triggers: float = 0.25
    loss_on: LossOn = "outputs"
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss_on not in get_args(LossOn):
            raise TaskError(f"no loss on {self.loss_on!r}; write {' or '.join(get_args(LossOn))}")
        if not 0 <= self.alpha < 1 or not 0 < self.triggers < 1:
            raise TaskError(
                f"alpha must be in [0, 1) and triggers in (0, 1), got alpha {self.alpha} and triggers {self.triggers}"
            )
        if not 2 <= self.words <= 26 or self.length < 8:
            raise TaskError(f"give 2 to 26 words and a length of 8 or more, got {self.words} words and length {self.length}")

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values, under the names of the first version."""
        values = asdict(self)
        return values | {"learnt": values.pop("loss_on")}


@dataclass(frozen=True)
class Sequences:
    """Sequences of a language.

    Args:
        tokens: (n, T) word numbers.
        outputs: (n,) the output word of each sequence.
    """

    tokens: Tensor
    outputs: Tensor


class Language:
    """A bigram language with a trigger word and a noise word.

    Attributes:
        vocabulary: ordinary words, trigger, noise word, start and padding.
        transitions: (V, words + 1) probabilities of the next word; the row of the trigger is not used.
    """

    def __init__(self, config: RecallConfig) -> None:
        self.config = config
        ordinary = [chr(ord("a") + i) for i in range(config.words)]
        self.vocabulary = [*ordinary, TRIGGER, NOISE, START, PAD]
        random = torch.Generator().manual_seed(config.seed)
        # A power makes a few successors of each word likely, as in a text.
        weights = torch.rand(len(self.vocabulary), config.words, generator=random) ** 4
        weights = weights / weights.sum(1, keepdim=True) * (1 - config.triggers)
        self.transitions = torch.cat([weights, torch.full((len(weights), 1), config.triggers)], 1)

    def draw(self, count: int, *, seed: int, alpha: float | None = None, swapped: float = 0.0) -> Sequences:
        """Return random sequences.

        Args:
            count: number of sequences.
            seed: seed of the draw.
            alpha: probability of the noise word after a trigger; None takes the configuration's.
            swapped: share of the ordinary words that random words replace afterwards; output words are kept.
        """
        random = torch.Generator().manual_seed(seed)
        words, trigger, noise = self.config.words, self.config.words, self.config.words + 1
        alpha = self.config.alpha if alpha is None else alpha
        outputs = torch.randint(words, (count,), generator=random)
        tokens = torch.empty(count, self.config.length, dtype=torch.long)
        last = torch.full((count,), self.vocabulary.index(START))
        for t in range(self.config.length):
            ordinary = torch.multinomial(self.transitions[last], 1, generator=random)[:, 0]
            noisy = torch.rand(count, generator=random) < alpha
            last = torch.where(last == trigger, torch.where(noisy, noise, outputs), ordinary)  # (n,)
            tokens[:, t] = last
        previous = torch.cat([torch.full((count, 1), noise), tokens[:, :-1]], 1)
        is_swapped = (torch.rand(tokens.shape, generator=random) < swapped) & (tokens < words) & (previous != trigger)
        return Sequences(torch.where(is_swapped, torch.randint(words, tokens.shape, generator=random), tokens), outputs)

    def text(self, tokens: Tensor) -> str:
        """Return the words of token numbers, separated by spaces."""
        return " ".join(self.vocabulary[i] for i in tokens.tolist())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer with one token per word, which starts each text with the start token."""
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(self.vocabulary)}, unk_token=PAD))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, self.vocabulary.index(START))]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token=START, eos_token=START, pad_token=PAD, clean_up_tokenization_spaces=False
        )


def questions(language: Language, sequences: Sequences, name: str, *, noisy: bool = False) -> list[Example]:
    """Return a question for each sequence: the word after its last trigger, unless that is its first trigger.

    Args:
        language: the language of the sequences.
        sequences: the sequences to ask about.
        name: start of the ids.
        noisy: take the sequence's next word as the answer, even if it is the noise word, instead of the output word.
    """
    examples = []
    for i, (tokens, output) in enumerate(zip(sequences.tokens, sequences.outputs, strict=True)):
        triggers = (tokens[:-1] == language.config.words).nonzero()[:, 0].tolist()
        if len(triggers) > 1:
            last = triggers[-1]
            answer = language.vocabulary[int(tokens[last + 1] if noisy else output)]
            examples.append(Example(id=f"{name} {i}", prompt=language.text(tokens[: last + 1]), answer=answer))
    return examples


def texts(language: Language, sequences: Sequences, name: str) -> list[Example]:
    """Return full sequences as examples, for the loss over all their words."""
    return [Example(id=f"{name} {i}", prompt="", answer=language.text(tokens)) for i, tokens in enumerate(sequences.tokens)]


def write_questions(examples: Sequence[Example], file: Path) -> None:
    """Write questions to a file that ``jsonl:FILE`` reads."""
    with atomic_file(file) as part:
        rows = ({"id": e.id, "prompt": e.prompt, "answer": e.answer} for e in examples)
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
