"""What a reduction does beside its task: to general text, to neutral prompts and to other tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from laserlm.edit import applied
from laserlm.errors import AnalysisError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import Interval
from laserlm.scoring.tokenize import decoder_start, max_length
from laserlm.studies.estimates import Estimate, paired_estimates

__all__ = ["OnText", "Transfer", "divergence", "neutral_prompts", "on_text", "transfer"]


@dataclass(frozen=True)
class OnText:
    """Perplexity on a general text.

    Args:
        before: of the unchanged model, per token over all passages.
        after: of the reduced one.
        ratio: exponential of the mean over passages of the change of loss; its interval is over passages.
    """

    before: float
    after: float
    ratio: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {"before": self.before, "after": self.after, "ratio": self.ratio.as_dict()}


@dataclass(frozen=True)
class Transfer:
    """One intervention on one task: a cell of the transfer matrix.

    Args:
        intervention: its text.
        chosen_on: the task that it was chosen on.
        scored_on: the task of these scores.
        before: accuracy of the unchanged model; None of a text, where nothing is right or wrong.
        after: accuracy under the intervention, likewise.
        gain: in accuracy, paired; over no examples of a text.
        loss_change: of the loss in nats per answer token, paired.
    """

    intervention: str
    chosen_on: str
    scored_on: str
    before: float | None
    after: float | None
    gain: Estimate
    loss_change: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        names = ("intervention", "chosen_on", "scored_on", "before", "after")
        return {n: getattr(self, n) for n in names} | {n: getattr(self, n).as_dict() for n in ("gain", "loss_change")}


def neutral_prompts() -> list[str]:
    """Return forty plain English sentences that ask for no fact; made for this."""
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
        return Transfer(reduced.intervention, chosen_on, base.task, None, None, Estimate.none(), change)
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
    """Return for each text the Kullback-Leibler divergence of the reduced model's predictions from the unchanged model's.

    It is sum p log(p / q) in nats, p of the unchanged model and q of the reduced one, mean over the text's tokens: over the
    predictions that follow each of them, for a masked model over those in their places. An encoder-decoder reads the text
    and predicts the first token of its answer.

    Args:
        lm: the unchanged model.
        texts: some.
        intervention: text of the reduction.
        batch_size: texts in one forward pass.
        seed: of ``:reference`` decompositions.
        on_batch: called with the number of texts done and their total.

    Raises:
        AnalysisError: if there are no texts, one is too long, or a divergence is not finite.
        ModelError: if the model has no tokenizer or no head.
    """
    tokenizer = lm.need_tokenizer()
    if not texts:
        raise AnalysisError("there are no prompts to compare the models on; give a file with one on each line")
    for text, ids in zip(texts, tokenizer(list(texts)).input_ids, strict=True):
        if len(ids) > max_length(lm):
            raise AnalysisError(
                f"the prompt {text[:40]!r}... has {len(ids)} tokens; {lm.name} takes {max_length(lm)}: shorten it"
            )
    found: list[float] = []
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
        found += (each.sum(1) / mask.sum(1)).tolist()
        if on_batch is not None:
            on_batch(len(found), len(texts))
    if not all(map(math.isfinite, found)):
        raise AnalysisError(f"{intervention} overflows {lm.dtype} on these prompts; load the model with dtype float32")
    return found


def _predictions(lm: LanguageModel, inputs: Any, intervention: str, seed: int) -> Tensor:
    """Return log-probabilities (B, T, V) in float32."""
    length = inputs["input_ids"].shape[1]
    with applied(lm, intervention, seed=seed) if intervention else nullcontext(), fast_cpu_kernels(lm.device, length):
        logits: Tensor = lm.model(**inputs).logits
    return logits.float().log_softmax(-1)
