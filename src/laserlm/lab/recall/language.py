"""Sequences of a bigram language in which a trigger is followed by the sequence's own word, or by noise.

Source: Chen, Bruna and Bietti, arXiv 2406.03068.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from laserlm.errors import TaskError
from laserlm.paths import atomic_file
from laserlm.tasks import Example

__all__ = ["DRAWN", "Language", "Learnt", "Recipe", "Sequences", "questions", "texts", "write_questions"]

TRIGGER, NOISE = "in", "the"
"""The word that asks for the sequence's output, and the one that may come in its place."""
START, PAD = "<s>", "<pad>"
DRAWN = 1_000_000
"""Added to a recipe's seed for the sequences that are asked about, so that none of them is a lesson."""
Learnt = Literal["outputs", "all"]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; equal recipes give equal models on one machine.

    Args:
        alpha: probability of the noise word after a trigger.
        words: ordinary words of the language.
        length: words of a sequence.
        width: of the model.
        triggers: share of the triggers among the words that follow an ordinary one.
        learnt: whether the loss is over the words after a trigger alone (``outputs``) or over ``all`` words.
        steps: of training.
        batch_size: sequences in a step.
        learning_rate: of SGD.
        momentum: of SGD.
        seed: of the language, the sequences and the model.
    """

    alpha: float = 0.65
    words: int = 24
    length: int = 48
    width: int = 96
    triggers: float = 0.25
    learnt: Learnt = "outputs"
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.learnt not in get_args(Learnt):
            raise TaskError(f"no loss on {self.learnt!r}; write {' or '.join(get_args(Learnt))}")
        if not 0 <= self.alpha < 1 or not 0 < self.triggers < 1:
            raise TaskError(
                f"alpha {self.alpha} and triggers {self.triggers} are shares; write alpha in [0, 1), triggers in (0, 1)"
            )
        if not 2 <= self.words <= 26 or self.length < 8:
            raise TaskError(f"{self.words} words and a length of {self.length}: write 2 to 26 words and a length of 8 or more")


@dataclass(frozen=True)
class Sequences:
    """Sequences of a language.

    Args:
        tokens: (n, T) words by number.
        outputs: (n,) of each sequence.
    """

    tokens: Tensor
    outputs: Tensor


class Language:
    """A bigram language with a trigger and a noise word.

    Args:
        recipe: its words, shares and seed.

    Attributes:
        vocabulary: ordinary words, trigger, noise word, start and padding.
        transitions: (V, words + 1) probabilities of the next word; after a trigger they do not count.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        ordinary = [chr(ord("a") + i) for i in range(recipe.words)]
        self.vocabulary = [*ordinary, TRIGGER, NOISE, START, PAD]
        random = torch.Generator().manual_seed(recipe.seed)
        # A power makes a few successors of each word likely, as in a text.
        weights = torch.rand(len(self.vocabulary), recipe.words, generator=random) ** 4
        weights = weights / weights.sum(1, keepdim=True) * (1 - recipe.triggers)
        self.transitions = torch.cat([weights, torch.full((len(weights), 1), recipe.triggers)], 1)

    def draw(self, count: int, *, seed: int, alpha: float | None = None, swapped: float = 0.0) -> Sequences:
        """Return random sequences.

        Args:
            count: how many.
            seed: of the draw.
            alpha: probability of the noise word after a trigger; None takes the recipe's.
            swapped: share of the ordinary words, outputs not among them, that are replaced by random ones afterwards.
        """
        random = torch.Generator().manual_seed(seed)
        words, trigger, noise = self.recipe.words, self.recipe.words, self.recipe.words + 1
        alpha = self.recipe.alpha if alpha is None else alpha
        outputs = torch.randint(words, (count,), generator=random)
        tokens = torch.empty(count, self.recipe.length, dtype=torch.long)
        last = torch.full((count,), self.vocabulary.index(START))
        for t in range(self.recipe.length):
            ordinary = torch.multinomial(self.transitions[last], 1, generator=random)[:, 0]
            noisy = torch.rand(count, generator=random) < alpha
            last = torch.where(last == trigger, torch.where(noisy, noise, outputs), ordinary)  # (n,)
            tokens[:, t] = last
        before = torch.cat([torch.full((count, 1), noise), tokens[:, :-1]], 1)
        hit = (torch.rand(tokens.shape, generator=random) < swapped) & (tokens < words) & (before != trigger)
        return Sequences(torch.where(hit, torch.randint(words, tokens.shape, generator=random), tokens), outputs)

    def text(self, tokens: Tensor) -> str:
        """Return words as a text."""
        return " ".join(self.vocabulary[i] for i in tokens.tolist())

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer with a token for each word, that begins a text with the start token."""
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(self.vocabulary)}, unk_token=PAD))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, self.vocabulary.index(START))]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token=START, eos_token=START, pad_token=PAD, clean_up_tokenization_spaces=False
        )


def questions(language: Language, sequences: Sequences, name: str, *, noisy: bool = False) -> list[Example]:
    """Return the question that each sequence asks at its last trigger, unless that is its first.

    Args:
        language: of the sequences.
        sequences: what is asked about.
        name: before the number of each in its id.
        noisy: whether the answer is what follows in the sequence, be it noise, and not the sequence's output.
    """
    examples = []
    for i, (tokens, output) in enumerate(zip(sequences.tokens, sequences.outputs, strict=True)):
        triggers = (tokens[:-1] == language.recipe.words).nonzero()[:, 0].tolist()
        if len(triggers) > 1:
            at = triggers[-1]
            answer = language.vocabulary[int(tokens[at + 1] if noisy else output)]
            examples.append(Example(id=f"{name} {i}", prompt=language.text(tokens[: at + 1]), answer=answer))
    return examples


def texts(language: Language, sequences: Sequences, name: str) -> list[Example]:
    """Return whole sequences, for the loss over all their words."""
    return [Example(id=f"{name} {i}", prompt="", answer=language.text(tokens)) for i, tokens in enumerate(sequences.tokens)]


def write_questions(examples: Sequence[Example], file: Path) -> None:
    """Write questions as ``jsonl:FILE`` reads them."""
    with atomic_file(file) as part:
        rows = ({"id": e.id, "prompt": e.prompt, "answer": e.answer} for e in examples)
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
