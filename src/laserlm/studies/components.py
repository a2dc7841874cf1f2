"""Study what the smallest singular values of a reduced matrix answer, and which parts of the spectrum are signal or noise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from laserlm.edit import applied
from laserlm.edit.apply import Edit, default_cache, label_as_edited, replaced_weights, resolve
from laserlm.errors import AnalysisError, ScoringError
from laserlm.jsonable import fields_to_json
from laserlm.models.finite import overflow
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import read_matrix
from laserlm.reductions import Intervention, short_form
from laserlm.scoring.forward import run_rows
from laserlm.scoring.identity import digest
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.tokenize import encode
from laserlm.studies.estimates import Estimate, paired_estimates
from laserlm.studies.rank_curve import sizes_of
from laserlm.studies.scores import CachedScorer
from laserlm.studies.words import Words
from laserlm.tasks import Example

FRACTIONS = ("0", "0.05", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "0.95", "0.98", "0.99", "1")
CLASSES = ("right", "right type", "another answer", "generic word", "capitalised word", "other word")
"""Classes of the likeliest token: the answer; the answer of another example of the group; the answer of another group; a
frequent word or no word; a capitalised word, mostly a name; all other words."""
MAX_WINNERS = 5


@dataclass(frozen=True)
class BottomResult:
    """Likeliest first tokens of the model that keeps only the smallest singular values.

    Args:
        fraction: kept fraction of the singular values, as text.
        n: number of examples.
        probability: mean probability of the answer's first token.
        cosine: mean cosine between the embeddings of the winning token and of the answer's first token.
        classes: share of the examples whose winning token is of each class.
        winners: the most frequent winning tokens and their number.
    """

    fraction: str
    n: int
    probability: Estimate
    cosine: Estimate
    classes: dict[str, Estimate]
    winners: tuple[tuple[str, int], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return fields_to_json(self) | {"winners": [{"token": token, "count": count} for token, count in self.winners]}


def bottom_components(
    scorer: CachedScorer,
    examples: Sequence[Example],
    intervention: str,
    words: Words,
    *,
    fractions: Sequence[str] = FRACTIONS,
    on_fraction: Callable[[int, int, str], None] | None = None,
) -> list[BottomResult]:
    """Keep only the smallest singular values of the reduced matrices, more and more of them, and read the likeliest tokens.

    Args:
        scorer: scores of the model on all examples of the split, whose answers define the right type.
        examples: the examples to look at, such as the corrected ones.
        intervention: text of the reduction whose matrices are taken.
        words: the generic words.
        fractions: kept fractions of the smallest singular values, as text.
        on_fraction: called with the number of fractions done, their total and the next.

    Raises:
        AnalysisError: if there are no examples or no reduction, or a fraction is a rank.
        ScoringError: if the model overflows its dtype.
        SpecError: if a fraction cannot be read.
    """
    lm = scorer.lm
    reductions = Intervention.read(intervention).reductions
    if not examples or not reductions:
        raise AnalysisError("there is no example to look at; components are studied where a reduction corrects something")
    sizes = sizes_of(fractions)
    rows = encode(lm, examples, "first_token")
    answers = [row.targets[0] for row in rows]
    of_group: dict[str, set[int]] = {}
    for e, row in zip(scorer.split.examples, encode(lm, scorer.split.examples, "first_token"), strict=True):
        of_group.setdefault(e.group, set()).add(row.targets[0])
    embeddings = _embeddings(lm)
    key = digest([e.id for e in examples])
    results = []
    for done, size in enumerate(sizes):
        if on_fraction is not None:
            on_fraction(done, len(sizes), str(size))
        text = str(Intervention(tuple(replace(r, size=size, keep="bottom", method="exact") for r in reductions)))
        stored = scorer.cached(f"first tokens of {key} under {text}", partial(_first_tokens, scorer, rows, text))
        winners = [int(token) for token, _ in stored]
        cosines = cosine_similarity(embeddings(winners), embeddings(answers), dim=-1).tolist()
        classes = [_class(lm, *three, of_group, words) for three in zip(winners, answers, examples, strict=True)]
        results.append(
            BottomResult(
                fraction=str(size),
                n=len(examples),
                probability=Estimate.mean([math.exp(logprob) for _, logprob in stored]),
                cosine=Estimate.mean(cosines),
                classes={name: Estimate.share(classes.count(name), len(classes)) for name in CLASSES},
                winners=tuple(Counter(_token(lm, w) for w in winners).most_common(MAX_WINNERS)),
            )
        )
    return results


def _first_tokens(scorer: CachedScorer, rows: Sequence[TokenSequence], intervention: str) -> list[tuple[int, float]]:
    """Return for each example the likeliest first token and the log-probability of the answer's first token."""
    lm = scorer.lm
    with applied(lm, intervention, seed=scorer.seed):
        scores = run_rows(lm, rows, scorer.batch_size)
    if not all(math.isfinite(score.logprobs[0]) for score in scores):
        cause = overflow(lm.model, lm.dtype)
        raise ScoringError(f"{short_form(intervention)} gives probabilities that are not finite: {cause}")
    return [(score.argmax[0], score.logprobs[0]) for score in scores]


