"""The sums of what passes the modules of matrices, forward and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laserlm.linalg.decomposition import Decomposition
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, view
from laserlm.scoring.batch import Batch
from laserlm.searching.gradients.blocks import id_lengths, padding_of, put_back, without_padding
from laserlm.searching.gradients.sites import Site


class MixedRowsError(Exception):
    """Ends a chunk in which the rows of a batch cannot be told apart."""


@dataclass
class ComponentSums:
    """The contributions of a matrix's components so far, (R, k) for the R rows of a chunk; with their squares (2R, k).

    Args:
        matrix: the matrix.
        values: the sums, those of each power one after the other.
        powers: of the contributions of tokens that are summed, 1 or 2.
        decomposition: returns that of the matrix; None if it has none.
    """

    matrix: Matrix
    values: Tensor
    powers: tuple[int, ...]
    decomposition: Callable[[], Decomposition | None]

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        matrix: Matrix,
        rows: int,
        powers: tuple[int, ...],
        decomposition: Callable[[], Decomposition | None],
    ) -> ComponentSums:
        weight = lm.model.get_parameter(matrix.path)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        values = torch.zeros(len(powers) * rows, matrix.max_rank, dtype=dtype, device=weight.device)
        return cls(matrix, values, powers, decomposition)

    @property
    def of_powers(self) -> list[tuple[int, Tensor]]:
        """Each power with its sums, (R, k)."""
        return list(zip(self.powers, self.values.chunk(len(self.powers)), strict=True))

    def add(self, rows: Tensor, x: Tensor, d: Tensor) -> None:
        """Add what passed a linear layer: inputs (B, T, n) and gradients of outputs (B, T, m) of some rows (B,)."""
        if (products := self._products(x, d)) is not None:
            a, b = products
            for power, values in self.of_powers:
                total = torch.linalg.vecdot(a, b, dim=1) if power == 1 else torch.linalg.vecdot(a.square(), b.square(), dim=1)
                values.index_add_(0, rows.to(values.device), total)

    def add_tokens(self, rows: Tensor, x: Tensor, d: Tensor) -> None:
        """Add what passed an expert: inputs (S, n) and gradients of outputs (S, m) of single tokens, row (S,) by row."""
        if (products := self._products(x, d)) is not None:
            a, b = products
            of_tokens = a * b  # (S, k)
            # Row by row, for ``index_add_`` to an index that stands twice has no fixed order on a GPU.
            present, counts = rows.unique_consecutive(return_counts=True)
            for row, of_row in zip(present.tolist(), of_tokens.split(counts.tolist()), strict=True):
                for power, values in self.of_powers:
                    values[row] += of_row.pow(power).sum(0)

    def add_gradient(self, row: int, gradient: Tensor) -> None:
        """Add the gradient of the parameter over one row."""
        if (d := self.decomposition()) is not None:
            G = view(gradient, self.matrix)
            G = (G.flatten(0, 1) if self.matrix.rows is not None else G).to(d.left)  # (m, n)
            of_row = ((G @ d.right.T) * d.left).sum(0)
            for power, values in self.of_powers:
                values[row] += of_row.pow(power)

    def _products(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor] | None:
        decomposition = self.decomposition()
        if decomposition is None:
            return None
        if self.matrix.rows is not None:
            r = self.matrix.rows
            d = d.unflatten(-1, (r.groups, r.stride))[..., r.start : r.start + r.length].flatten(-2)
        left, right = decomposition.left, decomposition.right
        return d.to(left) @ left, x.to(left) @ right.T  # (..., k) both


@contextmanager
def watched(sites: Sequence[Site], sums: Mapping[str, ComponentSums], batch: Batch) -> Iterator[None]:
    """Add what passes some modules, forward and back, to the sums of their matrices."""
    parameters: dict[nn.Parameter, list[ComponentSums]] = {}
    with ExitStack() as stack:
        for site in sites:
            of = {name: [sums[m.id] for m in matrices if m.id in sums] for name, matrices in site.by_parameter.items()}
            if site.kind == "linear":
                stack.enter_context(_watched_linear(site.module, [s for some in of.values() for s in some], batch))
            elif site.kind == "experts":
                stack.enter_context(_watched_experts(site.module, of, batch))
            else:
                parameters |= {site.module.get_parameter(name): some for name, some in of.items()}
        stack.enter_context(_own_gradients(list(parameters)))
        yield
        (row,) = batch.rows if parameters else (0,)
        for parameter, some in parameters.items():
            for of_matrix in some if parameter.grad is not None else ():
                of_matrix.add_gradient(row, parameter.grad)  # type: ignore[arg-type]


@contextmanager
def _watched_linear(module: nn.Module, sums: Sequence[ComponentSums], batch: Batch) -> Iterator[None]:
    rows, padding = torch.tensor(batch.rows), padding_of(batch)

    def before(_module: nn.Module, args: Any) -> Any:
        return (_with_graph(args[0]), *args[1:])

    def after(_module: nn.Module, args: Any, output: Tensor) -> None:
        x = args[0].detach()

        def collect(d: Tensor) -> None:
            x_rows, d_rows = (without_padding(_by_row(y, batch), padding) for y in (x, d))
            for of_matrix in sums:
                of_matrix.add(rows, x_rows, d_rows)

        if output.requires_grad:
            output.register_hook(collect)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched_experts(module: Any, sums: Mapping[str, Sequence[ComponentSums]], batch: Batch) -> Iterator[None]:
    """Run stacked experts one after the other, and add what passes each of them."""

    def apply(name: str, expert: int, x: Tensor, rows: Tensor) -> Tensor:
        weight = getattr(module, name)[expert]
        y = x @ weight if module.is_transposed else torch.nn.functional.linear(x, weight)
        inputs = x.detach()

        def collect(d: Tensor) -> None:
            for of_matrix in sums.get(name, ()):
                if of_matrix.matrix.expert == expert:
                    # A transposed matrix is decomposed as it is stored, with its inputs as rows.
                    of_matrix.add_tokens(rows, *((d, inputs) if module.is_transposed else (inputs, d)))

        y.register_hook(collect)
        return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        # In this order; the names differ from family to family.
        hidden_states, top_k_index, top_k_weights = (*args, *kwargs.values())
        hidden_states = _with_graph(hidden_states)
        of_token = _rows_of_tokens(len(hidden_states), batch).to(hidden_states.device)
        parts: list[Tensor] = []
        places: list[Tensor] = []
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            if expert >= len(module.down_proj):
                continue
            up = apply("gate_up_proj" if module.has_gate else "up_proj", expert, hidden_states[token], of_token[token])
            inner = module._apply_gate(up) if module.has_gate else module.act_fn(up)
            out = apply("down_proj", expert, inner, of_token[token])
            out = module.post_expert_norm(out) if module.has_post_expert_norm else out
            parts.append(out * top_k_weights[token, place, None])
            places.append(token)
        total = torch.zeros_like(hidden_states, dtype=parts[0].dtype)
        return total.index_add(0, torch.cat(places), torch.cat(parts)).to(hidden_states.dtype)

    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        put_back(module, before)


def _with_graph(x: Tensor) -> Tensor:
    """Return an input from which a graph grows, for weights take no gradient."""
    return x if x.requires_grad else x.detach().requires_grad_()


def _by_row(x: Tensor, batch: Batch) -> Tensor:
    """Return a (B, T, n) view of what passed a module.

    Raises:
        MixedRowsError: if the rows of a batch cannot be told apart.
    """
    B = len(batch.rows)
    if B == 1:
        return x.reshape(1, -1, x.shape[-1])
    if x.ndim >= 3 and x.shape[0] == B:
        return x.flatten(1, -2)
    if x.ndim == 2 and x.shape[0] in [B * T for T in id_lengths(batch)]:
        return x.reshape(B, -1, x.shape[-1])
    raise MixedRowsError


def _rows_of_tokens(tokens: int, batch: Batch) -> Tensor:
    """Return the row of each token that goes through experts, row by row."""
    B = len(batch.rows)
    if B > 1 and tokens not in [B * T for T in id_lengths(batch)]:
        raise MixedRowsError
    return torch.tensor(batch.rows).repeat_interleave(tokens // B)


@contextmanager
def _own_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let parameters take a gradient until the end of the context; what they had is put back."""
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
            p.requires_grad_(True)
        yield
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.requires_grad_(False)
            p.grad = gradient
