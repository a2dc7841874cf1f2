"""Guards: texts and questions on which a reduction must not make the model worse, and the harm that is measured there.

A guard has two parts that share nothing. The choice of a search keeps its bound on the one, and the harm of the chosen
reduction is measured once on the other. Without a guard of the user, the model writes the text itself: on samples of the
unchanged model, the mean change of loss is the Kullback-Leibler divergence of the reduced model from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from laserlm.edit.apply import InterventionLike, applied, default_cache
from laserlm.errors import ScoringError
from laserlm.linalg.decomposition import seeded
from laserlm.models.language_model import LanguageModel
from laserlm.paths import atomic_file
from laserlm.scoring.evaluate import Comparison, compare, evaluate_rows
from laserlm.scoring.forward import run_rows
from laserlm.scoring.identity import digest
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.memory import halve_until_it_fits
from laserlm.scoring.model_errors import as_scoring_error, finite_logits
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.scorers import scorer_for
from laserlm.scoring.statistics import Interval
from laserlm.scoring.tokenize import encode, max_length, start_token
from laserlm.searching.scorer import EncodedSplit
from laserlm.tasks import Example, Split, Task, task
from laserlm.tasks.files import local_file, read_text

GuardKind = Literal["text", "questions"]
OWN_TEXT = "self"
"""Name of the guard that the model writes itself."""
PASSAGES = 64
"""Passages of each part of a text."""
PASSAGE_TOKENS = 64
"""Tokens of a passage."""
LEAST_PASSAGES = 8
"""Passages of each part that a text file has to have: an interval over fewer says nothing."""
BATCH = 32
"""Passages that the model writes at the same time."""
SEED_STEP = 1_000_003
"""Distance of the seeds of two texts, so that no passage of one is a passage of the other."""
NO_TOKEN = 2**31 - 1
"""Number that no token has."""
TEXT_METHOD = 1
"""Goes up when the way of writing own text changes, so that no text of the old way is taken from the cache."""
QUESTIONS = 300
"""Most questions of each part of a task."""
TEXT_SUFFIXES = {".txt", ".md", ".text"}

LOSSES_OF_EXAMPLES = ("label", "preference", "similarity")
"""Scorers whose loss is one number for an example, and not a mean over tokens."""


@dataclass(frozen=True)
class Guard:
    """A text or a task on which a reduction must not make the model worse.

    Args:
        name: what the user calls it: ``self``, a file or a task.
        kind: ``text`` or ``questions``.
        choosing: what a search looks at when it chooses.
        measuring: what the harm of its choice is measured on; it shares nothing with ``choosing``.
    """

    name: str
    kind: GuardKind
    choosing: EncodedSplit
    measuring: EncodedSplit

    @property
    def identity(self) -> dict[str, Any]:
        """What the guard consists of, as plain values for the settings of a run."""
        parts = (self.choosing, self.measuring)
        sequences = [(s.ids, s.targets, s.decoder, s.choice_tokens) for part in parts for s in part.sequences]
        # Of choices and pairs, the sequences do not say which answer is right.
        of_parts = [(part.scorer, part.split.hash) for part in parts]
        return {"name": self.name, "n": len(self.choosing.split), "hash": digest({"sequences": sequences, "parts": of_parts})}


@dataclass(frozen=True)
class Harm:
    """What a reduction costs on a guard, measured on text or questions that had no part in the choice.

    Args:
        guard: name of the guard.
        kind: ``text`` or ``questions``.
        comparison: the unchanged and the reduced model. Of a text only the losses mean something.
    """

    guard: str
    kind: GuardKind
    comparison: Comparison

    @property
    def change(self) -> float:
        """Mean change of loss, in nats per token. On text that the model wrote itself, it is the divergence."""
        return self.comparison.edited_loss - self.comparison.base_loss

    @property
    def ratio(self) -> float:
        """``measure`` of the reduced model over that of the unchanged one."""
        return math.exp(self.change)

    @property
    def measure(self) -> str:
        """What the ratio is of: perplexity, or exp(loss) where the loss is not that of the next token."""
        return "exp(loss)" if self.comparison.scorer in LOSSES_OF_EXAMPLES else "perplexity"

    @property
    def error(self) -> float:
        """Standard error of the change, in nats per token; infinite where it is not known."""
        low, high = self.comparison.loss_interval
        return (high - low) / 4

    @property
    def interval(self) -> Interval:
        """95 % interval of the ratio, over passages or facts."""
        low, high = self.comparison.loss_interval
        return Interval(math.exp(low), math.exp(high)) if math.isfinite(high) else Interval(0.0, math.inf)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        interval = list(self.interval) if math.isfinite(self.interval.high) else None
        return {
            "guard": self.guard,
            "kind": self.kind,
            "ratio": self.ratio,
            "interval": interval,
            "divergence": self.change if self.guard == OWN_TEXT else None,
            "comparison": self.comparison.as_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Harm:
        """Return what ``as_dict`` was made of."""
        return cls(values["guard"], values["kind"], Comparison.from_dict(values["comparison"]))

    def __str__(self) -> str:
        low, high = self.interval
        where = {OWN_TEXT: "text that the model wrote"}.get(self.guard, self.guard)
        unit = "passages" if self.kind == "text" else "questions"
        accuracy = "" if self.kind == "text" else f", accuracy {self.comparison.base:.1%} -> {self.comparison.edited:.1%}"
        divergence = f", divergence {self.change:.4f} nats per token" if self.guard == OWN_TEXT else ""
        size = f"{self.comparison.size} {unit}"
        if self.comparison.spearman_text:
            least, most = self.comparison.loss_interval
            return f"loss {self.change:+.3f} [{least:+.3f}, {most:+.3f}] on {where}{self.comparison.spearman_text} ({size})"
        return f"{self.measure} x{self.ratio:.3f} [{low:.3f}, {high:.3f}] on {where}{accuracy} ({size}){divergence}"


def guards_of(lm: LanguageModel, sources: Sequence[str | Task] | None, *, seed: int = 0) -> list[Guard]:
    """Return the guards of a search.

    Args:
        lm: the unchanged model.
        sources: of each guard a text file, a task or its name, or ``self`` for text that the model writes. None takes
            ``self`` for a model that writes text, and no guard for others.
        seed: of the text that the model writes.

    Raises:
        LaserError: if a guard cannot be read or scored.
    """
    if sources is None:
        sources = [OWN_TEXT] if can_write(lm) else []
    return [_guard(lm, source, seed) for source in sources]


def has_guard(lm: LanguageModel, sources: Sequence[str | Task] | None) -> bool:
    """Return whether ``guards_of`` returns any."""
    return can_write(lm) if sources is None else bool(sources)


def measure_harm(
    lm: LanguageModel, guard: Guard, intervention: InterventionLike, batch_size: int = 32, confidence: float = 0.95
) -> Harm:
    """Return what an intervention costs on the measuring part of a guard.

    Args:
        lm: the unchanged model.
        guard: one of ``guards_of``.
        intervention: text such as ``27.fc_in@0.01``.
        batch_size: sequences in one forward pass.
        confidence: of the interval.

    Raises:
        LaserError: as ``applied`` and ``evaluate``.
    """
    part = guard.measuring
    evaluations = []
    for current in ("", intervention):
        with applied(lm, current):
            evaluations.append(
                evaluate_rows(
                    *(lm, part.split, part.scorer, part.sequences),
                    lambda: run_rows(lm, part.sequences, batch_size),
                    batch_size,
                )
            )
    base, edited = evaluations
    return Harm(guard.name, guard.kind, compare(base, edited, confidence=confidence))


def is_text(source: str) -> bool:
    """Return whether a guard's name means a text: a text file, or text that the model writes."""
    return source == OWN_TEXT or Path(source).suffix.lower() in TEXT_SUFFIXES


