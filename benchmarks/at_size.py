"""Peak memory and seconds of each phase on a model of Llama-2-7B's shape, beside the plan's figures.

The weights are random: only shapes, memory and time are of interest. A model of 32 blocks needs a machine for it; fewer
blocks of the same shape show the same phases (each block has 202 million parameters). Each phase runs in a process of its
own, so that its peak is its own. The tokenizer is that of the bundled model.
Run: python benchmarks/at_size.py [--blocks 2] [--width 4096 --inner 11008 --heads 32] [--questions 16] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig

import laserlm as laser
from laserlm.searching import SearchConfig, expand
from laserlm.searching.driver import VALIDATION, encode_splits
from laserlm.searching.plan import plan
from laserlm.searching.scorer import PrefixScorer

GRID = "all.all@0.5,0.1,0.01"
GIB = 2**30
TEXT_TOKENS = 2048
TEXT_CHARACTERS = 16_000
PHASES = ("load", "screen", "race", "save", "compress")


def build(folder: Path, given: argparse.Namespace) -> None:
    """Save a model of random weights and the bundled model's tokenizer."""
    tokenizer = laser.load("bundled").tokenizer
    assert tokenizer is not None
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.width,
        intermediate_size=given.inner,
        num_hidden_layers=given.blocks,
        num_attention_heads=given.heads,
        num_key_value_heads=given.heads,
        dtype=given.dtype,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, given.dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_phase(name: str, folder: Path, questions: int) -> dict[str, Any]:
    """Return seconds, peak bytes of the process and the plan's bytes of one phase."""
    lm = laser.load(folder / "model", cache=folder / "cache", device="cpu")
    facts = laser.task("worldfacts")
    task = replace(facts, validation=facts.validation.limit(questions), test=facts.test.limit(questions))
    config = SearchConfig(grid=GRID, metric="loss")
    expected = plan(lm, task, config)
    before = peak()

    def screen() -> None:
        encoded = encode_splits(lm, task, config.for_task(task))[VALIDATION]
        scorer = PrefixScorer(lm, {VALIDATION: encoded}, memory=config.memory)
        scorer.screen(VALIDATION, 0, expand(GRID, lm.matrices))

    def compress() -> None:
        text = folder / "text.txt"
        lines = "\n".join(f"{e.prompt} {e.answer}." for e in facts.every)
        text.write_text(lines[:TEXT_CHARACTERS], encoding="utf-8")
        laser.compress(lm, folder / "small", ratio=0.8, calibration=text, tokens=TEXT_TOKENS)

    phases: dict[str, Callable[[], object]] = {
        "load": lambda: None,
        "screen": screen,
        "race": lambda: laser.search(lm, task, config),
        "save": lambda: laser.save(lm, f"{lm.matrices[-1].layer}.fc_up@0.1", folder / "saved"),
        "compress": compress,
    }
    start = time.perf_counter()
    phases[name]()
    plans = {"load": expected.weights, "screen": expected.memory, "race": expected.memory}
    return {"seconds": time.perf_counter() - start, "peak": peak(), "before": before, "plan": plans.get(name)}


def peak() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.phase:
        print(json.dumps(run_phase(given.phase, given.folder, given.questions)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "model", given)
        base = None
        print("phase|seconds|peak, GiB|without Python and PyTorch, GiB|plan, GiB")
        for phase in PHASES:
            words = [sys.executable, __file__, "--phase", phase, "--folder", name, "--questions", str(given.questions)]
            done = json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
            # What is there besides the weights once the model is loaded is not the phase's.
            base = done["peak"] - done["plan"] if base is None else base
            planned = f"{done['plan'] / GIB:.2f}" if done["plan"] else "none"
            print(
                f"{phase}|{done['seconds']:.0f}|{done['peak'] / GIB:.2f}|{(done['peak'] - base) / GIB:.2f}|{planned}",
                flush=True,
            )


if __name__ == "__main__":
    main()
