"""Score a model on the examples of a split, and compare two evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from laserlm.errors import ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.forward import Progress, TokenScores, out_of_memory_error, run_rows
from laserlm.scoring.generation import generate_for
from laserlm.scoring.grading import check_graded, grade
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.scoring.statistics import Interval, mcnemar, paired_difference, paired_mean
from laserlm.scoring.tokenize import TokenSequence, encode
from laserlm.tasks.example import GENERATING, Example, Judge, Scorer, Split

__all__ = ["Comparison", "classes_of", "compare", "evaluate", "evaluate_rows"]


def evaluate(
    lm: LanguageModel,
    split: Split,
    *,
    scorer: Scorer | None = None,
    batch_size: int = 32,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Score every example of a split in batches sorted by length, padded on the left for causal models.

    Args:
        lm: the model, under whatever intervention is applied at the moment.
        split: the examples.
        scorer: None takes the task's own. ``next_token``: the most likely next token, decoded, is the answer, case and
            outer spaces aside (arXiv 2312.13558); a masked model has one mask, and its loss is of the answer's first token.
            ``first_token``: it is the answer's first token, and only that token counts for the loss. ``answer``: the most
            likely tokens are all of the answer's, as greedy decoding would give them (a masked model fills one mask for
            each at once). ``top5``, ``top10``: the answer's first token is among so many most likely ones; only that token
            counts for the loss. ``choice``: the answer has a strictly higher log-probability, summed over its tokens, than
            every other choice. ``perplexity``: a text's tokens, in windows; nothing is right or wrong. ``lm_eval``: as
            lm-evaluation-harness tells from the log-probabilities that it asks for. The others let the model write:
            ``contains`` (the answer, or an alias, occurs in it), ``exact_match`` (it is the answer), ``number`` (its last
            number is the answer), ``program`` (it passes its tests), ``rollout`` (what it plays
            reaches the end that the split's judge tells of), ``lm_eval_text`` (the harness says so).
        batch_size: sequences in one forward pass; halved where CUDA's memory runs out.
        on_progress: called with the number of sequences done and their total.

    Raises:
        ScoringError: if the split is empty, the model takes no such sequences, or a log-probability is not finite.
        TokenizationError: if an answer's tokens cannot be told from its prompt's.
        ModelError: if the model has no head or no tokenizer.
    """
    scorer = scorer or split.scorer
    if scorer not in get_args(Scorer):
        raise ScoringError(f"no scorer {scorer!r}; there are {', '.join(get_args(Scorer))}")
    if batch_size < 1:
        raise ScoringError(f"a batch size of {batch_size} holds no sequence; write 1 or more")
    if not len(split):
        raise ScoringError(f"the {split.name} split of {split.task} is empty; give more examples, or use --split all")
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
    """Score a split whose rows are encoded already, by whatever way of running them through the model.

    Args:
        lm: the model, under whatever intervention is applied at the moment.
        split: the examples.
        scorer: as the rows were encoded for.
        rows: what ``encode`` made of the examples.
        run: returns the outcome of every row, in order.
        batch_size: prompts that are continued at a time, where the model writes.
        on_progress: called with the number of prompts continued and their total.

    Raises:
        ScoringError: if a log-probability is not finite, or programs would have to be run and that was not allowed.
        torch.OutOfMemoryError: if a single prompt that the model continues does not fit into memory.
    """
    check_graded(split, scorer)  # before the model has written for hours
    tokenizer = lm.need_tokenizer()
    start = time.perf_counter()
    outcomes = run()
    by_example: dict[int, list[tuple[TokenSequence, TokenScores]]] = {}
    for row, outcome in zip(rows, outcomes, strict=True):
        by_example.setdefault(row.example, []).append((row, outcome))
    if scorer in GENERATING:
        _check_finite(lm, [(e.id, sum(o.logprobs)) for i, e in enumerate(split.examples) for _, o in by_example[i]])
        texts = generate_for(lm, split.examples, split.decoding, batch_size, on_progress)
        judged = grade(split, scorer, texts)
        scores = tuple(
            _written(e, by_example[i], of[0], right, figures)
            for i, (e, of, (right, figures)) in enumerate(zip(split.examples, texts, judged, strict=True))
        )
    else:
        scores = tuple(_score(tokenizer, e, scorer, by_example[i], split.judge) for i, e in enumerate(split.examples))
    seconds = time.perf_counter() - start
    _check_finite(lm, [(s.id, s.logprob) for s in scores])
    return Evaluation(
        model=lm.name,
        task=split.task,
        split=split.name,
        scorer=scorer,
        intervention=lm.intervention,
        scores=scores,
        seconds=seconds,
        classes=classes_of(split, scorer),
    )


def _check_finite(lm: LanguageModel, logprobs: Sequence[tuple[str, float]]) -> None:
    broken = next(((id_, logprob) for id_, logprob in logprobs if not math.isfinite(logprob)), None)
    if broken is not None:
        raise ScoringError(
            f"{lm.intervention or 'the unchanged model'} gives example {broken[0]!r} a log-probability of {broken[1]}; "
            "the model overflows its dtype: load it with dtype float32 or bfloat16"
        )


def classes_of(split: Split, scorer: Scorer) -> tuple[str, ...]:
    """Return the choices where all examples of a split share them, else nothing."""
    shared = {frozenset(e.choices) for e in split.examples} if scorer == "choice" else set()
    return split.examples[0].choices if len(shared) == 1 else ()


