"""Peak memory and seconds of each phase on a model of Llama-2-7B's shape, compared with the plan. It needs Linux.

The weights are random: only shapes, memory and time are of interest. A model of 32 blocks needs a machine for it; fewer
blocks of the same shape show the same phases (each block has 202 million parameters). Each row runs in a process of its
own. This process first does the same with a tiny model, so that the peak is without Python and its libraries.
The tokenizer is that of the bundled model; ``--model bundled`` measures the bundled model itself. ``--grid
top1.mlp@0.5,0.1`` searches matrices of the last block alone, because a decomposition of 11008 x 4096 takes a minute on one
thread. ``--passages 8`` guards by a text of 8 passages to choose by in place of 64 that the model writes.
Run: python benchmarks/at_size.py [--blocks 2] [--width 4096 --inner 11008 --heads 32] [--questions 16] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
import shutil
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
from laserlm.export.export_plan import plan_compression, plan_save
from laserlm.searching import SearchConfig, SearchProgress
from laserlm.searching.guard import PASSAGE_TOKENS
from laserlm.searching.plan import plan

GIB = 2**30
STEPS = 3
GRID = "all.all@0.5,0.1,0.01"
TEXT_CHARACTERS = 16_000
RATIO = 0.8
PHASES = ("race", "strengths", "components", "save", "factored", "compress")
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


def run_phase(options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds, peak bytes and planned bytes of each part of a phase."""
    folder = options.folder
    tiny = argparse.Namespace(**vars(options) | {"grid": "top1.all@0.5", "tokens": 1024})
    do(options.phase, laser.load(folder / "tiny", cache=folder / "cache", device="cpu"), folder / "warm", tiny)
    before = resident("VmRSS")
    lm = laser.load(options.model, cache=folder / "cache", device="cpu")
    _ = lm.hash  # it reads all weights, which are in memory only as far as they were used
    forget_peak()
    start = time.perf_counter()
    parts = do(options.phase, lm, folder, options)
    peaks = {name: (peak - before if peak else 0, planned) for name, (peak, planned) in parts.items()}
    return {"seconds": time.perf_counter() - start, "parts": peaks}


def do(name: str, lm: laser.LanguageModel, folder: Path, options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Run a phase; return the peak and the plan of each of its parts, in bytes."""
    folder.mkdir(exist_ok=True)
    if name in ("race", "strengths", "components"):
        return search(name, lm, folder, options)
    if name in ("save", "factored"):
        reduction, form = f"{lm.matrices[-1].layer}.fc_up@0.1", "dense" if name == "save" else "factored"
        planned = plan_save(lm, reduction, form=form).memory.total  # type: ignore[arg-type]
        laser.save(lm, reduction, folder / "saved", form=form)  # type: ignore[arg-type]
        return {"all": (resident("VmHWM"), planned)}
    return compress(lm, folder, options)


def compress(lm: laser.LanguageModel, folder: Path, options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Compress; return the peak and the plan of each stage."""
    text = worldfacts_text(folder / "text.txt", TEXT_CHARACTERS)
    settings: dict[str, Any] = {"ratio": RATIO, "calibration": text, "tokens": options.tokens, "refine": STEPS}
    phases = plan_compression(lm, **settings).phases
    peaks: dict[str, int] = {}
    stage = "text"

    def on_step(now: str, _done: int, total: int) -> None:
        """Note the peak of a step that is done, or of the stage that ends where another one begins."""
        nonlocal stage
        part = now.partition(" ")[0] if total else stage
        peaks[part] = max(peaks.get(part, 0), resident("VmHWM"))
        forget_peak()
        stage = now.partition(" ")[0]

    laser.compress(lm, folder / "small", on_step=on_step, **settings)
    on_step("end", 0, 0)
    return {name: (peaks.get(name, 0), phases[name].total) for name in phases}


def search(strategy: Any, lm: laser.LanguageModel, folder: Path, options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """Search; return the peak and the plan of its gradients and of its scoring."""
    facts, n = laser.task("worldfacts"), options.questions
    task = replace(facts, validation=facts.validation.limit(n), test=facts.test.limit(n))
    guards = None
    if options.passages:  # about three characters a token, and two halves
        guards = (str(worldfacts_text(folder / "guard.txt", 8 * options.passages * PASSAGE_TOKENS)),)
    config = SearchConfig(
        grid=options.grid, metric="loss", strategy=strategy, steps=STEPS, guards=guards, memory=options.memory * 2**20
    )
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
    return {part: (peaks[part], planned[part]) for part in planned}


def worldfacts_text(file: Path, characters: int) -> Path:
    """Write facts of worldfacts as a text."""
    lines = "\n".join(f"{e.prompt} {e.answer}." for e in laser.task("worldfacts").every)
    file.write_text(lines[:characters], encoding="utf-8")
    return file


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
    parser.add_argument("--grid", default=GRID, help="Grid of a race; its matrices are those of all searches.")
    parser.add_argument("--passages", type=int, default=0, help="Passages of a guard; 0 takes the model's own text.")
    parser.add_argument("--memory", type=int, default=1024, help="--memory of a search, in MiB.")
    parser.add_argument("--tokens", type=int, default=2048, help="Tokens of the calibration of a compression.")
    parser.add_argument("--model", help="A model to measure in place of random weights.")
    parser.add_argument("--only", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="A folder to keep the model and its decompositions in.")
    options = parser.parse_args()
    if options.phase:
        print(json.dumps(run_phase(options)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(exist_ok=True)
        if not (folder / "tiny").exists():
            build(folder / "tiny", TINY)
        model = options.model or str(folder / "model")
        if options.model is None and not (folder / "model").exists():
            build(folder / "model", vars(options))
        laser.load(model, cache=folder / "cache", device="cpu")  # here, for a conversion leaves memory to the C library
        print("phase|part|seconds|peak, GiB|plan, GiB|plan / peak")
        for phase in options.only:
            words = [*sys.argv[1:], "--phase", phase, "--model", model, "--folder", str(folder)]
            output = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True).stdout
            done = json.loads(output.splitlines()[-1])
            for part, (peak, planned) in done["parts"].items():
                ratio = f"{planned / peak:.2f}" if peak else "not seen"
                figures = f"{peak / GIB:.2f}|{planned / GIB:.2f}|{ratio}"
                print(phase, part, f"{done['seconds']:.0f}", figures, sep="|", flush=True)
            for made in ("saved", "small"):
                shutil.rmtree(folder / made, ignore_errors=True)
                shutil.rmtree(folder / "warm" / made, ignore_errors=True)


if __name__ == "__main__":
    main()
