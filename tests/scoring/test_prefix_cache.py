from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import TOKENIZERS, VOCAB
from searching.support import EVERY
from torch import nn
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from laserlm.edit import applied
from laserlm.models import LanguageModel
from laserlm.models.matrices import find_stacks
from laserlm.scoring.evaluate import evaluate, evaluate_rows
from laserlm.scoring.forward import batches
from laserlm.scoring.prefix_cache import PrefixCache, PrefixCheck
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.tokenize import encode
from laserlm.tasks import Example, Split

Make = Callable[..., LanguageModel]

EXAMPLES = tuple(
    Example(str(i), prompt, answer)
    for i, (prompt, answer) in enumerate(
        [
            ("The capital of France is", "Paris"),
            ("The capital of Spain, which is a country, is", "Madrid"),
            ("Rome is", "a city in Italy"),
            ("Oslo", "is the capital"),
            ("The capital of Norway is a city and the capital of Portugal is", "Lisbon"),
        ]
    )
)
SPLIT = Split("example", "all", EXAMPLES, "answer")


def forwards(lm: LanguageModel) -> dict[str, Any]:
    return {name: module.__dict__.get("forward") for name, module in lm.model.named_modules()}


@pytest.mark.parametrize("family", EVERY)
def test_every_candidate_scores_as_in_a_full_pass(family: str, make: Make) -> None:
    lm = make(family)
    before = forwards(lm)
    rows = encode(lm, EXAMPLES, "answer")
    frontier = PrefixCache(lm, rows, 2)
    blocks = [(name, layer) for name, _, stack in find_stacks(lm.model) for layer in range(len(stack))]
    for count, (stack, layer) in enumerate(blocks):
        frontier.move_to(stack, layer)
        assert frontier.boundary == count
        for m in lm.matrices:
            if (m.stack, m.layer) == (stack, layer) and not m.parts:
                with applied(lm, f"{m.id}@0.3"):
                    full = evaluate(lm, SPLIT, batch_size=2)
                    short = evaluate_rows(lm, SPLIT, "answer", rows, frontier.run)
                assert [s.correct for s in short.scores] == [s.correct for s in full.scores]
                assert [s.logprob for s in short.scores] == pytest.approx([s.logprob for s in full.scores], abs=1e-4)
                assert [s.predicted for s in short.scores] == [s.predicted for s in full.scores]
    assert forwards(lm) == before


@pytest.mark.parametrize("family", ["llama", "roberta", "t5"])
def test_blocks_below_the_boundary_are_not_run_and_the_boundary_is_one_output_a_stack(family: str, make: Make) -> None:
    lm = make(family)
    rows = encode(lm, EXAMPLES, "answer")
    frontier = PrefixCache(lm, rows, 2)
    calls: list[tuple[str, int]] = []
    for name, _, stack in find_stacks(lm.model):
        for layer, block in enumerate(stack):
            inner = next(m for m in block.modules() if isinstance(m, nn.Linear))
            inner.register_forward_hook(lambda *_, place=(name, layer): calls.append(place))
    name, _, stack = find_stacks(lm.model)[-1]
    frontier.move_to(name, len(stack) - 1)
    calls.clear()
    frontier.run()
    assert set(calls) == {(name, len(stack) - 1)}
    todo = batches(lm, rows, 2, joined=True)
    assert len(calls) == len(todo) == 3  # of two sequences
    hidden = sum(b.inputs["input_ids"].numel() for b in todo) * 32 * 4
    if family == "t5":
        assert frontier.bytes > hidden
    else:
        assert frontier.bytes == hidden


def test_below_where_it_is_the_boundary_starts_again(llama: LanguageModel) -> None:
    frontier = PrefixCache(llama, encode(llama, EXAMPLES, "answer"), 8)
    frontier.move_to("", 2)
    expected = frontier.run()
    for layer in (1, 0, 2):
        frontier.move_to("", layer)
        assert frontier.boundary == layer
        assert frontier.run() == expected


def test_earlier_boundaries_serve_the_way_down_until_they_are_freed(llama: LanguageModel) -> None:
    frontier = PrefixCache(llama, encode(llama, EXAMPLES, "answer"), 8)
    runs: list[int] = []
    llama.model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(0))
    frontier.move_to("", 1)
    one = frontier.bytes
    below = frontier.run()
    frontier.move_to("", 2)
    above = frontier.run()
    assert frontier.bytes == 2 * one
    runs.clear()
    frontier.move_to("", 1)
    assert frontier.run() == below
    frontier.move_to("", 2)
    assert frontier.run() == above
    assert runs == []
    while frontier.free_lowest():
        pass
    assert frontier.bytes == one
    assert frontier.run() == above
    frontier.move_to("", 1)
    assert runs
    assert frontier.run() == below


