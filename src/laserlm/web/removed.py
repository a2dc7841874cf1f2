"""Count the removed components of an intervention by block and matrix, for a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from laserlm.reductions import Intervention
from laserlm.studies.loss_map import matrix_order, stacked_name


@dataclass(frozen=True)
class RemovedCounts:
    """Numbers of removed components.

    Args:
        total: of all matrices.
        scaled: those of them that are scaled and not removed.
        matrices: number of matrices.
        columns: names of the matrices within a block.
        of_columns: number of each column.
        rows: name of each block, the number of each of its matrices, and the number of the block.
    """

    total: int
    scaled: int
    matrices: int
    columns: tuple[str, ...]
    of_columns: tuple[int, ...]
    rows: tuple[tuple[str, tuple[int, ...], int], ...]


def removed_counts(intervention: Intervention) -> RemovedCounts | None:
    """Return the counts; None if the intervention does not consist of components of single matrices alone."""
    counts: dict[tuple[str, int, str], int] = {}
    for r in intervention.reductions:
        if r.size.strengths is None or r.layers.first is None or r.layers.first != r.layers.last or r.split != 1:
            return None
        counts[r.stack, r.layers.first, r.matrix] = len(r.size.strengths)
    if not counts:
        return None
    columns = sorted({(stack, name) for stack, _, name in counts}, key=matrix_order)
    blocks = sorted({(stack, layer) for stack, layer, _ in counts})
    of_columns, of_blocks = Counter[tuple[str, str]](), Counter[tuple[str, int]]()
    for (stack, layer, name), n in counts.items():
        of_columns[stack, name] += n
        of_blocks[stack, layer] += n
    return RemovedCounts(
        total=sum(counts.values()),
        scaled=sum(strength != 0 for r in intervention.reductions for strength in (r.size.strengths or {}).values()),
        matrices=len(counts),
        columns=tuple(stacked_name(stack, name) for stack, name in columns),
        of_columns=tuple(of_columns[column] for column in columns),
        rows=tuple(
            (
                stacked_name(stack, str(layer)),
                tuple(counts.get((stack, layer, name), 0) if of == stack else 0 for of, name in columns),
                of_blocks[stack, layer],
            )
            for stack, layer in blocks
        ),
    )
