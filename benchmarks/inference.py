"""Weigh and time factored models against the dense one, and against factors multiplied out at each call.

For each kept fraction, of one matrix type and of all matrices: parameters, bytes on disk (and what the ranks say),
resident memory of a fresh process that has loaded and run it, and tokens per second of reading and of writing. The models
take turns in one process; figures are medians over the rounds, speeds as ratios to the dense model's of the same round.

Run: python benchmarks/inference.py [--model bundled] [--rho .01,.05,.1,.25,.5] [--rounds 7] [--dtype bfloat16, of layers]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import laserlm as laser
from laserlm.low_rank import LowRankLinear, Part
from laserlm.models.loading import dtype_named

READ_TOKENS = 512
WRITTEN_TOKENS = 48
CODE = """
import sys, psutil, torch
import laserlm
from transformers import AutoModelForCausalLM
own = psutil.Process().memory_info().rss
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
with torch.inference_mode():
    model(input_ids=torch.tensor([[1, 2, 3]]))  # weights mapped from a file are in memory once they are read
print(psutil.Process().memory_info().rss - own)
"""


class MultipliedOut(nn.Module):
    """The peer: the factors are multiplied out at each call, as in published code."""

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        return F.linear(x, self.layer.dense().to(x.dtype), self.layer.bias)


def multiplied_out(model: nn.Module) -> nn.Module:
    """Put the peer in place of every low-rank layer."""
    for path, layer in [(p, m) for p, m in model.named_modules() if isinstance(m, LowRankLinear)]:
        model.set_submodule(path, MultipliedOut(layer))
    return model


def median_ratio(base: list[float], other: list[float]) -> float:
    """Return how many times as fast ``other`` is, the median over pairs of one round."""
    return statistics.median(b / o for b, o in zip(base, other, strict=True))


def timed(run: Callable[..., object], *args: Any, repeat: int = 1, **kwargs: Any) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    for _ in range(repeat):
        run(*args, **kwargs)
    return (time.perf_counter() - start) / repeat


@torch.inference_mode()
def layers(rounds: int, rhos: list[float], dtype: torch.dtype) -> None:
    """Print how a layer alone compares, at one token and at many."""
    print("layer|rho|rank|tokens|dense, ms|factored, times as fast|multiplied out, times as fast")
    for m, n in ((1536, 576), (576, 1536), (576, 576), (192, 576), (4096, 4096), (11008, 4096)):
        dense = nn.Linear(n, m, bias=False, dtype=dtype)
        for rho in rhos:
            rank = int(rho * min(m, n))
            layer = LowRankLinear(n, m, [Part(m, rank, pivoted=True)], dtype=dtype)
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.02)
            layer.order = torch.randperm(m, dtype=torch.int32)
            peer = MultipliedOut(layer)
            for tokens in (1, 512):
                x = torch.randn(1, tokens, n, dtype=dtype)
                repeat = max(1, int(2e8 / (m * n * tokens)))
                times: dict[str, list[float]] = {"dense": [], "factored": [], "out": []}
                for r in range(rounds + 1):
                    for name, module in (("dense", dense), ("factored", layer), ("out", peer)):
                        seconds = timed(module, x, repeat=repeat)
                        if r:
                            times[name].append(seconds)
                ms = 1e3 * statistics.median(times["dense"])
                ratios = [f"{median_ratio(times['dense'], times[name]):.2f}" for name in ("factored", "out")]
                print("|".join([f"{m} x {n}", f"{rho:g}", str(rank), str(tokens), f"{ms:.3f}", *ratios]), flush=True)


@torch.inference_mode()
def speeds(models: dict[str, Any], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return the seconds of reading and of writing of each model in every round, taking turns."""
    ids = torch.randint(100, 40000, (1, READ_TOKENS), generator=torch.Generator().manual_seed(0))
    short = ids[:, :8]
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": WRITTEN_TOKENS, "min_new_tokens": WRITTEN_TOKENS}
    for r in range(rounds + 1):
        order = list(models.items())
        for name, model in [*order[r % len(order) :], *order[: r % len(order)]]:
            reading = timed(model, input_ids=ids, logits_to_keep=1)
            writing = timed(model.generate, short, attention_mask=torch.ones_like(short), **how)
            if r:
                times[name][0].append(reading)
                times[name][1].append(writing)
    return times


def memory(folder: Path) -> int:
    """Return the bytes by which a fresh process grows when it loads and runs the model in a folder."""
    done = subprocess.run([sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True, check=True, env=os.environ)
    return int(done.stdout.strip().splitlines()[-1])


def whole_models(name: str, rhos: list[str], kinds: list[str], rounds: int, folder: Path) -> None:
    """Print how the whole model compares."""
    lm = laser.load(name)
    base = laser.save(lm, "", folder / "base")
    dense = AutoModelForCausalLM.from_pretrained(base.folder).eval()
    base_memory = memory(base.folder)
    print(
        "reduced|parameters, millions|on disk, MiB|theory, MiB|memory, MiB|matrices as factors|"
        "reading, times as fast|writing, times as fast|multiplied out: reading|multiplied out: writing"
    )
    width = lm.dtype.itemsize
    figures = [f"{base.parameters / 1e6:.1f}", f"{base.bytes / 2**20:.1f}", f"{width * base.parameters / 2**20:.1f}"]
    print("|".join(["nothing (dense)", *figures, f"{base_memory / 2**20:.0f}", "", "1", "1", "", ""]), flush=True)
    for kind in kinds:
        for rho in rhos:
            text = f"all.{kind}@{rho}"
            saved = laser.save(lm, text, folder / text, form="factored")
            models = {
                "dense": dense,
                "factored": AutoModelForCausalLM.from_pretrained(saved.folder).eval(),
                "out": multiplied_out(AutoModelForCausalLM.from_pretrained(saved.folder).eval()),
            }
            times = speeds(models, rounds)
            ratios = [f"{median_ratio(times['dense'][i], times[k][i]):.2f}" for k in ("factored", "out") for i in (0, 1)]
            kept = sum(not h.reason_kept_dense for h in saved.matrices)
            held = [(h.rank * (sum(h.shape) - h.rank), h.shape[0] * h.shape[1]) for h in saved.matrices]
            theory = width * (base.parameters - sum(whole - min(factors, whole) for factors, whole in held))
            figures = [f"{saved.parameters / 1e6:.1f}", f"{saved.bytes / 2**20:.1f}", f"{theory / 2**20:.1f}"]
            figures += [f"{memory(saved.folder) / 2**20:.0f}", f"{kept} of {len(saved.matrices)}"]
            print("|".join([text, *figures, *ratios]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--rho", default=".01,.05,.1,.25,.5")
    parser.add_argument("--kinds", default="fc_up,all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-layers", action="store_true")
    parser.add_argument("--only-layers", action="store_true")
    parser.add_argument("--dtype", default="float32", help="dtype of the layers that are timed alone")
    given = parser.parse_args()
    if not given.skip_layers:
        layers(given.rounds, [float(rho) for rho in given.rho.split(",")], dtype_named(given.dtype))
    if given.only_layers:
        return
    with tempfile.TemporaryDirectory() as temporary:
        whole_models(given.model, given.rho.split(","), given.kinds.split(","), given.rounds, Path(temporary))


if __name__ == "__main__":
    main()
