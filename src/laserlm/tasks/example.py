"""Examples, and the tasks and splits that hold them."""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

from laserlm.errors import TaskError

log = logging.getLogger(__name__)

Scorer = Literal[
    "next_token",
    "first_token",
    "top5",
    "top10",
    "answer",
    "choice",
    "perplexity",
    "lm_eval",
    "contains",
    "exact_match",
    "number",
    "program",
    "rollout",
    "lm_eval_text",
    "label",
    "preference",
    "similarity",
]
"""How an example is scored. ``laserlm.scoring.scorers.SCORERS`` says when each scorer counts an example as correct."""
SplitBy = Literal["paper", "shuffled"]
Phrasings = Literal["rewrite", "all"]
Judge = Callable[["Example", list[Any]], tuple[bool, dict[str, float]]]
"""Grades the model's output for an example: returns whether it is correct, and extra metrics by name."""


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that should follow it.

    Args:
        id: unique within a task.
        prompt: the text before the answer.
        answer: the right continuation, without the separator between prompt and answer.
        choices: the answers to choose from, including the right one; empty for an open question.
        group: relation or class, or empty.
        fact: examples that phrase one fact share it. No shuffled split separates them, and intervals take only facts as
            independent. ``Task.of`` gives equal questions one fact.
        popularity: how widely the fact is known, on the task's own scale, or None.
        aliases: other right answers, for scorers of generated text.
        joint: separator between prompt and answer. It is left out if either has white space there.
        masked: prompt for a masked model, with ``{mask}`` for the answer and ``{passage}`` for the end of ``passage``. If it is
            empty, the prompt is followed by a mask and a full stop.
        passage: a text of which a masked model reads the last 50 tokens (arXiv 2312.13558).
        program: for a programming problem, the tests of the function that prompt and answer define.
        pairs: contexts and continuations that are scored in place of prompt and answer, or of the choices.
        right: index of the answer's pair.
        subject: what the fact is about, as the prompt names it, or empty.
        messages: the conversation before the answer, in pairs of role and text. A causal model with a chat template reads it
            in place of the prompt.
        needs_template: whether a model without a chat template is refused. Otherwise such a model reads the prompt.
        text_pair: a second text, which a classifier reads with the prompt, or whose vector is compared with that of the prompt.
    """

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    group: str = ""
    fact: str = ""
    popularity: float | None = None
    aliases: tuple[str, ...] = ()
    joint: str = " "
    masked: str = ""
    passage: str = ""
    program: str = ""
    pairs: tuple[tuple[str, str], ...] = ()
    right: int = 0
    subject: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    needs_template: bool = False
    text_pair: str = ""

    @property
    def question(self) -> tuple[str, str]:
        """What makes two examples equal: the letters of texts and answer, and where they are parted by white space.

        Choices, ids and groups may differ, and so may the kind and number of white space, and how letters with accents are
        encoded, as they do between copies of a question in a spreadsheet.
        """
        pair = f"\n\n{_plain(self.text_pair)}" if self.text_pair else ""
        return _plain(self.prompt) + pair, _plain(self.answer)


def _plain(text: str) -> str:
    """Return a text in the composed form of Unicode (NFC), with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


@dataclass(frozen=True)
class Decoding:
    """How a model generates text, for scorers that grade it.

    Args:
        new_tokens: largest number of new tokens. A causal model also stops at its end token.
        stops: stop strings. The generation is cut before the first one.
        masks: number of masks that a masked model fills at once, since it cannot generate in another way.
        samples: texts for each example; with 1, decoding is greedy.
        temperature: sampling temperature, if there are several samples.
        seed: seed of the sampling.
        run_programs: whether generated programs may be run; ``weakly`` also where only the interpreter confines them.
    """

    new_tokens: int = 10
    stops: tuple[str, ...] = ()
    masks: int = 5
    samples: int = 1
    temperature: float = 0.8
    seed: int = 0
    run_programs: bool | Literal["weakly"] = False

    def __post_init__(self) -> None:
        if min(self.new_tokens, self.masks, self.samples) < 1 or self.temperature <= 0:
            raise TaskError(f"{self}: write 1 or more for new_tokens, masks and samples, and a temperature above 0")


