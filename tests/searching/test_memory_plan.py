"""The planned memory of decompositions, against the bytes of the tensors that are alive at once."""

from __future__ import annotations

import re
import weakref
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laserlm.edit import DecompositionCache
from laserlm.export.fitting import fit_ranks
from laserlm.linalg import decompose
from laserlm.models import LanguageModel
from laserlm.models.matrices import Matrix, read_matrix
from laserlm.scoring.forward import run_rows
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.tokenize import encode
from laserlm.searching import SearchResult, search
from laserlm.searching.components import questions_with_room
from laserlm.searching.config import SearchConfig
from laserlm.searching.gradients import Coefficients, ComponentGradients
from laserlm.searching.memory_plan import (
    GIB,
    LOGITS_OF_A_DRAW,
    MemoryPlanner,
    decomposed_bytes,
    decomposing_bytes,
    memory_option,
    warn_of_little_memory,
)
from laserlm.tasks import Task

WIDTH, INNER = 192, 512


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they are alive.

    Those that LAPACK's eigensolver and a count of truth values make inside are counted too.

    Attributes:
        most: largest number of bytes that were alive at once, those of tensors that were there before included.
    """

    def __init__(self, *present: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: set[int] = set()
        for tensor in present:
            self._note(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._linalg_eigh.default:  # syevd: vectors in a copy of the matrix, and twice as much to work in
            self.most = max(self.most, self.now + 3 * args[0].nbytes)
        if func is torch.ops.aten.sum.dim_IntList and args[0].dtype == torch.bool:  # each becomes a whole number of eight bytes
            self.most = max(self.most, self.now + 8 * args[0].numel())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@pytest.mark.parametrize("shape", [(INNER, WIDTH), (WIDTH, INNER), (WIDTH, WIDTH)])
def test_a_decomposition_takes_what_is_planned(shape: tuple[int, int]) -> None:
    matrix, weight = Matrix("", 0, "fc_in", "", shape), torch.randn(shape)
    with LiveBytes(weight) as live:
        kept = DecompositionCache().get(weight)
    assert kept.bytes == decomposed_bytes(matrix)
    assert live.most - weight.nbytes == pytest.approx(decomposing_bytes(matrix, weight.dtype), rel=0.1)


def test_the_writing_of_texts_takes_two_copies_of_all_keys_and_values() -> None:
    lm = families.build("llama")
    n, tokens = 2, 5
    output: Any = lm.model(torch.zeros(n, tokens, dtype=torch.int64), use_cache=True)
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    planned = MemoryPlanner(lm, lm.matrices, memory=0, batch_size=1).writing(n, tokens)
    assert planned == 2 * cached + LOGITS_OF_A_DRAW * output.logits[:, -1].nbytes


def test_logits_are_read_in_parts_that_are_planned_and_score_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU reads them at once, as here with a bound that they do not reach."""
    lm = families.build("llama")
    lm.model = families.random_model("causal", "llama", families.FAMILIES["llama"][1] | {"vocab_size": 8192}).eval()
    ids = torch.randint(5, 8000, (8, 61), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [TokenSequence(i, tuple(x[:-1]), tuple(x[1:]), tuple(range(60))) for i, x in enumerate(ids)]
    weights = list(lm.model.parameters())
    planner = MemoryPlanner(lm, lm.matrices, memory=0, batch_size=8)
    run_rows(lm, rows, 8)  # which tries once how the model can be run
    scores = []
    for limit in (2**18, 2**40):
        monkeypatch.setattr("laserlm.scoring.forward.LOGITS_BYTES", limit)
        with LiveBytes(*weights) as live:
            scores.append([x for of_row in run_rows(lm, rows, 8) for x in of_row.logprobs])
        taken = live.most - sum(weight.nbytes for weight in weights)
        assert taken == pytest.approx(planner.logits_bytes(rows), rel=0.1)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.parametrize("strategy", ["race", "exhaustive"])
def test_too_little_memory_is_exceeded_with_a_word_and_changes_no_result(
    strategy: Any, llama: LanguageModel, task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    def found(memory: float) -> SearchResult:
        caplog.clear()
        return search(llama, task, strategy=strategy, grid="all.mlp@0.5,0.3", metric="loss", guards=(), memory=memory)

    tokens = max(len(s.ids) for s in encode(llama, task.validation.examples, "first_token"))
    a_matrix, activations = 4 * 32 * (32 + 48), 4 * 32 * tokens
    # Three matrices of a block and four boundaries between blocks, or one matrix and two boundaries.
    least = 3 * a_matrix + 4 * activations if strategy == "race" else a_matrix + 2 * activations
    enough = found(least)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    little = found(least - 1)
    assert "the least bound that it keeps is --memory 0.001" in caplog.text
    assert (little.best, little.test.edited_loss) == (enough.best, pytest.approx(enough.test.edited_loss, abs=1e-6))


@pytest.mark.parametrize(
    ("gib", "option"),
    [(12.345, "12.345"), (1023.4, "1023.4"), (2.0, "2"), (1e-9, "0.001"), (7.0001, "7.001"), (0.125, "0.125")],
)
def test_the_option_for_some_bytes_is_rounded_up(gib: float, option: str) -> None:
    size = int(gib * GIB)
    assert memory_option(size) == option
    assert (float(option) - 0.001) * GIB < size <= float(option) * GIB


@pytest.mark.parametrize(("gib", "option"), [(12.345, "12.345"), (1023.4, "1023.4")])
def test_warnings_of_too_little_memory_name_a_bound_that_is_large_enough(
    gib: float, option: str, llama: LanguageModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object, **__: object) -> None:
        raise InterruptedError

    least = int(gib * GIB)
    passage: Any = SimpleNamespace(ids=range(least // (4 * 4 * 32)))  # four boundaries between blocks of 32 numbers
    monkeypatch.setattr("laserlm.export.fitting.gradient_moments", end)
    with pytest.raises(InterruptedError):
        fit_ranks(llama, [passage], memory=12 * GIB)
    monkeypatch.setattr(MemoryPlanner, "least", lambda *_, **__: least)
    planner = MemoryPlanner(llama, llama.matrices, memory=12 * GIB, batch_size=1)
    warn_of_little_memory(planner, (), has_gradient=True)
    questions_with_room(SearchConfig(memory=12 * GIB, gradient_examples=60), least // (16 * 60), [range(20)] * 3)
    said = [r.getMessage() for r in caplog.records if "--memory" in r.getMessage()]
    assert [text.rpartition("--memory ")[2] for text in said] == [option] * 3
    assert [f"--memory 12 is less than the {option} GiB" in text for text in said] == [True, True, False]


def rows_of(tokens: int, n: int) -> list[TokenSequence]:
    ids = torch.randint(5, 400, (n, tokens + 1), generator=torch.Generator().manual_seed(0)).tolist()
    return [TokenSequence(i, tuple(x[:-1]), tuple(x[1:]), tuple(range(tokens))) for i, x in enumerate(ids)]


def gradients_of(lm: LanguageModel, rows: list[TokenSequence], memory: float) -> ComponentGradients:
    """Return gradients along the components of the first attention matrix of each block."""
    parts = {m: decompose(read_matrix(lm.model, m)) for m in lm.matrices if m.name.endswith("q_proj")}
    coefficients: list[Coefficients] = [(-1 / len(row.targets), []) for row in rows]
    return ComponentGradients(lm, rows, coefficients, list(parts), parts.__getitem__, memory=memory)


@pytest.mark.parametrize("family", ["llama", "gemma3n"])
def test_the_graph_that_tells_of_a_model_does_not_stay_in_memory(family: str) -> None:
    """It is that of a whole pass, and a search or compression makes one for each gradient."""
    lm = families.build(family)
    rows = rows_of(40, 1)
    with LiveBytes(*lm.model.parameters()) as live:
        before = live.now
        for _ in range(2):
            gradients_of(lm, rows, memory=GIB)
    assert live.most - before > 300_000
    assert live.now - before < 1000


def test_the_graph_of_a_long_text_is_made_where_it_is_needed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of all blocks and the logits would take most of the memory of a gradient block by block."""

    def most(family: str, inspected: int) -> int:
        lm = families.build(family)
        rows = rows_of(120, 1)
        list(run_rows(lm, rows, 1))
        monkeypatch.setattr("laserlm.searching.gradients.inspection.INSPECTED_TOKENS", inspected)
        with LiveBytes(*lm.model.parameters()) as live:
            before = live.now
            gradients_of(lm, rows, memory=GIB)
        return live.most - before

    assert most("llama", 8) < most("llama", 120) / 5
    assert most("gemma3n", 8) == most("gemma3n", 120)


def test_the_graph_of_a_whole_pass_that_exceeds_the_bound_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Blocks of Gemma 3n hand on keys and values beside their outputs."""
    lm = families.build("gemma3n")
    rows = rows_of(40, 3)

    def gradients(memory: float) -> ComponentGradients:
        caplog.clear()
        return gradients_of(lm, rows, memory)

    taken = gradients(1024)
    (said,) = caplog.messages
    with LiveBytes(*lm.model.parameters()) as live:
        before = live.now
        list(taken.chunks(range(3), lambda _, sums: sums))
    found = re.fullmatch(r".* about (\S+) GiB for 40 tokens.* (\S+) GiB that --memory leaves for it.* (\S+) times as .*", said)
    assert found is not None
    size, bound, times = map(float, found.groups())
    assert size * GIB < live.most - before < 1.5 * size * GIB  # the gradients of a block come to the graph
    assert bound * GIB == pytest.approx(1024, rel=0.01)
    gradients(1024 * times)
    assert caplog.messages == []
    gradients(1024 * (times - 0.2))
    assert len(caplog.messages) == 1