def can_write(lm: LanguageModel) -> bool:
    """Return whether a model can write a text from nothing."""
    writes = lm.kind == "causal" and lm.tokenizer is not None and lm.model.can_generate()
    return writes and bool(start_token(lm.tokenizer))


def _guard(lm: LanguageModel, source: str | Task, seed: int) -> Guard:
    if source == OWN_TEXT:
        if not can_write(lm):
            raise ScoringError(
                f"{lm.name} ({lm.kind}) writes no text of its own; name a task whose questions it must keep "
                "answering: --guard TASK (guards=['TASK'])"
            )
        rows = own_text(lm, 2 * PASSAGES, seed)
        return _of_tokens(lm, OWN_TEXT, rows[:PASSAGES], rows[PASSAGES:])
    if isinstance(source, str) and is_text(source):
        return _of_file(lm, source, local_file(source.removeprefix("perplexity:")))
    questions = source if isinstance(source, Task) else task(source)
    choosing, test = questions.validation.limit(QUESTIONS), questions.test
    asked = {e.question for e in choosing}  # published splits may share questions
    measuring = replace(test, examples=tuple(e for e in test if e.question not in asked)).limit(QUESTIONS)
    if not (len(choosing) and len(measuring)):
        raise ScoringError(
            f"the guard {questions.name} has {len(choosing)} questions to choose by and {len(measuring)} others to measure on; "
            "it needs both: give more questions"
        )
    parts = [choosing, measuring]
    scorer = scorer_for(lm.kind, questions.validation.scorer)
    encoded = [EncodedSplit(part, encode(lm, part.examples, scorer), scorer) for part in parts]
    return Guard(questions.name, "questions", *encoded)


def _of_file(lm: LanguageModel, name: str, file: Path) -> Guard:
    """Return the guard of a text file: passages of its first half to choose by, of its second half to measure on."""
    if lm.kind != "causal":
        raise ScoringError(
            f"{lm.name} ({lm.kind}) has no perplexity on a text; name a task whose questions it must keep "
            "answering: --guard TASK (guards=['TASK'])"
        )
    ids = list(lm.require_tokenizer()(read_text(file), add_special_tokens=False).input_ids)
    half = len(ids) // 2
    if half < LEAST_PASSAGES * PASSAGE_TOKENS:
        raise ScoringError(
            f"the guard {name} has {len(ids)} tokens; it needs {2 * LEAST_PASSAGES * PASSAGE_TOKENS} at least, better "
            f"{2 * PASSAGES * PASSAGE_TOKENS}: give a longer text"
        )
    start = start_token(lm.tokenizer)
    return _of_tokens(lm, name, *[[start + p for p in _passages(part)] for part in (ids[:half], ids[half:])])


