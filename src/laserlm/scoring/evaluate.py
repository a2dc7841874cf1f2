"""Score a model on the examples of a split, and compare two evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from laserlm.errors import ScoringError
from laserlm.models.finite import overflow
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import short_form
from laserlm.scoring.forward import Progress, out_of_memory_error, run_rows
from laserlm.scoring.generation import generate_for
from laserlm.scoring.records import Evaluation, ExampleScore, TokenScores, TokenSequence
from laserlm.scoring.scorers import SCORERS, ScoredExample, check_split, grade_texts, scorer_for
from laserlm.scoring.statistics import Interval, clustering_of, in_points, paired_difference, paired_mean, sign_flip_test
from laserlm.scoring.tokenize import encode
from laserlm.tasks.example import Scorer, Split
from laserlm.tasks.perplexity import passages


def evaluate(
    lm: LanguageModel,
    split: Split,
    *,
    scorer: Scorer | None = None,
    batch_size: int = 32,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Score every example of a split.

    Args:
        lm: the model, with the intervention that is applied at the moment.
        split: the examples.
        scorer: one of ``laserlm.scoring.scorers.SCORERS``, which says when an example is correct. None takes the task's own.
        batch_size: sequences in one forward pass. It is halved where memory runs out.
        on_progress: called with the number of sequences done and their total.

    Raises:
        ScoringError: if the split is empty, the model takes no such sequences, or a log-probability is not finite.
        TokenizationError: if an answer's tokens cannot be separated from its prompt's.
        ModelError: if the model has no head or no tokenizer.
    """
    scorer = scorer or scorer_for(lm.kind, split.scorer)
    if scorer not in SCORERS:
        raise ScoringError(f"no scorer {scorer!r}; there are {', '.join(SCORERS)}")
    if batch_size < 1:
        raise ScoringError(f"a batch size of {batch_size} holds no sequence. Write 1 or more.")
    if not len(split):
        raise ScoringError(f"the {split.name} split of {split.task} is empty. Give more examples, or use --split all.")
    rows = encode(lm, split.examples, scorer)
    try:
        return evaluate_rows(
            lm, split, scorer, rows, lambda: run_rows(lm, rows, batch_size, on_progress), batch_size, on_progress
        )
    except torch.OutOfMemoryError as error:
        raise out_of_memory_error(lm, error) from None


