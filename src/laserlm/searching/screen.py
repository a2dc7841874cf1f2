"""The first-order screen: from one gradient of the loss, how each candidate would change it.

With W = left @ right over k components, X what goes into the matrix and D the gradient of the loss by what comes out,
the share of component i in W's gradient is c_i = sum over tokens of (D left)_i (X right^T)_i, which is sigma_i times the
derivative of the loss by sigma_i. Dropping components changes the loss by minus their sum, to first order: one sum for
every rank of a matrix. It is a local approximation: it ranks candidates, it decides nothing.

The model is run once, keeping what goes into each block; then, from the last block to the first, each is run again with
its gradient. What is in memory at a time is the boundaries between the blocks, and one block's activations, gradients and
decompositions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers.pytorch_utils import Conv1D

from laserlm.edit.apply import Edit
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.errors import WeightError
from laserlm.linalg.decomposition import Decomposition
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, find_stacks, read_matrix, view
from laserlm.scoring.forward import Batch, batches, run_rows
from laserlm.scoring.forward import forward_logits as read_off
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.scorers import SCORERS
from laserlm.scoring.tokenize import TokenSequence
from laserlm.searching.candidates import Candidate
from laserlm.tasks import Example, Scorer

__all__ = ["Decomposed", "Prediction", "screen", "sensitivities"]

Decomposed = Callable[[Matrix], Decomposition]

CURVATURE = 0.5
"""Weight of the variance: half of the Fisher information along the edit, which is how the log-loss bends to second order."""


@dataclass(frozen=True)
class Prediction:
    """What the screen says of a candidate.

    Args:
        change: mean over the examples of the change of loss to first order, in nats.
        deviation: its standard deviation over the examples; None where the share of each example cannot be told.
        examples: number of them.
    """

    change: float
    deviation: float | None
    examples: int

    @property
    def error(self) -> float | None:
        """Standard error of the change."""
        return None if self.deviation is None else self.deviation / math.sqrt(self.examples)

    @property
    def expected(self) -> float:
        """The change that candidates are ranked by: first order and a share of its variance over the examples.

        Where single examples are predicted to change by several nats, the edit is too large for a first order, and what
        it does is worse: the log-loss bends upwards along an edit by the variance of its slope.
        """
        return self.change + CURVATURE * (self.deviation or 0.0) ** 2


def screen(
    lm: LanguageModel,
    examples: Sequence[Example],
    rows: Sequence[TokenSequence],
    scorer: Scorer,
    candidates: Sequence[Candidate],
    *,
    cache: DecompositionCache,
    batch_size: int = 32,
    between_choices: bool = False,
) -> dict[str, Prediction]:
    """Predict the change of loss under each candidate, to first order, by its canonical text.

    Candidates whose matrix cannot be decomposed are left out, for scoring to tell the reason, and so are those whose
    gradient overflows. Randomised decompositions are predicted by the exact ones, blocks of rows by the matrix whole.

    Args:
        lm: the unchanged model.
        examples: those to take the gradient over.
        rows: what ``encode`` made of them.
        scorer: as they were encoded for.
        candidates: single matrices at single ranks.
        cache: decompositions to use.
        batch_size: rows in one pass.
        between_choices: take the log-loss of the right choice among the choices, where the scorer is ``choice``, instead
            of its log-loss among all tokens.
    """
    coefficients = _coefficients(lm, examples, rows, scorer, batch_size, between_choices)
    by_matrix: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_matrix.setdefault(candidate.matrix.id, []).append(candidate)
    matrices = list({c.matrix.id: c.matrix for c in candidates}.values())
    found: dict[str, Prediction] = {}
    for matrix, total in _contributed(
        lm, rows, coefficients, len(examples), matrices, lambda m: cache.get(read_matrix(lm.model, m)), batch_size
    ):
        if bool(total.isfinite().all()):
            for candidate in by_matrix[matrix.id]:
                found[str(candidate.intervention)] = _predict(candidate, total, len(examples))
    return found


def sensitivities(
    lm: LanguageModel, rows: Sequence[TokenSequence], matrices: Sequence[Matrix], decomposed: Decomposed, *, batch_size: int = 4
) -> dict[str, Tensor]:
    """Return what dropping each component of each matrix costs, (k,), by the matrix's id: half the Fisher information.

    Of a component, that is half the sum over tokens of the squared contribution to the gradient, as if tokens were
    independent; with the gradient of the mean loss of a row. It is never negative, and the costs of several components
    add up, cross terms aside.

    Args:
        lm: the unchanged model.
        rows: texts, one example each.
        matrices: weights of linear layers.
        decomposed: returns the decomposition of a matrix.
        batch_size: rows in one pass.

    Raises:
        WeightError: if a gradient overflows.
    """
    coefficients: list[tuple[float, list[float]]] = [(-1 / len(row.targets), []) for row in rows]
    found: dict[str, Tensor] = {}
    for matrix, total in _contributed(lm, rows, coefficients, len(rows), matrices, decomposed, batch_size, squared=True):
        if not bool(total.isfinite().all()):
            raise WeightError(f"the gradient of {matrix.id} overflows {lm.dtype}; load the model in bfloat16 or float32")
        found[matrix.id] = total.mean(0) / 2
    return found


def _contributed(
    lm: LanguageModel,
    rows: Sequence[TokenSequence],
    coefficients: Sequence[tuple[float, list[float]]],
    examples: int,
    matrices: Sequence[Matrix],
    decomposed: Decomposed,
    batch_size: int,
    *,
    squared: bool = False,
) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield each matrix with the contributions of its components, (E, k), from the last block to the first."""
    sums: dict[str, Tensor] = {}  # of matrices whose block is called again further down
    with _frozen(lm.model):
        passes = _passes(lm, rows, coefficients, batch_size)
        places = [call.place for call in passes[0].calls]
        # The blocks as they were called, the last first; every batch calls them in the same order.
        for call in reversed(range(len(places))):
            wanted = [m for m in matrices if (m.stack, m.layer) == places[call]]
            for matrix, contributions in _contributions(lm, passes, call, wanted, decomposed, rows, examples, squared):
                earlier = sums.pop(matrix.id, None)
                total = contributions if earlier is None else earlier + contributions
                if places[call] in places[:call]:
                    sums[matrix.id] = total
                else:
                    yield matrix, total