def _passages(ids: list[int]) -> list[list[int]]:
    """Return passages at equal distances."""
    n = min(PASSAGES, len(ids) // PASSAGE_TOKENS)
    step = len(ids) // n
    return [ids[i * step : i * step + PASSAGE_TOKENS] for i in range(n)]


def _of_tokens(lm: LanguageModel, name: str, choosing: Sequence[list[int]], measuring: Sequence[list[int]]) -> Guard:
    """Return the guard of passages of tokens, the first of which is not scored."""

    def encoded(part: str, rows: Sequence[list[int]]) -> EncodedSplit:
        texts = [str(lm.require_tokenizer().decode(ids[1:])) for ids in rows]
        examples = tuple(Example(id=f"{part} {i}", prompt="", answer=text) for i, text in enumerate(texts))
        sequences = [
            TokenSequence(i, tuple(ids[:-1]), tuple(ids[1:]), tuple(range(len(ids) - 1))) for i, ids in enumerate(rows)
        ]
        return EncodedSplit(Split(name, part, examples, "perplexity"), sequences, "perplexity")

    return Guard(name, "text", encoded("choosing", choosing), encoded("measuring", measuring))


def own_text(
    lm: LanguageModel,
    n: int,
    seed: int,
    tokens: int | None = None,
    on_tokens: Callable[[int, int], object] = lambda done, total: None,
) -> list[list[int]]:
    """Return texts that the model writes at temperature 1, as tokens; the first of each is the one that starts a text.

    They are kept in the cache, so that a search that continues elsewhere with the same cache has the same texts. After an
    interruption, the batches that were finished are not written again.

    Args:
        lm: the model.
        n: number of texts.
        seed: of the texts.
        tokens: number of tokens of each text after the first; None takes ``PASSAGE_TOKENS``. The model may read fewer.
        on_tokens: called with the number of tokens that are written, and with that of all.
    """
    tokens = min(PASSAGE_TOKENS if tokens is None else tokens, max_length(lm) - 1)
    file = lm.cache / "texts" / f"{digest([lm.hash, str(lm.dtype), n, tokens, seed, TEXT_METHOD])}.json"
    if (rows := _read_text(file)) is not None:
        return rows
    written: dict[int, list[int]] = {}
    parts: list[Path] = []

    def write(batch: Sequence[int]) -> None:
        part = file.with_name(f"{file.stem}-{batch[0]}-{len(batch)}.json")
        parts.append(part)
        of_batch = _read_text(part)
        if of_batch is None:
            before, size = len(written) * tokens, len(batch)
            counter = _TokenCounter(lambda done: on_tokens(before + done * size, n * tokens))
            of_batch = _sampled(lm, size, tokens, SEED_STEP * seed + batch[0], counter)
            _keep_text(part, of_batch)
        written.update(zip(batch, of_batch, strict=True))

    batches = [range(i, min(i + BATCH, n)) for i in range(0, n, BATCH)]
    halve_until_it_fits(batches, write, default_cache(lm.cache).clear)
    rows = [written[i] for i in range(n)]
    _keep_text(file, rows)
    with suppress(OSError):
        for part in parts:
            part.unlink(missing_ok=True)
    return rows


def _read_text(file: Path) -> list[list[int]] | None:
    with suppress(OSError, ValueError):
        rows: list[list[int]] = json.loads(file.read_text(encoding="utf-8"))
        return rows
    return None


def _keep_text(file: Path, rows: list[list[int]]) -> None:
    with suppress(OSError), atomic_file(file) as part:
        part.write_text(json.dumps(rows), encoding="utf-8")


class _TokenCounter(StoppingCriteria):
    """Stop no text, and pass the number of tokens on that each text has after its first."""

    def __init__(self, on_step: Callable[[int], object]) -> None:
        self._on_step = on_step

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Return False for each text."""
        self._on_step(input_ids.shape[1] - 1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """Let a model write without its own settings, such as tokens that it suppresses."""
    settings = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        yield
    finally:
        model.generation_config = settings


@torch.no_grad()
def _sampled(lm: LanguageModel, n: int, tokens: int, seed: int, counter: _TokenCounter) -> list[list[int]]:
    start = torch.tensor([start_token(lm.tokenizer)] * n, device=lm.device)
    model: Any = lm.model
    with (
        _without_settings(model),
        seeded(seed),
        fast_cpu_kernels(lm.device, tokens),
        as_scoring_error(lm),
    ):
        ids = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            max_new_tokens=tokens,
            # No token ends a text: what the model writes after one is a sample too.
            eos_token_id=NO_TOKEN,
            pad_token_id=start_token(lm.tokenizer)[0],
            logits_processor=finite_logits(lm),
            stopping_criteria=StoppingCriteriaList([counter]),
        )
    return [list(map(int, row)) for row in ids.tolist()]
