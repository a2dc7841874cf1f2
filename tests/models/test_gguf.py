"""GGUF files: converted once, by content, also if they are split or on the hub."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import write_gguf
from safetensors import safe_open

from laserlm.errors import ModelError
from laserlm.export import save
from laserlm.models import LanguageModel, load, loading
from laserlm.models.checkpoint_reader import list_matrices, open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXT = "The capital of France is Paris"


@pytest.fixture
def file(llama: LanguageModel, tmp_path: Path) -> Path:
    return write_gguf(llama, tmp_path / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "converted"


def folders(cache: Path) -> list[Path]:
    """Return the converted models of a cache folder, and what an interrupted conversion left."""
    return sorted((cache / "models").iterdir()) if cache.exists() else []


def hub_with(files: list[Path], hub: Path, subfolder: str = "") -> None:
    """Lay files out as the hub's library does that has downloaded them from the repository org/repo."""
    snapshot = hub / "models--org--repo" / "snapshots" / COMMIT
    (snapshot / subfolder).mkdir(parents=True)
    for file in files:
        shutil.copy(file, snapshot / subfolder)
    (hub / "models--org--repo" / "refs").mkdir()
    (hub / "models--org--repo" / "refs" / "main").write_text(COMMIT)


def test_the_second_use_and_a_copy_read_what_the_first_converted(
    llama: LanguageModel, file: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(file, cache=cache)
    (folder,) = folders(cache)
    assert f"{file} is converted once" in caplog.text
    assert str(folder) in caplog.text
    caplog.clear()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    copy = Path(shutil.copy(file, file.with_name("copy.gguf")))
    for name in (file, copy, file):
        lm = load(name, cache=cache)
        assert (lm.name, lm.hash, lm.dtype, lm.kind) == (str(name), llama.hash, torch.float32, "causal")
        assert lm.require_tokenizer()(TEXT).input_ids == llama.require_tokenizer()(TEXT).input_ids
        assert lm.model.config.to_dict() | {"_name_or_path": ""} == first.model.config.to_dict() | {"_name_or_path": ""}
    assert first.loaded is not None
    assert (first.name, first.loaded["name"], first.hash) == (str(file), str(file), llama.hash)
    assert folders(cache) == [folder]
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("stored", "size"), [(GGMLQuantizationType.F16, 2), (GGMLQuantizationType.BF16, 2), (GGMLQuantizationType.Q8_0, 4)]
)
def test_values_are_exactly_those_of_the_file_in_no_more_bytes_than_they_need(
    stored: GGMLQuantizationType, size: int, llama: LanguageModel, cache: Path, tmp_path: Path
) -> None:
    file = write_gguf(llama, tmp_path / "tiny.gguf", stored)
    lm = load(file, cache=cache)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}["blk.1.ffn_up.weight"]
    path = "model.layers.1.mlp.up_proj.weight"
    assert lm.dtype == torch.float32
    assert torch.equal(lm.model.get_parameter(path), torch.tensor(gguf.dequantize(read.data, read.tensor_type)))
    with safe_open(folders(cache)[0] / "model.safetensors", framework="pt") as opened:
        assert opened.get_tensor(path).element_size() == size
    assert load(file, dtype="bfloat16", cache=cache).dtype == torch.bfloat16
    reader, matrix = open_checkpoint(file, cache=cache), next(m for m in lm.matrices if m.path == path)
    assert torch.equal(reader.read(matrix).float(), lm.model.get_parameter(path))


