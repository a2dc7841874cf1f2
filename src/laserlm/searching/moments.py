"""Second moments of what goes into the linear layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from laserlm.models.language_model import LanguageModel
from laserlm.scoring.forward import batches, run_rows
from laserlm.scoring.tokenize import TokenSequence

__all__ = ["input_moments"]


@torch.no_grad()
def input_moments(
    lm: LanguageModel, rows: Sequence[TokenSequence], modules: Sequence[str], *, batch_size: int = 4
) -> dict[str, Tensor]:
    """Return for each linear layer the mean over tokens of x x^T, (n, n), by its path.

    Layers that are given the same tensor, as query, key and value are, share one result. One that nothing reaches has none.

    Args:
        lm: the model.
        rows: what is run through it, padding aside.
        modules: paths of linear layers.
        batch_size: rows in one pass.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    shared: dict[str, str] = {}  # by layer, the one whose input it shares
    last: list[tuple[Tensor, str]] = []
    sums_dtype = torch.float32 if lm.device.type == "mps" else torch.float64

    def watch(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, args: Any) -> None:
            x = args[0]
            if last and last[0][0] is x:
                shared[path] = last[0][1]
                return
            last[:] = [(x, path)]
            flat = x.flatten(0, -2).float()  # (tokens, n)
            moment = (flat.T @ flat).to(sums_dtype)
            sums[path] = sums[path] + moment if path in sums else moment
            counts[path] = counts.get(path, 0) + len(flat)

        return hook

    batches(lm, rows, batch_size)  # what it tries out on a model, it tries out once, and before anybody counts
    # Rows of one length at a time, for padding would count as tokens.
    by_length: dict[int, list[TokenSequence]] = {}
    for row in rows:
        by_length.setdefault(len(row.ids), []).append(row)
    with ExitStack() as hooks:
        for path in modules:
            handle = lm.model.get_submodule(path).register_forward_pre_hook(watch(path))
            hooks.callback(handle.remove)
        for alike in by_length.values():
            run_rows(lm, alike, batch_size)
    last.clear()
    means = {path: total / counts[path] for path, total in sums.items()}
    return {path: means[source] for path in modules if (source := shared.get(path, path)) in means}
