"""The candidates of a grid on a model: one matrix, one rank each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from laserlm.edit.apply import Edit
from laserlm.errors import MatrixError
from laserlm.models.matrices import Matrix, select
from laserlm.reductions import Grid, Intervention, Layers


@dataclass(frozen=True)
class Candidate:
    """One thing to try: a matrix, and the intervention that reduces it alone."""

    matrix: Matrix
    intervention: Intervention


def expand(grid: str | Grid, matrices: Sequence[Matrix]) -> list[Candidate]:
    """Return the candidates of a grid, by block and matrix, each thing to try once.

    Sizes that keep all of a matrix are left out (they are the unchanged model), of several that come to one rank the first
    stays, and of tied weights the first block's.

    Raises:
        SpecError: if the grid cannot be read.
        MatrixError: if it names a matrix that is not there, or leaves no candidate.
    """
    grid = Grid.parse(grid)
    candidates: dict[tuple[object, ...], Candidate] = {}
    for reduction in chain(*grid.parts):
        for m in select(matrices, reduction.layers, reduction.matrix, reduction.stack):
            if m.tied_to is None:
                layers = Layers(first=m.layer, last=m.layer)
                edit = Edit.of(m, replace(reduction, layers=layers, matrix=m.name, stack=m.stack))
                if not edit.is_identity:
                    key = (
                        m.id,
                        edit.rank,
                        reduction.size.drop or reduction.size.scale,
                        reduction.keep,
                        reduction.method,
                        reduction.split,
                    )
                    candidates.setdefault(key, Candidate(m, Intervention((edit.reduction,))))
    if not candidates:
        raise MatrixError(f"the grid {grid} keeps every matrix whole; give sizes below the matrices' ranks")
    place = {m.id: i for i, m in enumerate(matrices)}
    return sorted(candidates.values(), key=lambda candidate: place[candidate.matrix.id])
