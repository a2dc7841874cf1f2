"""A compression that is killed in every stage, and given again each time, ends in the model of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CODE = """
import os, signal, sys
import laserlm.export.compression as compression
from laserlm.cli import main

stage, at, *sys.argv[1:] = sys.argv[1:]
uninterrupted, seen = compression.compress, []


def compress(*args, on_step, **options):
    def step(name, done, total):
        seen.append(name)
        if sum(n.startswith(stage) for n in seen) == int(at) and name.startswith(stage):
            os.kill(os.getpid(), signal.SIGKILL)
        on_step(name, done, total)

    return uninterrupted(*args, on_step=step, **options)


compression.compress = compress
main()
"""
STAGES = [("text", 3), ("gradients", 4), ("decompositions", 6), ("refinement", 30), ("perplexity", 1), ("writing", 1)]
"""Stages in their order, and how many of a stage's steps are begun when the process is killed."""


def started(folder: Path, out: Path, cache: Path, stage: str = "none", at: int = 0) -> int:
    arguments = ["compress", folder, "--ratio", "0.6", "--tokens", "250", "--refine", "40", "--out", out, "--cache", cache]
    arguments += ["--products", "float32"]  # training with products in bfloat16 rounds otherwise from process to process
    command = [sys.executable, "-c", CODE, stage, str(at), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False).returncode


def test_a_compression_that_is_killed_in_every_stage_goes_on(folder: Path, tmp_path: Path) -> None:
    assert started(folder, tmp_path / "expected", tmp_path / "other-cache") == 0
    out, cache = tmp_path / "out", tmp_path / "cache"
    for stage, at in STAGES:
        assert started(folder, out, cache, stage, at) == -signal.SIGKILL, stage
        assert not out.exists()
    assert started(folder, out, cache) == 0
    assert list((cache / "compressions").iterdir()) == []
    for name in ("model.safetensors", "calibration.txt"):
        assert (out / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    records = [json.loads((saved / "laser.json").read_text())["compression"] for saved in (out, tmp_path / "expected")]
    assert records[0] == records[1]
