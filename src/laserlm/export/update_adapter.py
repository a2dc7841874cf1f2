"""Write what a reduction leaves of the update of an adapter as a smaller adapter of the same base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from laserlm.edit.apply import Edit, decomposition_of, default_cache, resolve
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.edit.factors import StoredMatrix
from laserlm.errors import ExportError
from laserlm.export.adapter import Adapter, Difference, check_finite, in_all_rows, peft_config, refuse_unstorable
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import view
from laserlm.models.update import WeightUpdate
from laserlm.reductions import Intervention

MAX_NAMED = 3
"""Number of tensors that an error names."""


def adapter_of(
    lm: LanguageModel,
    intervention: Intervention,
    *,
    cache: DecompositionCache | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Return the adapter of an intervention: what it leaves of an adapter's update, or else what it changes in the weights.

    The arguments are those of ``Adapter.of``.

    Raises:
        ExportError: as ``Adapter.of``, or if the adapter has tensors that a smaller adapter would lose.
        LaserError: as ``applied``.
    """
    if lm.update is None:
        return Adapter.of(lm, intervention, cache=cache, seed=seed, dtype=dtype)
    if lm.update.others:
        raise ExportError(
            f"a smaller adapter would lose {', '.join(lm.update.others[:MAX_NAMED])} of {lm.update.folder}, which no reduction "
            "changes; save the merged model (--form dense)"
        )
    refuse_unstorable(lm, {path: path for path in lm.update.weights})
    edits = resolve(lm.matrices, intervention)
    by_path: dict[str, list[Edit]] = {}
    for edit in edits:
        by_path.setdefault(edit.matrix.path, []).append(edit)
    dtype = dtype or torch.promote_types(lm.dtype, torch.float32)
    transposed = {m.path: m.transposed for m in lm.matrices}
    differences = []
    for path, update in lm.update.weights.items():
        down, up = _reduced(lm, update, by_path.get(path, []))
        if len(down):
            module = path.rpartition(".")[0]
            factors = down[None].to(dtype), up[None].to(dtype)
            differences.append(Difference(path, *factors, transposed.get(path, False), module, is_layer=True))
    if not differences:
        raise ExportError(f"{intervention} leaves nothing of the adapter {lm.update.folder}; use the base model alone")
    check_finite(differences)
    matrices = tuple(_stored(edit) for edit in edits if not edit.is_identity)
    return Adapter(tuple(differences), matrices, peft_config(lm, differences))


@torch.no_grad()
def _reduced(lm: LanguageModel, update: WeightUpdate, edits: Sequence[Edit]) -> tuple[Tensor, Tensor]:
    """Return the factors (r, n) and (m, r) of what edits of a weight, or of its parts, leave of its update."""
    rest = update.up.clone()  # of the rows that no edit changes
    downs, ups = [], []
    for edit in edits:
        left, right = edit.kept_factors(decomposition_of(lm, edit.matrix, default_cache(lm.cache)))
        downs.append(right)
        ups.append(in_all_rows(left, edit.matrix, len(rest)))
        view(rest, replace(edit.matrix, transposed=False, expert=None)).zero_()
    if bool(rest.any()):
        downs, ups = [update.down, *downs], [rest, *ups]
    return torch.cat([d.float() for d in downs]), torch.cat([u.float() for u in ups], 1)


def _stored(edit: Edit) -> StoredMatrix:
    matrix, (m, n) = edit.matrix, edit.matrix.shape
    return StoredMatrix(matrix.id, matrix.path, matrix.shape, edit.rank, edit.rank * (m + n), f"an adapter of rank {edit.rank}")