def _class(lm: LanguageModel, winner: int, right: int, e: Example, of_group: dict[str, set[int]], words: Words) -> str:
    text = _token(lm, winner)
    if winner == right:
        return "right"
    if words.generic(text):
        return "generic word"
    if e.group and winner in of_group[e.group]:
        return "right type"
    if any(winner in answers for answers in of_group.values()):
        return "another answer"
    return "capitalised word" if text.strip()[:1].isupper() else "other word"


def _token(lm: LanguageModel, token: int) -> str:
    return str(lm.require_tokenizer().decode([token]))


def _embeddings(lm: LanguageModel) -> Callable[[Sequence[int]], Tensor]:
    """Return a function that maps tokens to their input embeddings (tokens, width) in float32."""
    embeddings: Any = lm.model.get_input_embeddings()
    if embeddings is None:
        raise AnalysisError(f"{lm.name} embeds no tokens, so there is no cosine between answers; leave this study out")
    weight = embeddings.weight
    return lambda tokens: weight[torch.tensor(tokens, device=weight.device)].detach().float()


@dataclass(frozen=True)
class SpectrumRun:
    """One run of adjacent singular values, and the model without it.

    Args:
        matrix: id of the matrix.
        first: index of the largest singular value of the run, from 0.
        last: index of the smallest.
        energy: share of the run in the squared Frobenius norm.
        n: number of examples.
        gain: paired gain in accuracy without the run.
        loss_change: paired change of the loss without the run, in nats per answer token.
        verdict: ``noise`` if the interval of the change lies below 0, ``signal`` if it lies above 0, else ``neither``.
    """

    matrix: str
    first: int
    last: int
    energy: float
    n: int
    gain: Estimate
    loss_change: Estimate
    verdict: Literal["noise", "signal", "neither"]


def chunk_map(
    intervention: str, scorer: CachedScorer, *, chunk: int = 32, on_chunk: Callable[[int, int, str], None] | None = None
) -> list[SpectrumRun]:
    """Score the model without each run of ``chunk`` adjacent singular values of the reduced matrices.

    Args:
        intervention: text of the reduction whose matrices are taken.
        scorer: scores of the model.
        chunk: number of singular values; for a split matrix, of each block of rows.
        on_chunk: called with the number of runs done, their total and the next.

    Raises:
        AnalysisError: if ``chunk`` is below 1, or there is no reduction.
    """
    lm = scorer.lm
    edits = resolve(lm.matrices, intervention)
    if chunk < 1 or not edits:
        raise AnalysisError(f"no runs of {chunk} singular values of {intervention or 'no matrix'}; write 1 or more")
    cuts = [(edit, i, min(i + chunk, edit.max_rank)) for edit in edits for i in range(0, edit.max_rank, chunk)]
    base = scorer("")
    chunks = []
    for done, (edit, start, end) in enumerate(cuts):
        name = f"{edit.matrix.id}{f':split{edit.reduction.split}' if edit.reduction.split > 1 else ''}"
        text = f"without the singular values {start} to {end - 1} of {name}"
        if on_chunk is not None:
            on_chunk(done, len(cuts), text)
        without = scorer(text, _without(lm, edit, start, end, text), matrices_of=intervention)
        gain, change = paired_estimates(base, without)
        chunks.append(
            SpectrumRun(
                matrix=name,
                first=start,
                last=end - 1,
                energy=_energy(lm, edit, start, end),
                n=base.n,
                gain=gain,
                loss_change=change,
                verdict="noise" if change.interval.high < 0 else "signal" if change.interval.low > 0 else "neither",
            )
        )
    return chunks


@contextmanager
def _without(lm: LanguageModel, edit: Edit, start: int, end: int, text: str) -> Iterator[None]:
    """Remove a run of singular values from a matrix inside the ``with`` block."""
    removed = replace(edit, rank=0)  # so that it counts as an edit, whatever rank the reduction keeps

    def make(edit: Edit) -> Tensor:
        return torch.cat([block - part for block, part in _parts(lm, edit, start, end)])

    with torch.no_grad(), replaced_weights(lm, [removed], make), label_as_edited(lm, text):
        yield


def _parts(lm: LanguageModel, edit: Edit, start: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each block of rows of a matrix, and the part of the block that a run of singular values makes."""
    cache = default_cache(lm.cache)
    for block in read_matrix(lm.model, edit.matrix).chunk(edit.reduction.split):
        d = cache.get(block)
        part = d.left[:, start:end] @ d.right[start:end]
        yield block.to(part), part


def _energy(lm: LanguageModel, edit: Edit, start: int, end: int) -> float:
    norms = [(float(part.square().sum()), float(block.square().sum())) for block, part in _parts(lm, edit, start, end)]
    return sum(part for part, _ in norms) / max(sum(total for _, total in norms), 1e-300)