def _predict(candidate: Candidate, contributions: Tensor, examples: int) -> Prediction:
    """Return what dropping a candidate's components does; contributions are (E, k), or (1, k) where only the mean is known."""
    (reduction,) = candidate.intervention.reductions
    k = contributions.shape[1]
    edit = Edit.of(candidate.matrix, reduction)
    rank = edit.rank * k // edit.max_rank
    dropped = contributions[:, rank:] if reduction.keep == "top" else contributions[:, : k - rank]
    changes = -dropped.sum(1)  # (E,)
    deviation = None if len(changes) == 1 else float(changes.std())
    return Prediction(float(changes.mean()), deviation, examples)


@dataclass
class _Call:
    """One call of a block: where it is, what it was given, and a leaf in place of what it gave out."""

    place: tuple[str, int]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class _Pass:
    """One batch run to the end, its blocks' calls in order; what lies outside of blocks keeps its graph."""

    batch: Batch
    calls: list[_Call]


def _passes(
    lm: LanguageModel, rows: Sequence[TokenSequence], coefficients: Sequence[tuple[float, list[float]]], batch_size: int
) -> list[_Pass]:
    """Run every batch and take the gradient of the objective down to the output of the last block."""
    passes: list[_Pass] = []
    for batch in batches(lm, rows, batch_size):
        with _cut(lm) as calls, torch.enable_grad():
            reading = read_off(lm, batch, scored_only=bool(lm.reads_positions))
            places = torch.tensor([len(rows[i].targets) for i in batch.rows], device=lm.device)
            weights = torch.tensor([coefficients[i][0] for i in batch.rows], device=lm.device).repeat_interleave(places)  # (N,)
            options = torch.zeros_like(reading.choice_logprobs)
            for b, i in enumerate(batch.rows):
                options[b, : len(coefficients[i][1])] = torch.tensor(coefficients[i][1])
            weights, options = weights * _scale(lm), options * _scale(lm)
            torch.autograd.backward([reading.logprobs, reading.choice_logprobs], [weights, options], retain_graph=True)
        passes.append(_Pass(batch, calls))
    return passes


