from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import check_here
from safetensors.torch import load_file, save_file

from laserlm.errors import ExportError
from laserlm.export import load_check, save
from laserlm.export.load_in_subprocess import compute_in_float32, fingerprint
from laserlm.models import LanguageModel

Make = Callable[..., LanguageModel]

DTYPES = ["float32", "float16", "bfloat16"]
FORMS = ["dense", "factored"]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    check_here(monkeypatch)


def change_record(folder: Path, **entries: Any) -> None:
    file = folder / "laser.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "t5", "bert"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_healthy_folder_agrees_and_one_without_a_small_reduction_does_not(
    dtype: str, form: str, family: str, make: Make, tmp_path: Path
) -> None:
    lm = make(family)
    stack = "encoder." if family == "t5" else ""
    saved = save(lm, f"{stack}0.fc_in@0.9+{stack}1.fc_out@0.1", tmp_path / "out", form=form, dtype=dtype)
    check = load_check(saved.folder)
    assert check.agrees, check
    assert check.difference is not None
    assert check.difference < 1e-5
    # As if the first of the two reductions had been forgotten: another folder with these outputs in its record.
    lacking = save(lm, f"{stack}1.fc_out@0.1", tmp_path / "lacking", form=form, dtype=dtype).folder
    change_record(lacking, fingerprint=saved.record["fingerprint"])
    check = load_check(lacking)
    assert check.changed == ()
    assert check.difference is not None
    assert check.difference > check.tolerance
    assert not check.agrees


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_change_of_a_matrix_is_noticed(dtype: str, form: str, llama: LanguageModel, tmp_path: Path) -> None:
    folder = save(llama, "1.fc_in@0.2", tmp_path / "out", form=form, dtype=dtype).folder
    weights = load_file(folder / "model.safetensors")
    matrix = weights["model.layers.2.mlp.down_proj.weight"]
    matrix[3, 4] = torch.nextafter(matrix[3, 4], matrix[3, 4] + 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    check = load_check(folder)
    assert check.difference is not None
    assert check.difference < check.tolerance
    assert check.changed == check.changed_weights == ("model.safetensors",)
    assert not check.agrees


@pytest.mark.parametrize("family", ["llama", "gptj", "t5"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_was_cast_in_memory_is_saved_and_agrees(
    dtype: torch.dtype, family: str, make: Make, tmp_path: Path
) -> None:
    lm = make(family)
    lm.model.to(dtype)  # casts the rotary frequencies too, which a folder does not hold
    check = load_check(save(lm, "all.fc_out@0.5", tmp_path / "out").folder)
    assert check.agrees, check


def test_a_folder_of_the_first_release_is_compared_as_it_was_recorded(llama: LanguageModel, tmp_path: Path) -> None:
    folder = save(llama, "1.fc_in@0.2", tmp_path / "out", dtype="bfloat16").folder
    record = json.loads((folder / "laser.json").read_text())
    del record["fingerprint_dtype"]
    (folder / "laser.json").write_text(json.dumps(record))
    check = load_check(folder)
    assert check.agrees
    assert not check.in_float32
    assert check.tolerance == 3e-2
    assert "0.1.0" in str(check)
    assert check.difference is not None
    assert check.difference > 1e-3  # computed in bfloat16


def test_every_block_computes_in_float32_and_keeps_its_weights(make: Make) -> None:
    for family in ("llama", "t5", "mixtral"):
        lm, same = make(family), make(family)
        for model in (lm.model, same.model):
            model.to(torch.bfloat16).eval()
        before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
        outputs = fingerprint(lm.model)
        expected = fingerprint(same.model.float())
        undo = compute_in_float32(lm.model)
        torch.testing.assert_close(torch.tensor(fingerprint(lm.model)), torch.tensor(expected))
        assert {p.dtype for p in lm.model.parameters()} == {torch.float32, torch.bfloat16}
        undo()
        assert all(t.dtype == before[n].dtype and torch.equal(t, before[n]) for n, t in lm.model.state_dict().items())
        assert fingerprint(lm.model) == outputs


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_the_dtype_cannot_hold_are_not_saved(form: str, llama: LanguageModel, tmp_path: Path) -> None:
    with torch.no_grad():
        llama.model.model.layers[2].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(ExportError, match=r"down_proj\.weight \(2\.fc_out\).* 1e\+05.*float16 ends at 6\.55e\+04.*bfloat16"):
        save(llama, "1.fc_in@0.2", tmp_path / "out", form=form, dtype="float16")
    assert list(tmp_path.glob("*out*")) == []
    assert load_check(save(llama, "1.fc_in@0.2", tmp_path / "out", form=form, dtype="bfloat16").folder).agrees


@pytest.mark.parametrize("problem", ["missing", "unexpected"])
def test_a_folder_with_fewer_or_more_tensors_than_its_model_is_reported(problem: str, make: Make, tmp_path: Path) -> None:
    file = save(make("llama"), "1.fc_in@0.5", tmp_path / "out").folder / "model.safetensors"
    tensors = load_file(file)
    weight = tensors.pop("model.layers.1.mlp.up_proj.weight")
    if problem == "unexpected":
        tensors |= {"model.layers.1.mlp.up_proj.weight": weight, "model.layers.3.mlp.up_proj.weight": weight.clone()}
    save_file(tensors, file, metadata={"format": "pt"})
    name = rf"model\.layers\.{1 if problem == 'missing' else 3}\.mlp\.up_proj\.weight"
    with pytest.raises(ExportError, match=rf"out loads with {problem} keys: {name}; save it again"):
        load_check(tmp_path / "out")