@dataclass(frozen=True)
class Split:
    """An ordered set of examples of one task.

    Args:
        task: the task's name.
        name: ``validation``, ``test`` or ``all``.
        examples: the examples in their order.
        scorer: the task's default scorer.
        decoding: how the model generates text.
        judge: grades the examples of a task of another library. It gets, for each pair, the summed log-probability and
            whether greedy decoding gives the continuation; or the generated text.
        skipped: number of examples that were left out because they cannot be scored.
    """

    task: str
    name: str
    examples: tuple[Example, ...] = field(repr=False)
    scorer: Scorer
    decoding: Decoding = Decoding()
    judge: Judge | None = field(default=None, repr=False, compare=False)
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @cached_property
    def hash(self) -> str:
        """Sha256 of the examples: equal content has an equal hash, whatever file it came from."""
        rows = json.dumps([_as_dict(e) for e in self.examples], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(rows.encode()).hexdigest()

    def limit(self, n: int | None) -> Split:
        """Return the first ``n`` examples (all of them for None).

        Raises:
            TaskError: if n is below 1.
        """
        if n is not None and n < 1:
            raise TaskError(f"a limit of {n} leaves no example. Write 1 or more.")
        return replace(self, examples=self.examples[:n])


@dataclass(frozen=True)
class TaskSource:
    """The examples of a task in file order, where they come from, the task's defaults, and what its reader should know."""

    name: str
    examples: Sequence[Example]
    source: str
    scorer: Scorer = "answer"
    split_by: SplitBy = "shuffled"
    decoding: Decoding = Decoding()
    judge: Judge | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A named task with its two splits.

    Args:
        name: the name that ``laserlm.task`` takes.
        validation: a search chooses by these examples.
        test: the chosen intervention is measured on these examples, once.
        every: all examples in file order.
        source: where the examples come from, with the licence.
        split_by: how the splits were drawn.
        notes: how the data was read, one sentence each.
    """

    name: str
    validation: Split
    test: Split
    every: Split
    source: str = ""
    split_by: SplitBy = "shuffled"
    notes: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(
        cls,
        name: str,
        examples: Sequence[Example],
        *,
        scorer: Scorer = "answer",
        split: SplitBy = "shuffled",
        seed: int = 0,
        phrasings: Phrasings = "all",
        source: str = "",
        decoding: Decoding = Decoding(),
        judge: Judge | None = None,
        chat: bool | None = None,
        system: str | None = None,
        notes: Sequence[str] = (),
    ) -> Task:
        """Make a task of examples: one fifth for validation, the rest for test.

        Facts with an equal question become one fact, so that no shuffled split separates equal questions.

        Args:
            name: the task's name.
            examples: in file order.
            scorer: the task's default scorer.
            split: ``paper`` takes the first floor(n / 5) rows in file order for validation. ``shuffled`` takes a fifth of
                the facts (at least one, if there are two) in an order that depends on the seed and the fact only.
            seed: seed of the shuffled order.
            phrasings: ``rewrite`` keeps the first phrasing of each fact in each group. ``all`` keeps all phrasings.
            source: where the examples come from.
            decoding: how the model generates text.
            judge: grades the examples of a task of another library.
            chat: True asks every question through the model's chat template, False asks none so. None asks those that have
                ``messages``, if the model has a template.
            system: the system text of the conversation; asks through the chat template.
            notes: how the data was read.

        Raises:
            TaskError: if there are no examples, two have the same id, or the scorer does not go with a conversation.
        """
        for value, known in ((phrasings, get_args(Phrasings)), (split, get_args(SplitBy)), (scorer, get_args(Scorer))):
            if value not in known:
                raise TaskError(f"the task {name!r} cannot take {value!r}. Write one of {', '.join(known)}.")
        examples = tuple(replace(e, fact=e.fact or e.id) for e in _in_chat(name, examples, scorer, chat, system))
        if not examples:
            raise TaskError(f"the task {name!r} has no examples. Check the file and its filters.")
        id_, count = Counter(e.id for e in examples).most_common(1)[0]
        if count > 1:
            raise TaskError(f"the task {name!r} has two examples with the id {id_!r}. Ids must differ.")
        first_of = {(e.group, e.fact): e.id for e in reversed(examples)}
        merged = _merge_facts(name, examples)
        if phrasings == "rewrite":
            merged = tuple(m for m, e in zip(merged, examples, strict=True) if first_of[e.group, e.fact] == e.id)
        examples = merged
        validation, test = _split_as_published(examples) if split == "paper" else _split_by_fact(examples, seed)
        return cls(
            name=name,
            validation=Split(name, "validation", validation, scorer, decoding, judge),
            test=Split(name, "test", test, scorer, decoding, judge),
            every=Split(name, "all", examples, scorer, decoding, judge),
            source=source,
            split_by=split,
            notes=tuple(notes),
        )

    def split(self, name: str) -> Split:
        """Return ``validation``, ``test`` or ``all``.

        Raises:
            TaskError: if there is no split of this name.
        """
        splits = {"validation": self.validation, "test": self.test, "all": self.every}
        if name not in splits:
            raise TaskError(f"no split {name!r}; there are validation, test and all")
        return splits[name]


Examples = tuple[Example, ...]
LATER_FIELDS = {"messages": (), "needs_template": False, "text_pair": ""}
"""Fields without which examples were hashed before there were conversations, and their values then."""
WITHOUT_CHAT = ("perplexity", "lm_eval", "program", "rollout", "lm_eval_text", "label", "similarity")


def _as_dict(e: Example) -> dict[str, Any]:
    """Return what a hash of an example is over. It is the same as before for an example without a conversation."""
    return {name: value for name, value in asdict(e).items() if name not in LATER_FIELDS or value != LATER_FIELDS[name]}


def _in_chat(
    name: str, examples: Sequence[Example], scorer: Scorer, chat: bool | None, system: str | None
) -> Sequence[Example]:
    """Return the examples as they are asked: in a conversation, without one, or as they are."""
    if chat is False:
        if system is not None:
            raise TaskError("a system text is for a conversation; leave out --no-chat (chat=False) or --system (system=...)")
        return [replace(e, messages=(), needs_template=False) for e in examples]
    if chat is None and system is None:
        return examples if scorer not in WITHOUT_CHAT else [replace(e, messages=()) for e in examples]
    if scorer in WITHOUT_CHAT:
        raise TaskError(f"the task {name!r} is scored by {scorer}, which reads no conversation; leave out --chat and --system")
    start = () if system is None else (("system", system),)

    def messages(e: Example) -> tuple[tuple[str, str], ...]:
        asked = e.messages or (("user", e.prompt),)
        return (*start, *(m for m in asked if not start or m[0] != "system"))

    return [replace(e, messages=messages(e), needs_template=True) for e in examples]


def _merge_facts(name: str, examples: Examples) -> Examples:
    """Return the examples with one fact for all facts that are linked by equal questions, and warn of these."""
    first_fact: dict[tuple[str, str], str] = {}
    parents: dict[str, str] = {}

    def root(fact: str) -> str:
        while fact in parents:
            fact = parents[fact]
        return fact

    for e in examples:
        low, high = sorted((root(first_fact.setdefault(e.question, e.fact)), root(e.fact)))
        if low != high:
            parents[high] = low  # whatever the order of the file
    if len(first_fact) == len(examples):
        return examples
    log.warning(
        "the task %s has %d rows of %d different questions; equal questions count as one fact and stay in one shuffled split",
        name,
        len(examples),
        len(first_fact),
    )
    return tuple(replace(e, fact=root(e.fact)) for e in examples)


def _split_as_published(examples: Examples) -> tuple[Examples, Examples]:
    """Return validation and test examples: the first fifth of the rows, and the rest."""
    cut = len(examples) // 5
    return examples[:cut], examples[cut:]


def _split_by_fact(examples: Examples, seed: int) -> tuple[Examples, Examples]:
    """Return validation and test examples: those of a fifth of the facts, and the rest, in a shuffled order of the facts."""
    order = sorted({e.fact for e in examples}, key=lambda fact: hashlib.sha256(f"{seed} {fact}".encode()).digest())
    rank = {fact: i for i, fact in enumerate(order)}
    shuffled = sorted(examples, key=lambda e: rank[e.fact])
    cut = max(len(order) // 5, min(1, len(order) - 1))
    validation = tuple(e for e in shuffled if rank[e.fact] < cut)
    test = tuple(e for e in shuffled if rank[e.fact] >= cut)
    return validation, test