def evaluate_rows(
    lm: LanguageModel,
    split: Split,
    scorer: Scorer,
    rows: Sequence[TokenSequence],
    run: Callable[[], Sequence[TokenScores]],
    batch_size: int = 32,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Score a split whose examples are tokenised already.

    Args:
        lm: the model, with the intervention that is applied at the moment.
        split: the examples.
        scorer: the scorer that the examples were tokenised for.
        rows: the sequences that ``encode`` returned.
        run: returns the token scores of every sequence, in order.
        batch_size: prompts in one batch of generations.
        on_progress: called with the number of prompts continued and their total.

    Raises:
        ScoringError: if a log-probability is not finite, or running programs is not allowed.
        torch.OutOfMemoryError: if generating from a single prompt does not fit into memory.
    """
    check_split(split, scorer)  # before hours of generation
    decode = _decoder(lm)
    start = time.perf_counter()
    by_example: dict[int, tuple[list[TokenSequence], list[TokenScores]]] = {}
    for row, outcome in zip(rows, run(), strict=True):
        example_rows, outcomes = by_example.setdefault(row.example, ([], []))
        example_rows.append(row)
        outcomes.append(outcome)
    scored = [ScoredExample(e, *by_example[i], decode, split.judge) for i, e in enumerate(split.examples)]
    scores: tuple[ExampleScore, ...]
    if grade := SCORERS[scorer].grade_tokens:
        scores = tuple(map(grade, scored))
    else:
        _check_finite(lm, [x.text_score(False, "", {}) for x in scored])  # before the generation too
        texts = generate_for(lm, split.examples, split.decoding, batch_size, on_progress)
        grades = grade_texts(split, scorer, texts)
        scores = tuple(
            x.text_score(correct, samples[0], metrics)
            for x, samples, (correct, metrics) in zip(scored, texts, grades, strict=True)
        )
    seconds = time.perf_counter() - start
    _check_finite(lm, scores)
    return Evaluation(
        model=lm.name,
        task=split.task,
        split=split.name,
        scorer=scorer,
        intervention=lm.intervention,
        scores=scores,
        seconds=seconds,
        classes=classes_of(split, scorer),
        skipped=split.skipped,
    )


def text_perplexity(lm: LanguageModel, text: str, *, batch_size: int = 32) -> Evaluation:
    """Score a plain text as ``laser evaluate --task perplexity:FILE`` does; ``.perplexity`` and ``.tokens`` hold the result.

    Raises:
        ScoringError: if the text is empty, or a log-probability is not finite.
    """
    return evaluate(lm, Split("perplexity", "all", tuple(passages(text)), "perplexity"), batch_size=batch_size)


def _decoder(lm: LanguageModel) -> Callable[[list[int]], str]:
    """Return what turns targets into a text: of tokens, or of the labels of a classifier."""
    if lm.kind == "classifier":
        names: Any = lm.model.config.id2label
        return lambda ids: str(names[ids[0]])
    tokenizer = lm.require_tokenizer()
    return lambda ids: str(tokenizer.decode(ids))


def _check_finite(lm: LanguageModel, scores: Sequence[ExampleScore]) -> None:
    broken = next((s for s in scores if not math.isfinite(s.logprob)), None)
    if broken is not None:
        raise ScoringError(
            f"{lm.intervention or 'the unchanged model'} gives example {broken.id!r} a log-probability of {broken.logprob}: "
            f"{overflow(lm.model, lm.dtype)}"
        )


def classes_of(split: Split, scorer: Scorer) -> tuple[str, ...]:
    """Return the labels of a split, or the choices if all its examples share them, else nothing."""
    if scorer == "label":
        return tuple(sorted({e.answer for e in split.examples}))
    shared = {frozenset(e.choices) for e in split.examples} if SCORERS[scorer].is_choice else set()
    return split.examples[0].choices if len(shared) == 1 else ()


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two evaluations of one model on the same examples.

    Args:
        split: name of the split.
        intervention: the intervention of ``edited``.
        n: number of examples.
        base: accuracy of the unchanged model.
        edited: accuracy of the edited model.
        gain: ``edited - base``.
        interval: 95 % Tango score interval of the gain, by the variance between facts where questions share them.
        mcnemar_p: exact two-sided p-value of the gain, under a fair coin for each fact; McNemar's for facts of one question.
        corrected: number of examples that only the edited model answers correctly.
        broken: number of examples that only the unchanged model answers correctly.
        base_loss: mean log-loss of the unchanged model, in nats per answer token.
        edited_loss: mean log-loss of the edited model.
        loss_interval: 95 % Student interval of the mean change of loss (negative is better), like ``interval``.
        facts: number of facts that the examples ask for; None if it was not recorded.
        base_spearman: rank correlation of cosines and scores of the unchanged model; None for other scorers.
        edited_spearman: that of the edited model.
        scorer: of the evaluations; None if it was not recorded.
    """

    split: str
    intervention: str
    n: int
    base: float
    edited: float
    gain: float
    interval: Interval
    mcnemar_p: float
    corrected: int
    broken: int
    base_loss: float
    edited_loss: float
    loss_interval: Interval
    facts: int | None = None
    base_spearman: float | None = None
    edited_spearman: float | None = None
    scorer: str | None = None

    @property
    def size(self) -> str:
        """Number of examples as text, with that of their facts where it is smaller."""
        return f"{self.n} of {self.facts} facts" if self.facts and self.facts < self.n else str(self.n)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        loss_interval = list(self.loss_interval) if math.isfinite(self.loss_interval.low) else None  # a single pair
        return {**asdict(self), "interval": list(self.interval), "loss_interval": loss_interval}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """Return the object that ``as_dict`` describes, without what only a later version of laserlm knows."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        loss_interval = Interval(*(known["loss_interval"] or (-math.inf, math.inf)))
        return cls(**known | {"interval": Interval(*known["interval"]), "loss_interval": loss_interval})

    def __repr__(self) -> str:
        return f"Comparison({self})"

    def __str__(self) -> str:
        return (
            f"{self.split}: {self.base:.1%} -> {self.edited:.1%} under {short_form(self.intervention) or 'base'}, "
            f"gain {in_points(self.gain, self.interval)}, exact p {self.mcnemar_p:.2g}, "
            f"{self.corrected} corrected, {self.broken} broken, n {self.size}; "
            f"loss {self.base_loss:.3f} -> {self.edited_loss:.3f}{self.spearman_text}"
        )

    @property
    def spearman_text(self) -> str:
        """Both rank correlations of sentence pairs, after a comma; empty for other scorers."""
        if self.base_spearman is None or self.edited_spearman is None:
            return ""
        return f", Spearman {self.base_spearman:.3f} -> {self.edited_spearman:.3f}"


def compare(base: Evaluation, edited: Evaluation, *, confidence: float = 0.95) -> Comparison:
    """Compare two evaluations of the same examples by the same scorer, in pairs.

    Args:
        base: of the unchanged model.
        edited: of the other one.
        confidence: of both intervals.

    Raises:
        ScoringError: if they do not hold the same examples in the same order, or were scored differently.
    """
    keys = [[(e.task, e.scorer), *((s.id, s.answer) for s in e.scores)] for e in (base, edited)]
    if keys[0] != keys[1]:
        raise ScoringError(
            f"cannot compare {base.task}/{base.split} by {base.scorer} with {edited.task}/{edited.split} by {edited.scorer}: "
            "both must have the same examples in the same order, and the same scorer"
        )
    pairs, facts = list(zip(base.scores, edited.scores, strict=True)), base.facts
    differences = [b.correct - a.correct for a, b in pairs]
    corrected, broken = differences.count(1), differences.count(-1)
    return Comparison(
        split=edited.split,
        intervention=edited.intervention,
        n=edited.n,
        base=base.accuracy,
        edited=edited.accuracy,
        gain=(corrected - broken) / edited.n,
        interval=paired_difference(corrected, broken, edited.n, confidence, clustering=clustering_of(differences, facts)),
        mcnemar_p=sign_flip_test(differences, facts),
        corrected=corrected,
        broken=broken,
        base_loss=base.loss,
        edited_loss=edited.loss,
        loss_interval=paired_mean([b.loss - a.loss for a, b in pairs], confidence, facts=facts),
        facts=len(set(facts)),
        base_spearman=base.spearman,
        edited_spearman=edited.spearman,
        scorer=edited.scorer,
    )