def test_a_file_with_other_content_is_converted_and_the_old_one_removed(
    make: Callable[..., LanguageModel], file: Path, cache: Path
) -> None:
    load(file, cache=cache)
    old = folders(cache)
    times = file.stat()
    other = make("llama")
    with torch.no_grad():
        other.model.model.norm.weight.fill_(2)
    write_gguf(other, file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    assert load(file, cache=cache).hash == other.hash
    assert len(folders(cache)) == 1
    assert folders(cache) != old


def test_an_interrupted_conversion_leaves_nothing(
    llama: LanguageModel, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(llama.model.config), "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(file, cache=cache)
    assert folders(cache) == []
    assert gguf.GGUFReader(file) is not gguf.GGUFReader(file)
    assert load(file, cache=cache).hash == llama.hash


def test_a_file_that_changes_while_it_is_converted_is_not_kept(
    llama: LanguageModel, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained = type(llama.model.config).save_pretrained

    def changed(*args: Any, **kwargs: Any) -> None:
        save_pretrained(*args, **kwargs)
        file.write_bytes(file.read_bytes() + b"more")

    monkeypatch.setattr(type(llama.model.config), "save_pretrained", changed)
    with pytest.raises(ModelError, match="changed while laserlm read it; run the command again"):
        load(file, cache=cache)
    assert folders(cache) == []


def test_a_full_disk_is_reported_before_anything_is_written(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laserlm.models.gguf.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"takes 1\d\d\.\d kB, .* has 1\.0 kB left; free space there, or give --cache"):
        load(file, cache=cache)
    assert folders(cache) == []


def test_a_split_model_loads_by_the_name_of_its_first_file(llama: LanguageModel, cache: Path, tmp_path: Path) -> None:
    first = write_gguf(llama, tmp_path / "tiny.gguf", most=12)
    assert first.name == "tiny-00001-of-00003.gguf"
    assert list_matrices(first, cache=cache) == llama.matrices
    lm = load(first, cache=cache)
    assert (lm.hash, lm.name) == (llama.hash, str(first))
    assert not list(cache.rglob("*.gguf"))
    with pytest.raises(ModelError, match=r"file 2 of 3 of a model; name the first file, tiny-00001-of-00003\.gguf"):
        load(first.with_name("tiny-00002-of-00003.gguf"), cache=cache)
    third = first.with_name("tiny-00003-of-00003.gguf")
    renamed = Path(shutil.copy(first, tmp_path / "renamed.gguf"))
    with pytest.raises(ModelError, match="is file 1 of 3 of a model, and its name says 1 of 1; give the files the names"):
        load(renamed, cache=cache)
    shutil.copy(first.with_name("tiny-00002-of-00003.gguf"), third)
    with pytest.raises(ModelError, match="is file 2 of 3 of a model, and its name says 3 of 3"):
        load(first, cache=cache)
    third.unlink()
    with pytest.raises(ModelError, match=rf"is the first of 3 files; {tmp_path} lacks {third.name}: copy it there"):
        load(first, cache=cache)


@pytest.mark.parametrize("most", [0, 12])
def test_a_file_of_a_hub_repository_loads_by_repository_and_path(
    most: int, llama: LanguageModel, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_gguf(llama, tmp_path / "tiny.gguf", most=most)
    hub_with(sorted(tmp_path.glob("*.gguf")), tmp_path / "hub", "F32")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name = f"org/repo/F32/{first.name}"
    lm = load(name, cache=cache)
    assert (lm.name, lm.revision, lm.hash) == (name, COMMIT, llama.hash)
    assert lm.loaded is not None
    assert (lm.loaded["name"], lm.loaded["revision"]) == (name, COMMIT)
    assert list_matrices(name, cache=cache) == llama.matrices
    base = json.loads((save(lm, "1.fc_in@0.2", tmp_path / "out").folder / "laser.json").read_text())["base"]
    assert [base[key] for key in ("name", "hub", "revision", "hash")] == [name, "org/repo", COMMIT, llama.hash]
    with pytest.raises(ModelError, match=r"no GGUF file 'org/repo/other\.gguf' here, and the hub gives none"):
        load("org/repo/other.gguf", cache=cache)


def test_a_folder_of_gguf_files_says_to_name_one(file: Path) -> None:
    for use in (load, list_matrices):
        with pytest.raises(ModelError, match=rf"The folder holds GGUF files; name one of them, such as {file}"):
            use(file.parent)


def test_headers_are_enough_to_list_the_matrices(llama: LanguageModel, file: Path, cache: Path) -> None:
    assert list_matrices(file, cache=cache) == llama.matrices
    assert folders(cache) == []
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert list_matrices(file, cache=cache) == llama.matrices
    with pytest.raises(ModelError, match=r"cannot be read as GGUF .* if it is damaged, copy or download it again"):
        load(file, cache=cache)
    file.write_bytes(b"no GGUF file at all")
    for use in (load, list_matrices):
        with pytest.raises(ModelError, match="cannot be read as GGUF"):
            use(file, cache=cache)
    assert folders(cache) == []


def test_a_damaged_copy_in_the_cache_is_reported_with_the_command_that_removes_it(file: Path, cache: Path) -> None:
    load(file, cache=cache)
    weights = folders(cache)[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="remove it with 'laser clear-cache'"):
        load(file, cache=cache)
    record = folders(cache)[0] / "gguf.json"
    record.write_text("{")
    with pytest.raises(ModelError, match="remove it with 'laser clear-cache'"):
        load(file, cache=cache)
    assert len(json.loads(record.read_text())["files"]) == 1


def test_tensors_that_the_model_does_not_take_are_reported(
    llama: LanguageModel, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_gguf(llama, tmp_path / "tiny.gguf", extra={"blk.0.attn_q.bias": np.ones(32, np.float32)})
    for _ in range(2):
        caplog.clear()
        load(file, cache=cache)
        assert f"{file} has 1 tensors that transformers does not read: blk.0.attn_q.bias" in caplog.text


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotary_scaling_of_llama_3_is_read(
    factor: float, llama: LanguageModel, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llama.model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(4) / 4)  # of the four pairs of a head of eight
    smooth = ((8192 / wavelengths - 1) / (4 - 1)).clip(0, 1)
    factors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    lm = load(write_gguf(llama, tmp_path / "a.gguf", extra={"rope_freqs.weight": factors}), cache=cache)
    assert lm.model.config.rope_parameters["rope_type"] == "llama3"
    assert np.allclose(lm.model.model.rotary_emb.inv_freq.numpy(), 2 * np.pi / wavelengths / factors, rtol=1e-5)
    assert "does not read" not in caplog.text
    other = load(write_gguf(llama, tmp_path / "b.gguf", extra={"rope_freqs.weight": factors * 2}), cache=cache)
    assert other.model.config.rope_parameters["rope_type"] == "default"
    assert "has 1 tensors that transformers does not read: rope_freqs.weight" in caplog.text


def test_the_bundled_model_is_announced_and_converted_like_any_file(
    llama: LanguageModel, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading.bundled, "packaged_file", lambda: file)
    monkeypatch.setattr(loading.bundled, "check", lambda _: None)
    assert list_matrices("bundled", cache=cache) == llama.matrices
    assert folders(cache) == []
    lm = load("bundled", cache=cache)
    assert (lm.hash, lm.name) == (llama.hash, "bundled")
    assert "is converted once" in caplog.text
    assert folders(cache) == [loading.bundled.converted(cache)]
