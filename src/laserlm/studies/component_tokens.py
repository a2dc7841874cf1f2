"""Say in tokens what single components read and write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laserlm.edit.apply import default_cache, resolve
from laserlm.errors import AnalysisError
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, read_matrix

PARTNERS = {
    "fc_in": ("fc_out",),
    "fc_up": ("fc_out",),
    "fc_out": ("fc_up", "fc_in"),
    "v_proj": ("out_proj",),
    "out_proj": ("v_proj",),
}
"""Matrices on the other side of the neurons or heads. A product with them leads to the space of the embeddings."""
WRITING = ("fc_out", "out_proj")
"""Matrices whose outputs are in the space of the embeddings. The inputs of all others are."""


@dataclass(frozen=True)
class ComponentTokens:
    """A component sigma u v^T, and the tokens that its directions are nearest to.

    Args:
        matrix: id of the matrix.
        component: number by falling singular value, from 0.
        value: the singular value sigma.
        reads: tokens whose input embeddings have the largest product with v; empty where v leads to no embedding.
        writes: tokens whose logits u raises most; empty where u leads to no embedding.
        questions: questions that want the component gone: those whose loss its removal lowers most, and by how much to first
            order, in nats per token. Empty if they were not looked for.
    """

    matrix: str
    component: int
    value: float
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    questions: tuple[tuple[str, float], ...] = ()


def component_tokens(lm: LanguageModel, intervention: str, *, components: int = 20, tokens: int = 5) -> list[ComponentTokens]:
    """Return what the components that change most read and write, the largest change first.

    Norms and activations are left out: it is a look at directions, not at what the model computes. The sign of u and v is
    the one by which the strongest token comes first.

    Args:
        lm: the unchanged model.
        intervention: text of the reductions. Reductions of blocks of rows (``:splitK``) are left out.
        components: most components.
        tokens: tokens of each list.

    Raises:
        AnalysisError: if the model embeds no tokens.
        MatrixError: if the model has no such matrix or component.
    """
    inputs, outputs = (_embedding(lm, name) for name in ("get_input_embeddings", "get_output_embeddings"))
    if inputs is None:
        raise AnalysisError(f"{lm.name} embeds no tokens, so no token says what a component reads; leave this study out")
    cache = default_cache(lm.cache)
    changed: list[tuple[float, float, Matrix, int]] = []  # size of the change, singular value
    for edit in resolve(lm.matrices, intervention):
        if edit.reduction.split == 1:
            d = cache.get(read_matrix(lm.model, edit.matrix))
            values = d.left.norm(dim=0) * d.right.norm(dim=1)  # (max_rank,)
            changed += [(abs(1 - s) * float(values[i]), float(values[i]), edit.matrix, i) for i, s in edit.strengths.items()]
    rows = []
    for _, value, matrix, i in sorted(changed, key=lambda c: -c[0])[:components]:
        d = cache.get(read_matrix(lm.model, matrix))
        v, u = _to_embeddings(lm, matrix, d.right[i], d.left[:, i])
        scores = [_scores(inputs, v), _scores(inputs if outputs is None else outputs, u)]
        strongest = max((s for s in scores if s is not None), key=lambda s: float(s.abs().max()), default=None)
        sign = 1 if strongest is None or float(strongest.max()) >= -float(strongest.min()) else -1
        reads, writes = (_top(lm, s, sign, tokens) for s in scores)
        rows.append(ComponentTokens(matrix.id, i, value, reads, writes))
    return rows


def _embedding(lm: LanguageModel, name: str) -> Tensor | None:
    module: Any = getattr(lm.model, name)()
    return None if module is None else module.weight.detach()


def _to_embeddings(lm: LanguageModel, matrix: Matrix, v: Tensor, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the directions of input and output in the space of the embeddings; None where none leads there."""
    partner = _partner(lm, matrix)
    if matrix.type in WRITING:
        return (None if partner is None or partner.shape[0] != len(v) else partner.T.to(v) @ v), u
    return v, (None if partner is None or partner.shape[1] != len(u) else partner.to(u) @ u)


def _partner(lm: LanguageModel, matrix: Matrix) -> Tensor | None:
    """Return the matrix on the other side of the neurons or heads, (out, in)."""
    block = {m.name: m for m in lm.matrices if (m.stack, m.layer) == (matrix.stack, matrix.layer)}
    names = [matrix.name.removesuffix(matrix.type) + partner for partner in PARTNERS.get(matrix.type, ())]
    return next((read_matrix(lm.model, block[name]) for name in names if name in block), None)


def _scores(embedding: Tensor, direction: Tensor | None) -> Tensor | None:
    """Return the products of all embeddings with a direction, (tokens,)."""
    if direction is None or direction.shape[0] != embedding.shape[1]:
        return None
    unit = direction / direction.norm().clamp(min=1e-30)
    scores: Tensor = (embedding @ unit.to(embedding)).float()
    return scores


def _top(lm: LanguageModel, scores: Tensor | None, sign: int, n: int) -> tuple[str, ...]:
    if scores is None:
        return ()
    ids = torch.topk(sign * scores, min(n, len(scores))).indices.tolist()
    return tuple(str(lm.require_tokenizer().decode([i])) for i in ids)