@contextmanager
def _cut(lm: LanguageModel) -> Iterator[list[_Call]]:
    """Run blocks without a graph and hand on leaves in place of what they give out; yield the record of their calls."""
    calls: list[_Call] = []

    def wrapped(block: nn.Module, place: tuple[str, int]) -> Callable[..., Any]:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                # Copies, for some blocks add to what they are given in place.
                output = forward(*_mapped(_copied, args), **_mapped(_copied, kwargs))
            calls.append(_Call(place, args, kwargs, _mapped(_leaf, output)))
            return calls[-1].output

        return run

    with ExitStack() as stack:
        wrapped_already: set[int] = set()
        for name, _, blocks in find_stacks(lm.model):
            for layer, block in enumerate(blocks):
                if id(block) in wrapped_already:
                    continue
                wrapped_already.add(id(block))
                before = block.__dict__.get("forward")
                stack.callback(_put_back, block, before)
                block.forward = wrapped(block, (name, layer))
        yield calls


def _put_back(block: nn.Module, forward: Any) -> None:
    if forward is None:
        block.__dict__.pop("forward", None)
    else:
        block.forward = forward


def _contributions(
    lm: LanguageModel,
    passes: Sequence[_Pass],
    call: int,
    matrices: Sequence[Matrix],
    decomposed: Decomposed,
    rows: Sequence[TokenSequence],
    examples: int,
    squared: bool,
) -> Iterator[tuple[Matrix, Tensor]]:
    """Take the gradient through one call of a block for every batch; yield each matrix with its (E, k) contributions.

    Where the tokens of an example cannot be told, as with experts stacked in one tensor, they are (1, k): the mean.
    """
    watched = [w for m in dict.fromkeys(matrices) if (w := _watched(lm, m, decomposed, examples, squared)) is not None]
    by_module: dict[str, list[_Watched]] = {}
    stacked: list[_Watched] = []
    for w in watched:
        path = w.matrix.path.rpartition(".")[0]
        linear = isinstance(lm.model.get_submodule(path), nn.Linear | Conv1D)
        (by_module.setdefault(path, []) if linear else stacked).append(w)
    parameters = {w.matrix.path: lm.model.get_parameter(w.matrix.path) for w in stacked}
    with _own_gradients(list(parameters.values())):
        for one in passes:
            of_rows = torch.tensor([rows[i].example for i in one.batch.rows])
            with ExitStack() as stack:
                stack.enter_context(fast_cpu_kernels(lm.device, one.batch.length))
                for path, of in by_module.items():
                    hook = lm.model.get_submodule(path).register_forward_hook(_watch(of, of_rows, one.batch))
                    stack.callback(hook.remove)
                _back(lm, one.calls[call])
            done = one.calls[call]
            done.args, done.kwargs, done.output = (), {}, None  # with them go the boundary above and its gradient
        for w in stacked:
            gradient = parameters[w.matrix.path].grad
            w.attributed = False
            if gradient is not None:
                G = view(gradient, w.matrix)
                G = (G.flatten(0, 1) if w.matrix.rows is not None else G).to(w.sums)  # (m, n)
                w.sums[0] = ((G @ w.decomposition.right.T) * w.decomposition.left).sum(0)
    for w in watched:
        found = w.sums / (_scale(lm) ** 2 if squared else _scale(lm))
        yield w.matrix, found if w.attributed else found.sum(0, keepdim=True) / examples


@dataclass
class _Watched:
    """A matrix, and the sums of its contributions (E, k) so far; where they are not ``attributed``, all in one row."""

    matrix: Matrix
    decomposition: Decomposition
    sums: Tensor
    squared: bool
    attributed: bool = True


def _watched(lm: LanguageModel, matrix: Matrix, decomposed: Decomposed, examples: int, squared: bool) -> _Watched | None:
    try:
        d = decomposed(matrix)
    except WeightError:
        return None
    return _Watched(matrix, d, d.left.new_zeros(examples, d.max_rank), squared)


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


def _scale(lm: LanguageModel) -> float:
    """Return the factor that keeps half-precision gradients from vanishing; it is taken out again in float32."""
    return 1024.0 if lm.dtype == torch.float16 else 1.0


def _back(lm: LanguageModel, call: _Call) -> None:
    """Run a block again with its graph and pass the gradient on to what made its inputs."""
    (block,) = [blocks[call.place[1]] for name, _, blocks in find_stacks(lm.model) if name == call.place[0]]
    gradients = [x.grad for x in _floats(call.output)]
    given, spec = [*_floats((call.args, call.kwargs))], (call.args, call.kwargs)
    # What goes in comes first; into the first block it comes without a graph, but the block's own gradients need one.
    inputs: dict[int, Tensor] = {id(x): x.detach().requires_grad_(x.requires_grad or x is given[0]) for x in given}
    args, kwargs = _mapped(lambda x: inputs.get(id(x), x), spec)
    with torch.enable_grad():
        outputs = [*_floats(block(*_mapped(_shifted, args), **_mapped(_shifted, kwargs)))]
        pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None and y.requires_grad]
        torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
    for x in {id(x): x for x in given}.values():
        gradient = inputs[id(x)].grad
        if gradient is not None and x.requires_grad:
            torch.autograd.backward([x], [gradient], retain_graph=True)


