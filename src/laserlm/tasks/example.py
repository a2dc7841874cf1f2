"""The unit of a task: an example, and the splits made of examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

from laserlm.errors import TaskError

__all__ = ["GENERATING", "Decoding", "Example", "Generating", "Judge", "Phrasings", "Scorer", "Split", "SplitBy", "Task"]

Generating = Literal["contains", "exact_match", "number", "program", "rollout", "lm_eval_text"]
GENERATING = get_args(Generating)
"""Scorers that judge what the model writes; the loss beside them is that of the right answer."""
Reading = Literal["next_token", "first_token", "top5", "top10", "answer", "choice", "perplexity", "lm_eval"]
Scorer = Literal[Reading, Generating]
"""How an example is scored; ``laserlm.scoring.evaluate`` says what each means."""
SplitBy = Literal["paper", "shuffled"]
Phrasings = Literal["rewrite", "all"]
Judge = Callable[["Example", list[Any]], tuple[bool, dict[str, float]]]
"""Tells of an example, and of what a model said of it, whether that is right, and other figures on it."""


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that should follow it.

    Args:
        id: unique within a task.
        prompt: the text before the answer.
        answer: the right continuation, without the space that joins it to the prompt.
        choices: the answers to choose from, the right one among them; empty for an open question.
        group: relation or class, or empty.
        fact: examples that phrase one fact share it; no shuffled split separates them.
        popularity: how widely the fact is known, on the task's own scale, or None.
        aliases: other texts that are as right as the answer where the model writes its own.
        joint: what joins answer and prompt, left out where either has white space there.
        masked: what a masked model is given, with ``{mask}`` where it fills in and ``{passage}`` for the end of
            ``passage``; empty for the prompt, a mask and a full stop.
        passage: a text of which a masked model reads the last 50 tokens (arXiv 2312.13558).
        program: for a programming problem, what tests the function that prompt and answer make.
        pairs: contexts and continuations that are scored in place of prompt and answer, or of the choices.
        right: which of the pairs is the answer's.
        subject: what the fact is about, as the prompt names it, or empty.
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


@dataclass(frozen=True)
class Decoding:
    """How a model writes where its scorer judges what it writes.

    Args:
        new_tokens: at most so many; a causal model stops at its end token too.
        stops: texts before which what it wrote ends.
        masks: mask tokens that a masked model fills at once, which writes in no other way.
        samples: texts for each example; one is greedy decoding.
        temperature: of sampling, where there are several.
        seed: of sampling.
        run_programs: whether programs that the model writes may be run.
    """

    new_tokens: int = 10
    stops: tuple[str, ...] = ()
    masks: int = 5
    samples: int = 1
    temperature: float = 0.8
    seed: int = 0
    run_programs: bool = False

    def __post_init__(self) -> None:
        if min(self.new_tokens, self.masks, self.samples) < 1 or self.temperature <= 0:
            raise TaskError(f"{self}: write 1 or more for new_tokens, masks and samples, and a temperature above 0")


@dataclass(frozen=True)
class Split:
    """An ordered set of examples of one task.

    Args:
        task: the task's name.
        name: ``validation``, ``test`` or ``all``.
        examples: in the order they are counted in.
        scorer: how the task scores an example unless told otherwise.
        decoding: how the model writes, where the scorer judges that.
        judge: for a task of another library: given the summed log-probability of each pair and whether greedy decoding
            would give it, or the one text that the model wrote.
    """

    task: str
    name: str
    examples: tuple[Example, ...] = field(repr=False)
    scorer: Scorer
    decoding: Decoding = Decoding()
    judge: Judge | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @cached_property
    def hash(self) -> str:
        """Sha256 over the examples: equal for equal content, in whatever file it came."""
        rows = json.dumps([asdict(e) for e in self.examples], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(rows.encode()).hexdigest()

    def limit(self, n: int | None) -> Split:
        """Return the first ``n`` examples (all of them for None).

        Raises:
            TaskError: if n is below 1.
        """
        if n is not None and n < 1:
            raise TaskError(f"a limit of {n} leaves no example; write 1 or more")
        return replace(self, examples=self.examples[:n])


@dataclass(frozen=True)
class Task:
    """A named task with its two splits.

    Args:
        name: as given to ``laserlm.task``.
        validation: candidates are chosen here.
        test: the chosen one is measured here, once.
        every: all examples in file order.
        source: where the examples come from, with the licence.
    """

    name: str
    validation: Split
    test: Split
    every: Split
    source: str = ""

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
    ) -> Task:
        """Make a task of examples: one fifth for validation, the rest for test.

        Args:
            name: the task's name.
            examples: in file order.
            scorer: how an example is scored unless told otherwise.
            split: ``paper`` takes the first floor(n / 5) rows in file order for validation; ``shuffled`` takes a fifth of
                the facts (at least one, where there are two) in an order that depends on the seed and the fact alone.
            seed: of the shuffled order.
            phrasings: ``rewrite`` keeps the first phrasing of each fact in each group, ``all`` keeps them all.
            source: where the examples come from.
            decoding: how the model writes, where the scorer judges that.
            judge: of a task of another library.

        Raises:
            TaskError: if there are no examples, or two have one id.
        """
        for value, known in ((phrasings, get_args(Phrasings)), (split, get_args(SplitBy)), (scorer, get_args(Scorer))):
            if value not in known:
                raise TaskError(f"the task {name!r} cannot take {value!r}; write one of {', '.join(known)}")
        examples = tuple(replace(e, fact=e.fact or e.id) for e in examples)
        if not examples:
            raise TaskError(f"the task {name!r} has no examples; check the file and its filters")
        ids: set[str] = set()
        for e in examples:
            if e.id in ids:
                raise TaskError(f"the task {name!r} has two examples with the id {e.id!r}; ids must differ")
            ids.add(e.id)
        if phrasings == "rewrite":
            first_of = {(e.group, e.fact): e.id for e in reversed(examples)}
            examples = tuple(e for e in examples if first_of[e.group, e.fact] == e.id)
        if split == "paper":
            cut = len(examples) // 5
            first, rest = examples[:cut], examples[cut:]
        else:
            order = sorted({e.fact for e in examples}, key=lambda fact: hashlib.sha256(f"{seed} {fact}".encode()).digest())
            place = {fact: i for i, fact in enumerate(order)}
            shuffled = sorted(examples, key=lambda e: place[e.fact])
            cut = max(len(order) // 5, min(1, len(order) - 1))
            first = tuple(e for e in shuffled if place[e.fact] < cut)
            rest = tuple(e for e in shuffled if place[e.fact] >= cut)
        return cls(
            name=name,
            validation=Split(name, "validation", tuple(first), scorer, decoding, judge),
            test=Split(name, "test", tuple(rest), scorer, decoding, judge),
            every=Split(name, "all", examples, scorer, decoding, judge),
            source=source,
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
