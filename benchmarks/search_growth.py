"""How the cost of a search grows: twice the examples, twice the blocks, twice the candidates.

Tiny Llama models with random weights (256 wide) on questions of worldfacts. Each way is timed in turns, median of three.
With ``--depth``, races in models of 30, 60 and 120 blocks, 64 wide: processor seconds, and tokens that went through a block.
Run: python benchmarks/search_growth.py [--depth]
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import laserlm as laser
from laserlm.models import LanguageModel
from laserlm.searching import Strategy
from laserlm.tasks import Task


def model(blocks: int, width: int = 256) -> LanguageModel:
    torch.manual_seed(0)
    tokenizer = laser.load("bundled").tokenizer
    config = LlamaConfig(
        vocab_size=49152, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config), tokenizer, f"{blocks} blocks", "causal")


def task(examples: int) -> Task:
    whole = laser.task("worldfacts")
    return Task("made", whole.validation.limit(examples), whole.test.limit(10), whole.every)


def seconds(lm: LanguageModel, examples: int, grid: str, strategy: Strategy) -> float:
    start = time.perf_counter()
    laser.search(lm, task(examples), grid=grid, strategy=strategy, metric="loss")
    return time.perf_counter() - start


def time_depths() -> None:
    """Print what races in deeper and deeper models take."""
    seconds(model(2, 64), 64, "all.mlp@0.5,0.1", "race")
    for blocks in (30, 60, 120):
        lm, tokens = model(blocks, 64), list[int]()
        hook = partial(_note_tokens, tokens)
        for block in lm.model.model.layers:
            block.mlp.register_forward_hook(hook)
        start = time.process_time()
        found = laser.search(lm, task(64), grid="all.mlp@0.5,0.1", strategy="race", metric="loss", guards=())
        used, total = time.process_time() - start, sum(tokens)
        print(
            f"{blocks:4} blocks: {found.candidates} candidates, {found.scored} scored; {used:.1f} s; {total:,} tokens "
            f"through a block, {total / blocks:,.0f} through all of them",
            flush=True,
        )


def _note_tokens(tokens: list[int], _module: Any, args: Any, _output: Any) -> None:
    tokens.append(args[0].shape[:-1].numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", action="store_true", help="races in models of 30, 60 and 120 blocks instead")
    if parser.parse_args().depth:
        time_depths()
        return
    few, many = "all.mlp@0.5,0.1", "all.mlp@0.75,0.5,0.25,0.1"
    small, large = model(6), model(12)
    ways = {
        "as it is": (small, 64, few),
        "examples x 2": (small, 128, few),
        "blocks x 2": (large, 64, few),
        "candidates x 2": (small, 64, many),
    }
    for strategy in ("exhaustive", "race"):
        chosen: Strategy = strategy
        times: dict[str, list[float]] = {name: [] for name in ways}
        for lm in (small, large):
            seconds(lm, 64, many, chosen)  # decompositions are on disk from here on
        for _ in range(3):
            for name, (lm, examples, grid) in ways.items():
                times[name].append(seconds(lm, examples, grid, chosen))
        base = statistics.median(times["as it is"])
        for name, t in times.items():
            print(f"{strategy:12}{name:18}{statistics.median(t):8.2f} s  {statistics.median(t) / base:5.2f} x", flush=True)


if __name__ == "__main__":
    main()
