"""Strengths of components in other bases than the singular vectors: the same search, a matrix cut in another way.

    python benchmarks/component_bases.py whitened --task worldfacts --max-harm 0.02 --only strengths --text wikitext2/test.txt

The first word is the basis; all others are options of ``gain_under_harm.py``. The bases, all with as many components:

- singular: the singular vectors, as in the search;
- whitened: a truncation costs least on the inputs of the layer;
- two-sided: a truncation costs least on the inputs of the layer and the gradients of its outputs;
- blocks: the singular vectors of 64 rows or columns at a time, along the shorter side: of single heads, in an attention.

The moments are of the half of the own text that the search may look at.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gain_under_harm
import torch
from torch import Tensor

import laserlm as laser
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.export.gradient_moments import gradient_moments
from laserlm.export.moments import moments_by_block
from laserlm.linalg.decomposition import ALGORITHM, Decomposition, decompose, whitened
from laserlm.linalg.quick_hash import quick_hash
from laserlm.models.matrices import read_matrix
from laserlm.searching import components
from laserlm.searching.guard import guards_of

BASES = ("singular", "whitened", "two-sided", "blocks")
BLOCK = 64


def in_blocks(weight: Tensor) -> Decomposition:
    """Return the components of blocks of rows of a wide matrix, or of columns of a tall one, each padded with zeros."""
    if weight.shape[0] > weight.shape[1]:
        of_rows = in_blocks(weight.T)
        return Decomposition(of_rows.right.T, of_rows.left.T)
    parts = [decompose(rows) for rows in weight.split(BLOCK)]
    return Decomposition(torch.block_diag(*(p.left for p in parts)), torch.cat([p.right for p in parts]))


def decompositions(lm: laser.LanguageModel, basis: str, seed: int) -> dict[str, Decomposition]:
    """Return the components of every matrix, by the quick hash of the weight."""
    if basis == "blocks":
        return {quick_hash(w): in_blocks(w) for w in (read_matrix(lm.model, m) for m in lm.matrices)}
    (own,) = guards_of(lm, ["self"], seed=seed)
    rows = own.choosing.sequences
    of_all: dict[str, Decomposition] = {}
    with tempfile.TemporaryDirectory() as folder:
        outputs = gradient_moments(lm, rows, lm.matrices, Path(folder)) if basis == "two-sided" else {}
        for matrices, moments in moments_by_block(lm, rows, lm.matrices):
            for m in matrices:
                weight = read_matrix(lm.model, m)
                of_all[quick_hash(weight)] = whitened(weight, moments[m.path.rpartition(".")[0]], outputs.get(m.id))
    return of_all


def main() -> None:
    """Replace the decompositions of the bundled model, and run ``gain_under_harm``."""
    basis = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if basis not in BASES:
        sys.exit(f"no basis {basis!r}; name one of {', '.join(BASES)}, then options of gain_under_harm.py")
    if basis != "singular":
        seed = int(sys.argv[sys.argv.index("--seed") + 1]) if "--seed" in sys.argv else 0
        lm = laser.load("bundled")
        found = decompositions(lm, basis, seed)
        for m in lm.matrices:
            weight = read_matrix(lm.model, m)
            d = found[quick_hash(weight)]
            assert torch.allclose(d.left @ d.right, weight, atol=1e-3), m.id
        vars(components)["ALGORITHM"] = f"{ALGORITHM}-{basis}"  # the harm of these components is cached apart
        DecompositionCache.get = lambda _, weight: found[quick_hash(weight)]  # type: ignore[method-assign, assignment]
    gain_under_harm.main()


if __name__ == "__main__":
    main()
