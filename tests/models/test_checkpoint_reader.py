from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import CAUSAL, FAMILIES

from laserlm.errors import ModelError, WeightError
from laserlm.export import save
from laserlm.models import LanguageModel, load, read_matrix
from laserlm.models.checkpoint_reader import list_matrices, open_checkpoint

Make = Callable[..., LanguageModel]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mixtral"])
def test_every_matrix_is_read_from_the_files_as_from_the_model(family: str, make: Make, tmp_path: Path) -> None:
    lm = make(family)
    lm.model.save_pretrained(tmp_path, max_shard_size="40KB")
    stored = open_checkpoint(tmp_path)
    assert stored.family == lm.family
    assert stored.matrices == lm.matrices
    for m in stored.matrices:
        assert torch.equal(stored.read(m), read_matrix(lm.model, m)), m.id


def test_a_layout_of_its_own_is_reported(make: Make, tmp_path: Path) -> None:
    lm = make("mixtral")  # whose experts are stored one by one and stacked when loaded
    lm.model.save_pretrained(tmp_path)
    stored = open_checkpoint(tmp_path)
    attention, expert = (next(m for m in stored.matrices if m.name == name) for name in ("q_proj", "experts.1.fc_in"))
    assert torch.equal(stored.read(attention), read_matrix(lm.model, attention))
    with pytest.raises(WeightError, match="another layout"):
        stored.read(expert)


def test_factors_are_not_taken_for_the_matrix(llama: LanguageModel, tmp_path: Path) -> None:
    saved = save(llama, "1.fc_in@0.2", tmp_path / "out", form="factored")
    stored = open_checkpoint(saved.folder)
    matrix = next(m for m in stored.matrices if m.id == "1.fc_in")
    with pytest.raises(WeightError, match=r"\(6, 32\), not \(48, 32\)"):
        stored.read(matrix)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-org/no-such-model"])
def test_what_is_not_there_is_reported(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot open"):
        open_checkpoint(name)
    with pytest.raises(ModelError, match="no safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrices_of_a_config_alone_are_those_of_the_model(family: str, make: Make, tmp_path: Path) -> None:
    lm = make(family)
    lm.model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert list_matrices(tmp_path) == lm.matrices
    if family in CAUSAL:
        lm.model.save_pretrained(tmp_path)
        assert list_matrices(tmp_path, kind="headless") == load(tmp_path, kind="headless").matrices


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_matrices_that_are_held_as_factors_are_listed_as_when_loaded(family: str, make: Make, tmp_path: Path) -> None:
    lm = make(family)
    folder = save(lm, f"{'decoder.' if family == 't5' else ''}1.attn@0.2", tmp_path / "out", form="factored").folder
    assert list_matrices(folder) == load(folder).matrices


def test_weights_of_every_form_are_left_unread(llama: LanguageModel, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    llama.model.config.save_pretrained(tmp_path)
    assert list_matrices(tmp_path) == llama.matrices
    llama.model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert list_matrices(tmp_path) == llama.matrices
    shard = max(tmp_path.glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    for use in (list_matrices, open_checkpoint):
        with pytest.raises(ModelError, match=rf"{shard.name} is damaged or was cut short"):
            use(tmp_path)
    shard.unlink()
    for use in (list_matrices, open_checkpoint):
        with pytest.raises(ModelError, match=shard.name):
            use(tmp_path)
    shard.write_bytes(content)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json cannot be read"):
        list_matrices(tmp_path)


def quantised(folder: Path, llama: LanguageModel, method: str) -> Path:
    """Save a model whose config says that it is quantised by a method."""
    llama.model.save_pretrained(folder)
    llama.require_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("mxfp4", "save_original_format=False"),
        ("gptq", "with the tool that quantised it"),
        ("hqq", "Reduce the unquantised checkpoint"),
    ],
)
def test_quantised_checkpoints_are_refused_with_a_way_out(method: str, step: str, llama: LanguageModel, tmp_path: Path) -> None:
    folder = quantised(tmp_path, llama, method)
    with pytest.raises(WeightError, match=f"quantised by {method}.*{step}"):
        list_matrices(folder)
    if method != "mxfp4":  # which transformers unpacks by itself
        with pytest.raises(ModelError, match=f"quantised by {method}.*{step}"):
            load(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors"])
def test_weights_that_a_package_turns_into_floats_are_listed_and_need_it_to_load(
    method: str, llama: LanguageModel, tmp_path: Path
) -> None:
    folder = quantised(tmp_path, llama, method)
    assert list_matrices(folder) == llama.matrices
    with pytest.raises(ModelError, match=f"whose package turns its weights into floats: pip install {method}"):
        load(folder)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_packed_weights_are_refused(llama: LanguageModel, tmp_path: Path) -> None:
    llama.model.config.quantization_config = {"quant_method": "bitnet", "linear_class": "bitlinear"}
    llama.model.config.save_pretrained(tmp_path)
    with pytest.raises(WeightError, match=r"no matrices to list.*quantised by bitnet.*unquantised checkpoint"):
        list_matrices(tmp_path)


def test_a_head_that_the_checkpoint_lacks_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    llama.model.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="which is causal, not masked"):
        list_matrices(tmp_path, kind="masked")
    with pytest.raises(ModelError, match="cannot load '/nowhere/at/all'"):
        list_matrices("/nowhere/at/all")
