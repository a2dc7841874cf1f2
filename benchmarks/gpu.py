"""Time on a device what a search spends its time on: decompositions, the screen, and scoring with and without a reduction.

The model is a Llama of random weights in the given width, so nothing is downloaded. Times are medians of three; the first of
each is left out, for it chooses kernels.
Run: python benchmarks/gpu.py [--device cuda] [--width 2048] [--layers 4] [--dtype float16]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from laserlm.edit import applied
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.linalg import decompose
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.tokenize import encode
from laserlm.searching import expand
from laserlm.searching.device_check import EXAMPLES, missing_gpu, small_llama
from laserlm.searching.screen import screen
from laserlm.tasks import Split

REPEATS = 3
BATCH_SIZE = 32


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median time of some runs after a first one."""
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float16")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and (missing := missing_gpu()):
        print(missing)
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, PyTorch {torch.__version__}, width {given.width}, {given.layers} blocks, {given.dtype}")
    for m, n in ((given.width, given.width), (4 * given.width, given.width)):
        weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0)).to(device)
        seconds = median_seconds(lambda weight=weight: decompose(weight), device)  # type: ignore[misc]
        print(f"decomposition of {m} x {n}: {1000 * seconds:.1f} ms", flush=True)
    lm = small_llama(given.width, given.layers)
    model: Any = lm.model
    model.to(device=device, dtype=getattr(torch, given.dtype))
    examples = EXAMPLES * 10
    rows = encode(lm, examples, "answer")
    candidates = expand("all.all@0.5,0.1", lm.matrices)
    cache = DecompositionCache(memory=2**33)
    seconds = median_seconds(
        lambda: screen(lm, examples, rows, "answer", candidates, cache=cache, batch_size=BATCH_SIZE), device
    )
    print(f"screen of {len(candidates)} candidates on {len(examples)} questions, decompositions held: {1000 * seconds:.1f} ms")
    split = Split("made", "validation", examples, "answer")
    for intervention in ("", "0.fc_out@0.1"):
        with applied(lm, intervention, cache=cache):
            seconds = median_seconds(lambda: evaluate(lm, split, batch_size=BATCH_SIZE), device)
        label = f"under {intervention}" if intervention else "unchanged"
        print(f"scoring {len(examples)} questions, {label}: {1000 * seconds:.1f} ms", flush=True)
    if device.type == "cuda":
        print(f"most memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