def _written(
    e: Example, ran: Sequence[tuple[TokenSequence, TokenScores]], text: str, right: bool, figures: dict[str, float]
) -> ExampleScore:
    logprob = math.fsum(x for _, outcome in ran for x in outcome.logprobs)
    tokens = sum(len(row.targets) for row, _ in ran)
    return ExampleScore(e.id, right, logprob, tokens, text.strip(), e.answer, e.group, figures)  # a long answer is kept once


def _score(
    tokenizer: Any, e: Example, scorer: Scorer, ran: Sequence[tuple[TokenSequence, TokenScores]], judge: Judge | None
) -> ExampleScore:
    if scorer == "perplexity":
        hits = all(a == t for row, outcome in ran for a, t in zip(outcome.argmax, row.targets, strict=True))
        return _written(e, ran, "", hits, {})
    if scorer == "lm_eval":
        if judge is None:
            raise ScoringError(f"example {e.id!r} has no judge of its own; use another scorer")
        said = [
            (math.fsum(outcome.logprobs), all(a == t for a, t in zip(outcome.argmax, row.targets, strict=True)))
            for row, outcome in ran
        ]
        correct, figures = judge(e, list(said))
        best = max(range(len(said)), key=lambda i: said[i][0])
        tokens, predicted = len(ran[e.right][0].targets), e.pairs[best][1].strip()
        return ExampleScore(e.id, correct, said[e.right][0], tokens, predicted, e.answer.strip(), e.group, figures)
    if scorer == "choice":
        right = e.choices.index(e.answer)
        totals = ran[0][1].options or [math.fsum(outcome.logprobs) for _, outcome in ran]
        best = max(range(len(totals)), key=totals.__getitem__)
        correct = all(totals[right] > t for i, t in enumerate(totals) if i != right)
        tokens = 1 if ran[0][0].options else len(ran[right][0].targets)
        return ExampleScore(e.id, correct, totals[right], tokens, e.choices[best].strip(), e.answer.strip(), e.group)
    row, outcome = ran[0]
    if scorer in ("top5", "top10"):
        correct = outcome.ranks[0] < int(scorer.removeprefix("top"))
        predicted = str(tokenizer.decode(outcome.argmax[:1]))
    elif scorer == "answer":
        same = [a == t for a, t in zip(outcome.argmax, row.targets, strict=True)]
        # Past its first miss, the most likely token is not what greedy decoding would have gone on with.
        greedy = outcome.argmax[: same.index(False) + 1] if False in same else outcome.argmax
        correct, predicted = all(same), str(tokenizer.decode(greedy))
    else:
        predicted = str(tokenizer.decode(outcome.argmax[:1]))
        correct = (
            outcome.argmax[0] == row.targets[0]
            if scorer == "first_token"
            else predicted.strip().lower() == e.answer.strip().lower()
        )
    logprob = math.fsum(outcome.logprobs)
    return ExampleScore(e.id, correct, logprob, len(row.targets), predicted.strip(), e.answer.strip(), e.group)


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of one model on the same examples, pair by pair.

    Args:
        split: name of the split.
        intervention: what ``edited`` was scored under.
        n: number of examples.
        base: accuracy before.
        edited: accuracy after.
        gain: ``edited - base``.
        interval: 95 % Tango score interval of the gain.
        mcnemar_p: exact two-sided McNemar p-value.
        corrected: examples wrong before and right after.
        broken: examples right before and wrong after.
        base_loss: mean log-loss before, in nats per answer token.
        edited_loss: mean log-loss after.
        loss_interval: 95 % Student interval of the mean change of loss (negative is better).
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

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        loss_interval = list(self.loss_interval) if math.isfinite(self.loss_interval.low) else None  # a single pair
        return {**asdict(self), "interval": list(self.interval), "loss_interval": loss_interval}

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.split}: {self.base:.1%} -> {self.edited:.1%} under {self.intervention or 'base'}, "
            f"gain {self.gain:+.1%} [{low:+.1%}, {high:+.1%}], McNemar p {self.mcnemar_p:.2g}, "
            f"{self.corrected} corrected, {self.broken} broken, n {self.n}; "
            f"loss {self.base_loss:.3f} -> {self.edited_loss:.3f}"
        )


def compare(base: Evaluation, edited: Evaluation) -> Comparison:
    """Compare two evaluations of the same examples under the same scorer, in pairs.

    Raises:
        ScoringError: if they do not hold the same examples in the same order, or were scored differently.
    """
    keys = [[(e.task, e.scorer), *((s.id, s.answer) for s in e.scores)] for e in (base, edited)]
    if keys[0] != keys[1]:
        raise ScoringError(
            f"cannot compare {base.task}/{base.split} by {base.scorer} with {edited.task}/{edited.split} by {edited.scorer}: "
            "both must hold the same examples in the same order, scored alike"
        )
    pairs = list(zip(base.scores, edited.scores, strict=True))
    corrected = sum(not a.correct and b.correct for a, b in pairs)
    lost = sum(a.correct and not b.correct for a, b in pairs)
    return Comparison(
        split=edited.split,
        intervention=edited.intervention,
        n=edited.n,
        base=base.accuracy,
        edited=edited.accuracy,
        gain=(corrected - lost) / edited.n,
        interval=paired_difference(corrected, lost, edited.n),
        mcnemar_p=mcnemar(corrected, lost),
        corrected=corrected,
        broken=lost,
        base_loss=base.loss,
        edited_loss=edited.loss,
        loss_interval=paired_mean([b.loss - a.loss for a, b in pairs]),
    )
