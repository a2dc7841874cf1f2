from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import SCORED

import laserlm.scoring.forward as forward
import laserlm.scoring.kernels as module
from laserlm.models import LanguageModel
from laserlm.scoring import batch
from laserlm.scoring.forward import batches, run_batch
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.tokenize import encode
from laserlm.tasks import Example

Make = Callable[..., LanguageModel]
CPU = torch.device("cpu")
EXAMPLES = [Example(str(i), "The city of " * i + "the river is", "a capital") for i in range(1, 6)]


def precision() -> str:
    settings: Any = torch.backends.mkldnn
    return str(settings.matmul.fp32_precision)


def test_products_are_exact_and_the_setting_is_put_back() -> None:
    x, w = torch.randn(200, 300), torch.randn(400, 300)
    exact = x.double() @ w.double().T
    with fast_cpu_kernels(CPU, 20):
        assert (x @ w.T - exact).norm() / exact.norm() < 2e-6
    assert precision() == "none"


@pytest.mark.parametrize("exact", [True, False])
def test_rounded_operands_are_taken_only_where_they_are_not_rounded(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_is_exact", lambda: exact)
    with fast_cpu_kernels(CPU, 20):
        assert precision() == ("bf16" if exact else "none")
    assert precision() == "none"
    with fast_cpu_kernels(torch.device("meta"), 20):
        assert precision() == "none"


def test_a_kernel_that_rounds_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.functional.linear

    def rounding(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear(x.bfloat16().float(), w.bfloat16().float())

    monkeypatch.setattr(torch.nn.functional, "linear", rounding)
    assert module.onednn_is_exact.__wrapped__() is False
    assert precision() == "none"


def test_the_callers_own_choice_stays() -> None:
    settings: Any = torch.backends.mkldnn
    settings.matmul.fp32_precision = "ieee"
    try:
        with fast_cpu_kernels(CPU, 20):
            assert precision() == "ieee"
        assert precision() == "ieee"
    finally:
        settings.matmul.fp32_precision = "none"


@pytest.mark.parametrize("family", SCORED)
def test_the_output_layer_given_the_scored_places_alone_says_the_same(family: str, make: Make) -> None:
    lm = make(family)
    rows = encode(lm, EXAMPLES, "answer")
    batch = batches(lm, rows, 5)[0]
    assert lm.reads_positions is True
    seen: list[int] = []
    head = lm.model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.shape[:-1].numel()))
    placed = run_batch(lm, batch)
    head.remove()
    assert seen == [sum(len(r.positions) for r in rows)]
    lm.reads_positions = False
    for a, b in zip(placed, run_batch(lm, batch), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        assert a.argmax == b.argmax


def test_rows_are_cut_into_the_batches_that_take_the_least_time() -> None:
    def time(cuts: list[tuple[int, int]], lengths: list[int]) -> int:
        return sum(10 + (b - a) * lengths[a] for a, b in cuts)

    def every(n: int) -> Iterator[list[tuple[int, int]]]:
        for bits in range(2 ** (n - 1)):
            edges = [0, *(i + 1 for i in range(n - 1) if bits >> i & 1), n]
            yield list(pairwise(edges))

    for lengths in ([9, 9, 8, 3, 3, 2, 1], [20, 1, 1, 1], [5], [4, 4, 4, 4, 4, 4, 4, 4]):
        for size in (2, 3, 8):
            cuts = forward.batch_bounds(lengths, size, 10)
            allowed = [c for c in every(len(lengths)) if all(b - a <= size for a, b in c)]
            assert time(cuts, lengths) == min(time(c, lengths) for c in allowed)
            assert cuts in allowed
    assert forward.batch_bounds([9, 9, 1, 1, 1], 3, float("inf")) == [(0, 3), (3, 5)]


def test_a_model_that_works_on_its_logits_by_place_gets_all_places(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama")
    plain = lm.model.forward

    def by_place(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits * torch.linspace(0.5, 1.5, out.logits.shape[1])[None, :, None]
        return out

    monkeypatch.setattr(lm.model, "forward", by_place)
    parameter = inspect.Parameter("use_cache", inspect.Parameter.KEYWORD_ONLY)
    monkeypatch.setattr(batch.inspect, "signature", lambda _: type("S", (), {"parameters": {parameter.name: parameter}}))
    batches(lm, encode(lm, EXAMPLES, "answer"), 5)
    assert lm.reads_positions is False


def test_threads_take_turns_and_the_setting_is_put_back() -> None:
    inside, seen = threading.Event(), []

    def first() -> None:
        with fast_cpu_kernels(CPU, 20):
            inside.set()
            time.sleep(0.2)

    def second() -> None:
        inside.wait()
        with fast_cpu_kernels(CPU, 20):
            seen.append(precision())
            time.sleep(0.2)  # would leave last what it found, if it had come in between

    threads = [threading.Thread(target=of) for of in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1
    assert precision() == "none"
