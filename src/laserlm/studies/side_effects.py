"""Side effects of a reduction on general text, neutral prompts and other tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from laserlm.edit import applied
from laserlm.errors import AnalysisError
from laserlm.models.finite import overflow
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import short_form
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.output_layer import float32_output_layer
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import Interval
from laserlm.scoring.tokenize import decoder_start, max_length
from laserlm.studies.estimates import Estimate, paired_estimates


@dataclass(frozen=True)
class OnText:
    """Perplexity on a general text.

    Args:
        base: perplexity of the unchanged model, per token over all passages.
        edited: perplexity of the reduced model.
        ratio: exponential of the mean over passages of the change of loss; its interval is over passages.
    """

    base: float = field(metadata={"json": "before"})
    edited: float = field(metadata={"json": "after"})
    ratio: Estimate


@dataclass(frozen=True)
class Transfer:
    """One intervention on one task: a cell of the transfer matrix.

    Args:
        intervention: text of the intervention.
        chosen_on: the task that it was chosen on.
        scored_on: the task of these scores.
        base: accuracy of the unchanged model; None for a general text, which has no right answers.
        edited: accuracy under the intervention; None for a general text.
        gain: paired gain in accuracy; over no examples for a general text.
        loss_change: paired change of the loss, in nats per answer token.
    """

    intervention: str
    chosen_on: str
    scored_on: str
    base: float | None = field(metadata={"json": "before"})
    edited: float | None = field(metadata={"json": "after"})
    gain: Estimate
    loss_change: Estimate


def neutral_prompts() -> list[str]:
    """Return forty plain English sentences that ask for no fact."""
    text = (files(__package__) / "data" / "neutral.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]


def on_text(base: Evaluation, reduced: Evaluation) -> OnText:
    """Compare the perplexity of a text, scored passage by passage.

    Raises:
        ScoringError: if the two are not of the same passages.
    """
    _, change = paired_estimates(base, reduced)
    single = math.isinf(change.interval.low)
    ends = change.interval if single else Interval(*map(math.exp, change.interval))
    return OnText(base.perplexity, reduced.perplexity, Estimate(math.exp(change.value), ends, change.n))


def transfer(base: Evaluation, reduced: Evaluation, chosen_on: str) -> Transfer:
    """Compare a reduced model with the unchanged one on a task that it was not chosen on, or on its own.

    Raises:
        ScoringError: if the two are not of the same examples.
    """
    gain, change = paired_estimates(base, reduced)
    if base.scorer == "perplexity":  # where nothing is right or wrong
        return Transfer(reduced.intervention, chosen_on, base.task, None, None, Estimate.empty(), change)
    return Transfer(reduced.intervention, chosen_on, base.task, base.accuracy, reduced.accuracy, gain, change)


@torch.no_grad()
def divergence(
    lm: LanguageModel,
    texts: Sequence[str],
    intervention: str,
    *,
    batch_size: int = 32,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Return the Kullback-Leibler divergence of the reduced model from the unchanged model on each text.

    It is sum p log(p / q) in nats, with p of the unchanged and q of the reduced model, as a mean over the tokens of the text.
    A causal model predicts the token after each token, a masked model the token at each position. An encoder-decoder reads
    the text and predicts only the first token of its answer.

    Args:
        lm: the unchanged model.
        texts: the texts.
        intervention: text of the reduction.
        batch_size: texts in one forward pass.
        seed: of ``:reference`` decompositions.
        on_batch: called with the number of texts done and their total.

    Raises:
        AnalysisError: if there are no texts, one is too long, or a divergence is not finite.
        ModelError: if the model has no tokenizer or no head.
    """
    tokenizer = lm.require_tokenizer()
    if not texts:
        raise AnalysisError("there are no prompts to compare the models on; give a file with one on each line")
    for text, ids in zip(texts, tokenizer(list(texts)).input_ids, strict=True):
        if len(ids) > max_length(lm):
            raise AnalysisError(
                f"the prompt {text[:40]!r}... has {len(ids)} tokens; {lm.name} takes {max_length(lm)}: shorten it"
            )
    divergences: list[float] = []
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        inputs = tokenizer(part, return_tensors="pt", padding=True, padding_side="right").to(lm.device)
        mask = inputs["attention_mask"].bool()
        if lm.kind == "encoder-decoder":
            starts = torch.tensor([decoder_start(lm)] * len(part), device=lm.device)
            inputs["decoder_input_ids"], mask = starts, torch.zeros_like(starts, dtype=torch.bool)
            mask[:, -1] = True
        p, q = (_predictions(lm, inputs, text, seed) for text in ("", intervention))
        each = torch.where(mask, kl_div(q, p, reduction="none", log_target=True).sum(-1), 0.0)  # (B, T)
        divergences += (each.sum(1) / mask.sum(1)).tolist()
        if on_batch is not None:
            on_batch(len(divergences), len(texts))
    if not all(map(math.isfinite, divergences)):
        cause = overflow(lm.model, lm.dtype)
        raise AnalysisError(f"{short_form(intervention)} has no finite divergence on these prompts: {cause}")
    return divergences


def _predictions(lm: LanguageModel, inputs: Any, intervention: str, seed: int) -> Tensor:
    """Return log-probabilities (B, T, V). Where the model is in half precision, they are of logits in float32."""
    length = inputs["input_ids"].shape[1]
    with (
        applied(lm, intervention, seed=seed) if intervention else nullcontext(),
        fast_cpu_kernels(lm.device, length),
        float32_output_layer(lm.model, is_module=False),
    ):
        logits: Tensor = lm.model(**inputs).logits
    return logits.float().log_softmax(-1)
