"""Name the weights of a model's blocks that are not among its matrices."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from transformers.modeling_utils import PreTrainedModel

from laserlm.low_rank import LowRankLinear
from laserlm.models.matrices import Matrix, find_stacks

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
MAX_NAMED = 6
"""Number of weights that a line names."""


def weights_left_out(model: PreTrainedModel, matrices: Iterable[Matrix]) -> dict[str, int]:
    """Return the weights of blocks, of two axes or more, that are not listed: how many, by name and shape. Biases are none.

    These are convolutions, embeddings, routers of known families and tables. A name is a path below the block, with N for the
    numbers in it, such as ``experts.N.gate.weight (4 x 32)``. The factors of a low-rank layer belong to its matrix.

    Args:
        model: the model, with or without values of its weights.
        matrices: its matrices.
    """
    listed = {m.path for m in matrices}
    counts = Counter[str]()
    for _, path, blocks in find_stacks(model, towers=True):
        for layer, block in enumerate(blocks):
            for name, parameter in block.named_parameters():
                where, _, last = name.rpartition(".")
                is_listed = f"{path}.{layer}.{name}" in listed or isinstance(block.get_submodule(where), LowRankLinear)
                if parameter.ndim > 1 and "bias" not in last and not is_listed:
                    shape = " x ".join(map(str, parameter.shape))
                    counts[f"{NUMBER.sub('N', name)} ({shape})"] += 1
    return dict(counts)


def line_of(left_out: dict[str, int]) -> str:
    """Return one line that names weights which are not listed; empty if there are none."""
    if not left_out:
        return ""
    total, names = sum(left_out.values()), list(left_out)
    more = f" and {len(names) - MAX_NAMED} other kinds" if len(names) > MAX_NAMED else ""
    verb = "weight of the blocks is" if total == 1 else "weights of the blocks are"
    return f"{total} {verb} no matrices here, and no reduction changes them: {', '.join(names[:MAX_NAMED])}{more}"
