"""Run token sequences through a model in padded batches and read the scores of their targets."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

from laserlm.edit.apply import default_cache
from laserlm.errors import ScoringError
from laserlm.models.kinds import TEXT_KINDS
from laserlm.models.language_model import LanguageModel
from laserlm.out_of_memory import uniform_out_of_memory
from laserlm.scoring.batch import MAX_SCORED_POSITIONS, PASS_OVERHEAD_TOKENS, Batch, batch_bounds, make_batch
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.memory import halve_until_it_fits
from laserlm.scoring.model_errors import as_scoring_error
from laserlm.scoring.output_layer import HALF, float32_output_layer
from laserlm.scoring.records import TokenScores, TokenSequence
from laserlm.scoring.shared_prompts import (
    Group,
    common_length,
    cost_of_row,
    groups_that_begin_alike,
    joined_length,
    most_tokens,
)
from laserlm.scoring.texts import text_outputs

log = logging.getLogger(__name__)
PADDED_KINDS = ("causal", *TEXT_KINDS)
"""Kinds of models whose scores padding may change, so that it is tested."""
LOGITS_BYTES = 2**23
"""Bytes of the part of the logits, in float32, that is read at a time."""
LOGITS_BYTES_ON_GPU = 2**28
"""The same on a GPU, where an operation takes longer to begin than a small part takes. It was not timed on one."""
LEAST_SAVING = 0.1
"""Share of the work that joined rows have to save. Where they save less, each sequence has a row of its own."""

CHECKED_TOKENS = 128
"""Most tokens of a causal model's rows on which it is tried what does not depend on their length."""

Progress = Callable[[int, int], None]
"""Called with the number of items done and their total."""


@dataclass(frozen=True)
class BatchLogits:
    """The scores of one batch, as tensors.

    Args:
        logprobs: (N,) log-probability of each target, in nats.
        argmax: (N,) most likely token at each position.
        tied: (N,) whether another token is exactly as likely as the most likely one.
        best: (N,) log-probability of the most likely token, in nats.
        choice_logprobs: (B, C) log-probabilities of the choice tokens at each row's first position, in nats.
        ranks: (N,) number of tokens that are more likely than the target; None if no row is ranked.
        last_ranks: (N,) number of other tokens that are at least as likely as the target; None if no row is ranked.
        top: (B, K) most likely tokens at each row's first position, K the largest number of a row; None if that is 0.
    """

    logprobs: Tensor
    argmax: Tensor
    tied: Tensor
    best: Tensor
    choice_logprobs: Tensor
    ranks: Tensor | None
    last_ranks: Tensor | None
    top: Tensor | None


@torch.no_grad()
def run_rows(
    lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int, on_progress: Progress | None = None
) -> list[TokenScores]:
    """Return the token scores of every row, in their order. Rows are batched by length.

    Raises:
        ScoringError: if a single row does not fit into memory.
    """
    outcomes: dict[int, TokenScores] = {}

    def run(groups: Sequence[Group]) -> None:
        is_one_row = len(groups) == 1 < len(groups[0])
        try:
            batch = make_batch(lm, rows, groups)
            outcomes.update(zip(batch.rows, run_batch(lm, batch), strict=True))
        except torch.OutOfMemoryError:
            if not is_one_row:
                raise
        if groups[0][0] not in outcomes:  # what does not fit as one row, may fit in rows of their own
            for i in groups[0]:
                run([(i,)])
        if on_progress is not None:
            on_progress(len(outcomes), len(rows))

    try:
        halve_until_it_fits(_batches_of_groups(lm, rows, batch_size, joined=True), run, default_cache(lm.cache).clear)
    except torch.OutOfMemoryError as error:
        raise out_of_memory_error(lm, error) from None
    return [outcomes[i] for i in range(len(rows))]