def test_boundaries_are_tried_on_the_ends_of_long_rows(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laserlm.scoring.prefix_cache.CHECKED_TOKENS", 4)
    ids = tuple(range(5, 45))
    rows = [TokenSequence(0, ids[:n], ids[1 : n + 1], tuple(range(n))) for n in (3, 20, 30, 39)]
    cache = PrefixCache(llama, rows, 4)
    lengths: list[int] = []
    llama.model.model.layers[2].mlp.register_forward_hook(lambda _module, args, _output: lengths.append(args[0].shape[1]))
    check = PrefixCheck(llama, rows)
    assert check.is_exact(1)
    assert max(lengths) == 4
    whole = cache.run()
    cache.move_to("", 2)
    assert cache.boundary == 2
    assert [x for one in cache.run() for x in one.logprobs] == pytest.approx(
        [x for one in whole for x in one.logprobs], abs=1e-5
    )


def test_an_error_inside_a_pass_puts_the_blocks_back(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    frontier = PrefixCache(llama, encode(llama, EXAMPLES, "answer"), 8)
    frontier.move_to("", 1)
    before = forwards(llama)

    def broken(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(llama.model.model.norm, "forward", broken)
    with pytest.raises(torch.OutOfMemoryError):
        frontier.run()
    monkeypatch.undo()
    assert {k: v for k, v in forwards(llama).items() if k != "model.norm"} == {
        k: v for k, v in before.items() if k != "model.norm"
    }


def test_a_model_that_passes_things_by_its_blocks_is_run_in_full_and_reported(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    lm = make("gptj")
    first, last = lm.model.transformer.h[0], lm.model.transformer.h[2]
    aside: list[torch.Tensor] = []
    # The last block adds what the first one put aside: no block gives it out.
    first.mlp.register_forward_hook(lambda _m, _a, out: aside.append(out))
    last.mlp.register_forward_hook(lambda _m, _a, out: out + aside.pop() if aside else 3 * out)
    rows = encode(lm, EXAMPLES, "answer")
    frontier = PrefixCache(lm, rows, 2)
    with caplog.at_level(logging.WARNING):
        frontier.move_to("", 1)
    assert "every pass is a complete one" in caplog.text
    assert not frontier.is_enabled
    frontier.move_to("", 2)
    assert frontier.boundary == 0
    full = evaluate(lm, SPLIT, batch_size=2)
    assert replace(evaluate_rows(lm, SPLIT, "answer", rows, frontier.run), seconds=0) == replace(full, seconds=0)


def test_a_model_that_cannot_be_cut_is_not_called_one_that_cannot_be_scored(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    lm = make("gemma3n")  # later blocks take keys and values that earlier ones put aside
    with caplog.at_level(logging.WARNING):
        PrefixCache(lm, encode(lm, EXAMPLES, "answer"), 2).move_to("", 3)
    assert "(KeyError: 'full_attention'); every pass is a complete one" in caplog.text


def test_a_block_that_adds_to_its_input_in_place_leaves_what_is_kept_as_it_was(llama: LanguageModel) -> None:
    def add(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].add_(0.5)

    llama.model.model.layers[1].register_forward_pre_hook(add)
    rows = encode(llama, EXAMPLES, "answer")
    frontier = PrefixCache(llama, rows, 2)
    full = evaluate(llama, SPLIT, batch_size=2)
    frontier.move_to("", 1)
    assert frontier.boundary == 1
    for _ in range(2):
        assert replace(evaluate_rows(llama, SPLIT, "answer", rows, frontier.run), seconds=0) == replace(full, seconds=0)


@pytest.mark.parametrize("difference", [2e-4, 1.0])
def test_a_boundary_from_which_scores_differ_is_not_used(
    difference: float, llama: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    head, calls = llama.model.lm_head, [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    def shift(_module: nn.Module, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        # The first block is not called in a pass through its stub, and the model computes something else without it.
        logits = logits.clone()
        logits[..., ::2] += 0.0 if calls[0] else 2 * difference
        calls[0] = 0
        return logits

    llama.model.model.layers[0].mlp.register_forward_hook(count)
    head.register_forward_hook(shift)
    frontier = PrefixCache(llama, encode(llama, EXAMPLES, "answer"), 2)
    with caplog.at_level(logging.WARNING):
        frontier.move_to("", 1)
    assert "scores differ" in caplog.text
    assert frontier.boundary == 0
    assert not frontier.is_enabled


def test_a_block_that_runs_twice_is_run_in_full(make: Make) -> None:
    lm = make("llama")
    lm.model.model.layers[2] = lm.model.model.layers[1]
    rows = encode(lm, EXAMPLES, "answer")
    frontier = PrefixCache(lm, rows, 8)
    frontier.move_to("", 2)
    assert frontier.boundary == 0
    assert evaluate_rows(lm, SPLIT, "answer", rows, frontier.run).loss == pytest.approx(evaluate(lm, SPLIT).loss, abs=1e-6)


def test_an_unknown_architecture_needs_no_code() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("codegen", n_embd=32, n_head=4, n_layer=3, rotary_dim=4, vocab_size=VOCAB, n_positions=64)
    lm = LanguageModel(
        model=AutoModelForCausalLM.from_config(config), tokenizer=TOKENIZERS["causal"](), name="codegen", kind="causal"
    )
    rows = encode(lm, EXAMPLES, "answer")
    frontier = PrefixCache(lm, rows, 3)
    frontier.move_to("", 2)
    assert frontier.boundary == 2
    with applied(lm, "2.mlp.fc_in@r3"):
        short = evaluate_rows(lm, SPLIT, "answer", rows, frontier.run)
        full = evaluate(lm, SPLIT, batch_size=3)
    assert replace(short, seconds=0) == replace(full, seconds=0)