def _watch(of: Sequence[_Watched], of_rows: Tensor, batch: Batch) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a forward hook that adds what passes a module, and the gradient that comes back, to its matrices' sums."""

    def collect(x: Tensor, d: Tensor) -> None:
        x_rows, d_rows = _by_row(x, batch), _by_row(d, batch)
        for w in of:
            if x_rows is None or d_rows is None:
                w.attributed = False
                w.sums[0] += _components(w, x.flatten(0, -2)[None], d.flatten(0, -2)[None])[0]
            else:
                w.sums.index_add_(0, of_rows.to(w.sums.device), _components(w, x_rows, d_rows))

    def hook(_module: nn.Module, args: Any, output: Tensor) -> None:
        x = args[0].detach()
        if output.requires_grad:
            output.register_hook(lambda d: collect(x, d))

    return hook


def _by_row(x: Tensor, batch: Batch) -> Tensor | None:
    """Return a (B, T, n) view of what passed a module, or None where the rows of a batch cannot be told."""
    B = len(batch.rows)
    lengths = [batch.inputs[name].shape[1] for name in ("input_ids", "decoder_input_ids") if name in batch.inputs]
    if x.ndim >= 3 and x.shape[0] == B:
        return x.flatten(1, -2)
    if x.ndim == 2 and x.shape[0] in [B * T for T in lengths]:
        return x.reshape(B, -1, x.shape[-1])
    return None


def _components(w: _Watched, x: Tensor, d: Tensor) -> Tensor:
    """Return the contributions of each component, (B, k), of inputs x (B, T, n) and output gradients d (B, T, m)."""
    if w.matrix.rows is not None:
        r = w.matrix.rows
        d = d.unflatten(-1, (r.groups, r.stride))[..., r.start : r.start + r.length].flatten(-2)
    left, right = w.decomposition.left, w.decomposition.right
    a, b = d.to(left) @ left, x.to(left) @ right.T  # (B, T, k)
    contributions: Tensor = (
        torch.linalg.vecdot(a.square(), b.square(), dim=1) if w.squared else torch.linalg.vecdot(a, b, dim=1)
    )
    return contributions


def _coefficients(
    lm: LanguageModel,
    examples: Sequence[Example],
    rows: Sequence[TokenSequence],
    scorer: Scorer,
    batch_size: int,
    between: bool,
) -> list[tuple[float, list[float]]]:
    """Return by what each row's log-probabilities, of its targets and of its options, enter the sum of losses."""
    tokens = Counter[int]()
    for row in rows:
        tokens[row.example] += len(row.targets)
    gold_index = SCORERS[scorer].gold_index
    if gold_index is None:
        return [(-1 / tokens[row.example], []) for row in rows]
    coefficients: list[tuple[float, list[float]]] = []
    totals = [o.choice_logprobs or math.fsum(o.logprobs) for o in run_rows(lm, rows, batch_size)] if between else []
    for i, of in groupby(range(len(rows)), key=lambda i: rows[i].example):
        places = list(of)
        right = gold_index(examples[i])
        if not between:
            # Of several rows only the right choice's has a loss; a single row's target is the right choice.
            coefficients += [
                (-1 / len(rows[p].targets) if n == right or len(places) == 1 else 0.0, []) for n, p in enumerate(places)
            ]
            continue
        flat: list[Any] = totals[places[0]] if len(places) == 1 else [totals[p] for p in places]  # type: ignore[assignment]
        shares = torch.tensor(flat, dtype=torch.float64).softmax(0).tolist()
        slopes = [share - (n == right) for n, share in enumerate(shares)]
        coefficients += [(0.0, slopes)] if len(places) == 1 else [(s, []) for s in slopes]
    return coefficients


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter take a gradient until the end of the context."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def _floats(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_flatten(tree)[0] if isinstance(x, Tensor) and x.is_floating_point())


def _mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def _copied(x: Tensor) -> Tensor:
    return x.detach().clone()


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def _shifted(x: Tensor) -> Tensor:
    return x.clone() if x.requires_grad else x  # a block may add in place to what it is given, but not to a leaf