def out_of_memory_error(lm: LanguageModel, error: torch.OutOfMemoryError) -> ScoringError:
    """Return the error for a single row that does not fit into memory."""
    return ScoringError(
        f"a single row does not fit into the memory of {lm.device}: {error}. Load the model with a smaller dtype, or spread "
        "it with a device_map."
    )


@torch.no_grad()
def batches(lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int, *, joined: bool = False) -> list[Batch]:
    """Return the rows in batches, the longest first: this saves padding, and memory runs out at once if it ever does.

    Args:
        lm: the model.
        rows: the sequences.
        batch_size: sequences in a batch.
        joined: whether sequences that begin alike may be one row of the model's inputs.
    """
    return [make_batch(lm, rows, groups) for groups in _batches_of_groups(lm, rows, batch_size, joined=joined)]


@torch.no_grad()
def _batches_of_groups(lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int, *, joined: bool) -> list[list[Group]]:
    """Return batches of groups of indices; each group is one row of the model's inputs."""
    lm.require_evaluation_mode()
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    try:
        if lm.kind in PADDED_KINDS and lm.pads_exactly is None:
            lm.pads_exactly = _pads_exactly(lm, rows[order[0]], rows[order[-1]])
        if lm.reads_positions is None:
            lm.reads_positions = _reads_positions(lm, rows[order[-1]])
        # Under an intervention a model may show nothing of how it treats the mask.
        is_open = lm.shares_prompts is None and not lm.active
        if joined and is_open and lm.kind == "causal" and lm.pads_exactly and lm.reads_positions:
            lm.shares_prompts = _shares_prompts(lm, rows, batch_size)
    except torch.OutOfMemoryError:
        log.warning("two rows do not fit into the memory of %s; scoring without padding", lm.device)
    batch_size = max(1, min(batch_size, MAX_SCORED_POSITIONS // max(len(r.positions) for r in rows)))
    separate = _cut(lm, rows, [(i,) for i in range(len(rows))], batch_size)
    # A batch with a joined row has a mask for each pair of tokens, which takes the window away from its long rows too.
    if not (joined and lm.shares_prompts) or len(rows[order[0]].ids) > most_tokens(lm):
        return separate
    together = _cut(lm, rows, groups_that_begin_alike(lm, rows, batch_size), batch_size)
    return together if _cost(rows, together) <= (1 - LEAST_SAVING) * _cost(rows, separate) else separate


def _cut(lm: LanguageModel, rows: Sequence[TokenSequence], groups: Sequence[Group], batch_size: int) -> list[list[Group]]:
    """Cut groups into batches, the longest first."""
    length = {group: joined_length(rows, group) for group in groups}
    ordered = sorted(groups, key=lambda group: (-length[group], group))
    if lm.kind in PADDED_KINDS and not lm.pads_exactly:
        same_length = [list(same) for _, same in groupby(ordered, key=length.__getitem__)]
        return [same[i : i + batch_size] for same in same_length for i in range(0, len(same), batch_size)]
    overhead = PASS_OVERHEAD_TOKENS if lm.device.type == "cpu" else math.inf
    bounds = batch_bounds([length[group] for group in ordered], batch_size, overhead, [len(group) for group in ordered])
    return [ordered[a:b] for a, b in bounds]


def _cost(rows: Sequence[TokenSequence], batches_: Sequence[Sequence[Group]]) -> float:
    """Return the work of batches, in tokens: padding, attention and the overhead of passes included."""
    lengths = [[joined_length(rows, group) for group in groups] for groups in batches_]
    return sum(PASS_OVERHEAD_TOKENS + len(of) * cost_of_row(max(of)) for of in lengths)


def _pads_exactly(lm: LanguageModel, long: TokenSequence, short: TokenSequence) -> bool | None:
    """Return whether a short row, padded next to a long one, scores as it does alone in a plain pass.

    Return None if these rows cannot show it: they have one length, or log-probabilities that are not finite.

    Padding changes the scores if a model carries a state through the padding, or counts positions in its own way.
    """
    if len(short.ids) == len(long.ids) and long.positions[0] > 0:
        short = replace(long, ids=long.ids[1:], positions=tuple(p - 1 for p in long.positions))
    if len(short.ids) == len(long.ids):
        return None
    together = run_batch(lm, make_batch(lm, [long, short], [(0,), (1,)], padded=True))[1]
    alone = run_batch(lm, make_batch(lm, [short], [(0,)], padded=False))[0]
    outputs = ([*scores.logprobs, *scores.choice_logprobs] for scores in (together, alone))
    return _is_close(lm, *outputs)


def _shares_prompts(lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int) -> bool | None:
    """Return whether sequences that begin alike score in one row as they do in rows of their own; None if unknown.

    The longest and the shortest of such rows are tried next to each other, so that one of them is padded.
    """

    def own_tokens(group: Group) -> list[int]:
        return [i for i in group if len(rows[i].ids) > common_length(rows, group)]

    several = [group for group in groups_that_begin_alike(lm, rows, batch_size) if len(own_tokens(group)) > 1]
    if not several:
        return None
    several.sort(key=lambda group: (joined_length(rows, group), group))
    groups = list(dict.fromkeys((several[0], several[-1])))
    separate = [x for group in groups for i in group for x in run_batch(lm, make_batch(lm, rows, [(i,)]))[0].logprobs]
    try:
        together = [x for outcome in run_batch(lm, make_batch(lm, rows, groups)) for x in outcome.logprobs]
    # A model that takes no mask for each pair of tokens may fail in any of these ways.
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError, ScoringError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return _is_close(lm, separate, together)


def _reads_positions(lm: LanguageModel, row: TokenSequence) -> bool | None:
    """Return whether the output layer gives the same logits if it gets the scored positions only; None if unknown."""
    if lm.kind in TEXT_KINDS:
        return False
    row = row.end(CHECKED_TOKENS) if lm.kind == "causal" else row
    batch = make_batch(lm, [row, row], [(0,), (1,)])
    all_positions = [x for outcome in run_batch(lm, batch) for x in outcome.logprobs]
    try:
        scored_only = forward_logits(lm, batch, scored_only=True).logprobs.tolist()
    # A model may use the output of its output layer in any way, and fail on another shape in any way.
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError, ScoringError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return _is_close(lm, all_positions, scored_only)


def _is_close(lm: LanguageModel, a: Sequence[float], b: Sequence[float]) -> bool | None:
    if not all(map(math.isfinite, [*a, *b])):
        return None
    tolerance = 1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.2
    return all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


@torch.no_grad()
def run_batch(lm: LanguageModel, batch: Batch) -> list[TokenScores]:
    """Return the token scores of every row of a batch."""
    return token_scores(batch, forward_logits(lm, batch, scored_only=bool(lm.reads_positions)))


def token_scores(batch: Batch, logits: BatchLogits) -> list[TokenScores]:
    """Return the scores of a batch row by row, as plain numbers."""
    logprobs, argmax, tied, best, choices, ranks, last_ranks = (
        [] if x is None else x.cpu().tolist()
        for x in (
            logits.logprobs,
            logits.argmax,
            logits.tied,
            logits.best,
            logits.choice_logprobs,
            logits.ranks,
            logits.last_ranks,
        )
    )
    top = [[]] * len(batch.rows) if logits.top is None else logits.top.cpu().tolist()
    return [
        TokenScores(
            logprobs[start : start + n_targets],
            argmax[start : start + n_targets],
            tied[start : start + n_targets],
            best[start : start + n_targets],
            choices[b][:n_choices],
            ranks[start : start + n_targets],
            last_ranks[start : start + n_targets],
            top[b][: batch.top[b]],
        )
        for b, (start, (n_targets, n_choices)) in enumerate(zip(batch.first.tolist(), batch.counts, strict=True))
    ]


@uniform_out_of_memory()
def forward_logits(lm: LanguageModel, batch: Batch, *, scored_only: bool) -> BatchLogits:
    """Run a batch through the model and read its scores; gradients flow unless the caller turned them off.

    The output layer is computed in float32, whatever the dtype of the model is. Of a reward model and an embedding model,
    the outputs themselves are in the place of log-probabilities.

    Args:
        lm: the model.
        batch: the rows.
        scored_only: whether the output layer gets the scored positions only.

    Raises:
        torch.OutOfMemoryError: if the batch does not fit into memory.
    """
    row, position = batch.positions
    with ExitStack() as stack:
        stack.enter_context(fast_cpu_kernels(lm.device, batch.length))
        if scored_only:
            head = lm.model.get_output_embeddings()
            # A spread model's output layer may be on another device; plain indexing moves a CPU's indices, not a GPU's.
            handle = head.register_forward_pre_hook(
                lambda _module, args: (args[0][row.to(args[0].device), position.to(args[0].device)][None], *args[1:])
            )
            stack.callback(handle.remove)
        stack.enter_context(float32_output_layer(lm.model, is_module=scored_only))
        stack.enter_context(as_scoring_error(lm))
        if lm.kind in TEXT_KINDS:
            logits: Tensor = text_outputs(lm, batch.inputs, batch.pad)[:, None]
        else:
            logits = lm.model(**batch.inputs).logits
    is_by_caller = lm.dtype not in HALF and torch.is_autocast_enabled(lm.device.type)
    if logits.dtype in HALF and not is_by_caller:
        _warn_of_rounded_logits(lm.name, logits.dtype)
    logits = (logits[0] if scored_only else logits[row, position]).float()  # (N, V)
    # In parts, for these are several passes over all logits.
    rows = len(logits) if torch.is_grad_enabled() else max(1, logits_part_bytes(lm.device) // (4 * logits.shape[-1]))
    parts = [_read(lm, part, of, batch.ranked) for part, of in zip(logits.split(rows), batch.targets.split(rows), strict=True)]
    total, logprobs, best, argmax, tied, *ranks = map(torch.cat, zip(*parts, strict=True))  # (N,) each
    at_first = logits[batch.first]  # (B, V)
    k = min(max(batch.top), logits.shape[-1])
    return BatchLogits(
        logprobs=logprobs,
        argmax=argmax,
        tied=tied,
        best=best,
        choice_logprobs=at_first.gather(-1, batch.choice_tokens) - total[batch.first][:, None],
        ranks=ranks[0] if ranks else None,
        last_ranks=ranks[1] if ranks else None,
        top=at_first.topk(k).indices if k else None,
    )


def logits_part_bytes(device: torch.device) -> int:
    """Return the bytes of the logits that are read at a time without a gradient."""
    return LOGITS_BYTES if device.type == "cpu" else LOGITS_BYTES_ON_GPU


def _read(lm: LanguageModel, logits: Tensor, targets: Tensor, ranked: bool) -> tuple[Tensor, ...]:
    """Return what logits (N, V) say, (N,) each: log-normaliser, log-probabilities of targets and best, argmax, ties, ranks."""
    total = logits.new_zeros(len(logits)) if lm.kind in ("reward", "embedding") else logits.logsumexp(-1)  # (N,)
    wanted = logits.gather(-1, targets[:, None])  # (N, 1)
    best, argmax = logits.max(-1)  # (N,) both
    tied = (logits == best[:, None]).sum(-1) > 1
    ranks = ((logits > wanted).sum(-1), (logits >= wanted).sum(-1) - 1) if ranked else ()
    return total, wanted[:, 0] - total, best - total, argmax, tied, *ranks


@cache
def _warn_of_rounded_logits(name: str, dtype: torch.dtype) -> None:
    log.warning("%s rounds its logits to %s, so that some may be equal; load it with dtype float32 for exact ones", name, dtype)
