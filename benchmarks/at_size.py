"""Peak memory and seconds of each phase on a model of Llama-2-7B's shape, compared with the plan. It needs Linux.

The weights are random: only shapes, memory and time are of interest. A model of 32 blocks needs a machine for it; fewer
blocks of the same shape show the same phases (each block has 202 million parameters). Each row runs in a process of its
own. This process first does the same with a tiny model, so that the peak is without Python and its libraries.
The tokenizer is that of the bundled model; ``--model bundled`` measures the bundled model itself.
Run: python benchmarks/at_size.py [--blocks 2] [--width 4096 --inner 11008 --heads 32] [--questions 16] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig

import laserlm as laser
from laserlm.searching import SearchConfig, SearchProgress
from laserlm.searching.plan import plan

GRID = "all.all@0.5,0.1,0.01"
GIB = 2**30
STEPS = 3
TEXT_TOKENS = 2048
TEXT_CHARACTERS = 16_000
PHASES = ("race", "components", "save", "compress")
TINY = {"width": 64, "inner": 128, "blocks": 2, "heads": 4, "dtype": "float32"}
GRADIENT_STAGES = ("screen", "gradient", "harm on")


def build(folder: Path, shape: dict[str, Any]) -> None:
    """Save a model of random weights and the bundled model's tokenizer."""
    tokenizer = laser.load("bundled").tokenizer
    assert tokenizer is not None
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape["width"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["blocks"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        dtype=shape["dtype"],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape["dtype"])).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_phase(name: str, model: str, folder: Path, questions: int) -> dict[str, Any]:
    """Return seconds, peak bytes and planned bytes of a phase, and of the parts of a search."""
    do(name, laser.load(folder / "tiny", cache=folder / "cache", device="cpu"), folder / "warm", questions)
    before = resident("VmRSS")
    lm = laser.load(model, cache=folder / "cache", device="cpu")
    _ = lm.hash  # it reads all weights, which are in memory only as far as they were used
    forget_peak()
    start = time.perf_counter()
    peaks, planned = do(name, lm, folder, questions)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "before": before,
        "peaks": {part: peak - before for part, peak in peaks.items()},
        "plan": planned,
    }


def do(name: str, lm: laser.LanguageModel, folder: Path, questions: int) -> tuple[dict[str, int], dict[str, int]]:
    """Run a phase; return the peak and the plan of each of its parts, in bytes."""
    folder.mkdir(exist_ok=True)
    if name in ("race", "components"):
        return search(name, lm, folder, questions)
    if name == "save":
        laser.save(lm, f"{lm.matrices[-1].layer}.fc_up@0.1", folder / "saved")
    else:
        text = folder / "text.txt"
        lines = "\n".join(f"{e.prompt} {e.answer}." for e in laser.task("worldfacts").every)
        text.write_text(lines[:TEXT_CHARACTERS], encoding="utf-8")
        laser.compress(lm, folder / "small", ratio=0.8, calibration=text, tokens=TEXT_TOKENS)
    return {name: resident("VmHWM")}, {}


def search(strategy: Any, lm: laser.LanguageModel, folder: Path, questions: int) -> tuple[dict[str, int], dict[str, int]]:
    """Search; return the peak and the plan of its gradients and of its scoring."""
    facts = laser.task("worldfacts")
    task = replace(facts, validation=facts.validation.limit(questions), test=facts.test.limit(questions))
    grid = GRID if strategy == "race" else "fine"
    config = SearchConfig(grid=grid, metric="loss", strategy=strategy, steps=STEPS)
    planned = {part: phase.total for part, phase in plan(lm, task, config).phases.items()}
    peaks = dict.fromkeys(planned, 0)
    stage = ""

    def note() -> None:
        part = "gradient" if stage.startswith(GRADIENT_STAGES) else "scoring"
        peaks[part] = max(peaks[part], resident("VmHWM"))
        forget_peak()

    def on_step(step: SearchProgress) -> None:
        nonlocal stage
        note()
        stage = step.stage

    laser.search(lm, task, config, on_step=on_step, store=folder / f"{strategy}.db")
    note()
    return peaks, planned


def resident(name: str) -> int:
    """Return a field of this process's status, ``VmRSS`` (memory now) or ``VmHWM`` (its peak), in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Let the peak begin again from the memory of this moment (Linux, proc(5))."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model", help="A model to measure in place of random weights.")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        print(json.dumps(run_phase(options.phase, options.model, options.folder, options.questions)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "tiny", TINY)
        model = options.model or str(folder / "model")
        if options.model is None:
            build(folder / "model", vars(options))
        laser.load(model, cache=folder / "cache", device="cpu")  # here, for a conversion leaves memory to the C library
        print("phase|part|seconds|peak, GiB|plan, GiB|plan / peak")
        for phase in options.only:
            words = ["--phase", phase, "--model", model, "--folder", name, "--questions", str(options.questions)]
            output = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True).stdout
            done = json.loads(output.splitlines()[-1])
            for part, peak in done["peaks"].items():
                planned = done["plan"].get(part)
                figures = (f"{planned / GIB:.2f}", f"{planned / peak:.2f}") if planned else ("none", "none")
                print(phase, part, f"{done['seconds']:.0f}", f"{peak / GIB:.2f}", *figures, sep="|", flush=True)


if __name__ == "__main__":
    main()
