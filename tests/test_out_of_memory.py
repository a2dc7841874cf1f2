"""Errors that say that memory has run out."""

from __future__ import annotations

import platform
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from laserlm.edit import applied
from laserlm.edit.apply import default_cache
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.errors import LaserError, ModelError
from laserlm.linalg.decomposition import Decomposition
from laserlm.models import LanguageModel, load
from laserlm.out_of_memory import OutOfMemoryError, retry_with_room, return_freed_memory, uniform_out_of_memory

Run = Callable[..., tuple[int, str, str]]

MESSAGES = [
    "CUDA out of memory. Tried to allocate 20.00 MiB.",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 2.61 MB, max allowed: 9.07 GB).",
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes.",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_memory_that_runs_out_is_one_error_whichever_library_says_so(message: str) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught, uniform_out_of_memory():
        raise RuntimeError(message)
    assert isinstance(caught.value, LaserError)
    assert str(caught.value) == message


def test_an_allocation_that_is_too_large_for_this_machine_is_recognised() -> None:
    with pytest.raises(OutOfMemoryError, match="you tried to allocate"), uniform_out_of_memory():
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(OutOfMemoryError), uniform_out_of_memory():
        raise MemoryError


@pytest.mark.parametrize("error", [RuntimeError("a size mismatch"), ValueError("out of memory"), torch.OutOfMemoryError("no")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, uniform_out_of_memory():
        raise error
    assert caught.value is error


def test_a_run_is_repeated_as_long_as_room_can_be_made() -> None:
    room = [0]

    def run() -> int:
        if room[0] < 2:
            raise torch.OutOfMemoryError("no room")
        return room[0]

    def make_room(error: torch.OutOfMemoryError) -> None:
        room[0] += 1

    assert retry_with_room(run, make_room) == 2

    def give_up(error: torch.OutOfMemoryError) -> None:
        raise error

    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        retry_with_room(run, give_up)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_nothing_of_a_failed_run_is_left_when_room_is_made(error: type[Exception]) -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []

    def run() -> int:
        if tensors:
            return 1
        x = torch.zeros(3)
        tensors.append(weakref.ref(x))
        raise error("CUDA out of memory")

    assert retry_with_room(run, lambda _: None if tensors[0]() is None else pytest.fail("a tensor is left")) == 1


@pytest.fixture
def folder(llama: LanguageModel, tmp_path: Path) -> Path:
    """A folder with a tiny model."""
    llama.model.save_pretrained(tmp_path / "model")
    llama.require_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 8 GiB.", "cannot reach the device"])
def test_a_model_that_does_not_fit_names_what_helps(message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    with pytest.raises(ModelError) as caught:
        load(folder)
    options = ["--dtype bfloat16", "--device-map auto", "--device cpu"]
    assert message in str(caught.value)
    assert all((option in str(caught.value)) == ("memory" in message) for option in options)


def test_decompositions_that_are_held_make_room_for_another(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = default_cache(llama.cache)
    get, n_held = cache.get, []

    def tight(weight: Tensor) -> Decomposition:
        n_held.append(cache.clear())
        if n_held[-1]:
            raise RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`")
        return get(weight)

    with applied(llama, "1.fc_in@0.5"):
        expected = llama.model.model.layers[1].mlp.gate_proj.weight.clone()
    cache.clear()
    with applied(llama, "0.fc_in@0.5"):
        pass
    monkeypatch.setattr(cache, "get", tight)
    with applied(llama, "1.fc_in@0.5"):
        assert torch.equal(llama.model.model.layers[1].mlp.gate_proj.weight, expected)
    assert n_held == [True, False]


def test_a_reduction_that_does_not_fit_ends_the_command_in_one_sentence(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DecompositionCache, "get", full)
    (tmp_path / "q.jsonl").write_text('{"prompt": "The capital of France is", "answer": "Paris"}\n')
    code, _, err = run(
        "evaluate", folder, "--task", f"jsonl:{tmp_path / 'q.jsonl'}", "--split", "all", "--reduce", "1.fc_in@0.5"
    )
    assert code == 1
    assert err.strip().splitlines()[-1] == (
        "Error: the reduction of model.layers.1.mlp.gate_proj.weight (48, 32) does not fit into the memory of cpu: CUDA out of "
        "memory. Use --device cpu, or make room with a smaller --dtype or --device-map auto."
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, which keeps freed memory, and Linux's /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))

    torch.ones(7 * 2**20)  # 28 MiB: once they are freed, glibc takes smaller pieces from its own stock
    pieces = [torch.ones(2**18) for _ in range(101)]  # of 1 MiB
    before = resident()
    last = pieces.pop()
    pieces.clear()
    assert before - resident() < 50 * 2**20
    return_freed_memory()
    assert before - resident() > 90 * 2**20
    assert len(last) == 2**18
