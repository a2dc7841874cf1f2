"""The adapter form, loaded by peft itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from in_process import check_here
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from laserlm.edit import applied
from laserlm.errors import ExportError, ModelError
from laserlm.export import compress, load_check, reproduce, save
from laserlm.export.load_in_subprocess import fingerprint
from laserlm.models import LanguageModel, load
from laserlm.reductions import Intervention
from laserlm.searching import search
from laserlm.tasks import Example, Task

Make = Callable[..., LanguageModel]


def components(lm: LanguageModel) -> str:
    """Return a reduction of every matrix; neighbours drop other components, and other numbers of them."""
    choices = ["0,3,5-6", "1", "2-4,14-15"]
    ids = [m.id for m in lm.matrices if not m.parts]
    return "+".join(f"{id}@drop{choices[i % 3]}" for i, id in enumerate(ids))


def with_peft(lm: LanguageModel, folder: Path) -> Any:
    """Return the model of peft's own loading, which must not warn of anything in the adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(lm.model, folder)


def merged(lm: LanguageModel, folder: Path) -> Any:
    return with_peft(lm, folder).merge_and_unload()


def assert_equal(model: Any, lm: LanguageModel, tolerance: float = 1e-6) -> None:
    """Compare all weights, to a share of the largest weight of each tensor of the unchanged model."""
    weights = model.state_dict()
    assert weights.keys() == lm.model.state_dict().keys()
    for name, expected in lm.model.state_dict().items():
        torch.testing.assert_close(weights[name], expected, atol=tolerance * float(expected.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_merged_by_peft_every_family_has_the_weights_of_the_dense_form(family: str, make: Make, tmp_path: Path) -> None:
    lm = make(family)
    text = components(lm)
    saved = save(lm, text, tmp_path / "out", form="adapter")
    assert {f.name for f in saved.folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "laser.json",
    }
    with applied(lm, text):
        assert_equal(merged(make(family), saved.folder), lm)
        expected = fingerprint(lm.model)
    outputs = fingerprint(with_peft(make(family), saved.folder).get_base_model().eval())  # not merged
    for values in (outputs, saved.record["fingerprint"]) if expected else ():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), atol=1e-5, rtol=1e-4)
    again = reproduce(saved.folder, lm)
    assert again.identical
    assert again.tensors == len({m.path for m in saved.matrices})


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "phi3", "mixtral", "t5"])
@pytest.mark.parametrize(
    "text",
    [
        "all.all@0.3",
        "all.all@0.8:bottom",
        "1.mlp@drop0,2:split2",
        "1.attn@0.2:reference",
        "1.fc_in@drop3",
        "1.mlp@scale0=2,5=0.5",
    ],
)
def test_every_kind_of_reduction_is_an_adapter(family: str, text: str, make: Make, tmp_path: Path) -> None:
    lm = make(family)
    if family == "t5":
        text = f"encoder.{text}+decoder.{text}"
    saved = save(lm, text, tmp_path / "out", form="adapter")
    with applied(lm, text):
        assert_equal(merged(make(family), saved.folder), lm, tolerance=5e-6)


@pytest.mark.parametrize("text", ["1.experts.2.fc_up@drop3", "1.fc_out@drop3+2.fc_out@drop3-5", "1.gate_up@drop1+1.fc_out@r3"])
def test_some_of_the_experts_in_one_tensor_change(text: str, make: Make, tmp_path: Path) -> None:
    lm = make("mixtral")
    saved = save(lm, text, tmp_path / "out", form="adapter")
    with applied(lm, text):
        assert_equal(merged(make("mixtral"), saved.folder), lm)


def test_experts_stored_as_transposes_and_weights_of_no_linear_layer(tmp_path: Path) -> None:
    def make() -> LanguageModel:
        torch.manual_seed(0)
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
        config = AutoConfig.for_model(
            "gpt_oss", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_local_experts=3, vocab_size=64, **sizes
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.15)
        return LanguageModel(model=model, tokenizer=None, name="gpt_oss", kind="causal")

    lm = make()
    assert lm.model.model.layers[0].mlp.experts.is_transposed
    text = "+".join(f"{m.id}@drop{i % 2},2" for i, m in enumerate(lm.matrices) if "mlp" in m.id)
    saved = save(lm, text, tmp_path / "out", form="adapter")
    assert {m.path.rpartition(".")[2] for m in saved.matrices} == {"gate_up_proj", "down_proj", "weight"}
    with applied(lm, text):
        assert_equal(merged(make(), saved.folder), lm)


def test_a_fused_matrix_whole_and_parts_of_another_block(make: Make, tmp_path: Path) -> None:
    lm = make("gpt_neox")
    text = "0.qkv@drop0,2+1.q_proj@drop0+1.v_proj@drop5-9"
    saved = save(lm, text, tmp_path / "out", form="adapter")
    with applied(lm, text):
        assert_equal(merged(make("gpt_neox"), saved.folder), lm)
    assert [m.reason_kept_dense for m in saved.matrices] == [f"an adapter of rank {r}" for r in (2, 1, 5)]
    config = json.loads((saved.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^gpt_neox.layers.0.attention.query_key_value": 2}


def test_the_bytes_are_those_of_the_dropped_components(llama: LanguageModel, tmp_path: Path) -> None:
    saved = save(llama, "0.fc_in@drop0,3,17-20+1.fc_out@drop5", tmp_path / "out", form="adapter")
    assert saved.parameters == (6 + 1) * (48 + 32) == sum(m.parameters for m in saved.matrices)
    with safe_open(saved.folder / "adapter_model.safetensors", framework="pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == 4 * saved.parameters  # noqa: SIM118
    assert saved.record["dense_bytes"] == 4 * saved.base_parameters
    assert "an adapter for 2 matrices, 560 parameters in" in str(saved)
    assert "; the dense form takes 158.6 kB" in str(saved)
    half = save(llama, "0.fc_in@drop0,3,17-20+1.fc_out@drop5", tmp_path / "half", form="adapter", dtype="bfloat16")
    assert half.bytes < saved.bytes
    assert half.record["dtype"] == {"base": "float32", "saved": "bfloat16"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_factors_are_as_precise_as_the_decomposition(dtype: torch.dtype, make: Make, tmp_path: Path) -> None:
    lm, base = make("llama"), make("llama")
    lm.model.to(dtype)
    base.model.to(dtype)
    saved = save(lm, components(lm), tmp_path / "out", form="adapter")
    assert saved.record["dtype"]["saved"] == ("float32" if dtype == torch.bfloat16 else "float64")
    with applied(lm, components(lm)):
        assert_equal(merged(base, saved.folder), lm, tolerance=2**-8 if dtype == torch.bfloat16 else 1e-12)


@pytest.fixture
def on_disk(llama: LanguageModel, tmp_path: Path) -> LanguageModel:
    """A model that other processes can load."""
    llama.model.save_pretrained(tmp_path / "model")
    llama.require_tokenizer().save_pretrained(tmp_path / "model")
    return load(tmp_path / "model")


def test_load_takes_the_base_model_and_merges_the_adapter(on_disk: LanguageModel, tmp_path: Path) -> None:
    text = "0.fc_in@drop0,3+1.q_proj@drop2"
    saved = save(on_disk, text, tmp_path / "out", form="adapter")
    lm = load(saved.folder)
    with applied(on_disk, text):
        assert_equal(lm.model, on_disk)
    assert [m.id for m in lm.matrices] == [m.id for m in on_disk.matrices]
    assert lm.tokenizer is not None
    assert load(**lm.loaded).hash == lm.hash != on_disk.hash
    with applied(lm, "1.fc_up@drop0"):  # it can be reduced further
        pass
    (saved.folder / "laser.json").unlink()
    assert load(saved.folder).hash == lm.hash  # as any adapter of peft
    weights = load_file(saved.folder / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[2:]), saved.folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"cannot load the adapter .*missing adapter keys"):
        load(saved.folder)
    (saved.folder / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelError, match="cannot load the adapter"):
        load(saved.folder)
    (saved.folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="names no base model"):
        load(saved.folder)


def test_the_config_and_the_card_say_how_peft_loads_it(on_disk: LanguageModel, tmp_path: Path) -> None:
    saved = save(on_disk, components(on_disk), tmp_path / "out", form="adapter")
    config = json.loads((saved.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "CAUSAL_LM", 5)
    assert "model.layers.1.mlp.up_proj" in config["target_modules"]
    card = (saved.folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert 'base = AutoModelForCausalLM.from_pretrained("model", dtype="float32")' in card
    assert f'model = PeftModel.from_pretrained(base, "{saved.folder.name}")' in card
    assert "| reductions | `70 components of 21 matrices` |" in card
    assert f"--reduce {Intervention.parse(components(on_disk))} --form adapter" in card


def test_load_check_uses_peft_and_sees_a_changed_factor(
    on_disk: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_here(monkeypatch)
    saved = save(on_disk, components(on_disk), tmp_path / "out", form="adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        check = load_check(saved.folder)
        assert check.agrees
        assert check.form == "adapter"
        assert check.difference is not None
        assert check.difference < 1e-5
        save(on_disk, components(on_disk).replace("drop1+", "drop2+"), tmp_path / "other", form="adapter")
        (tmp_path / "other" / "adapter_model.safetensors").rename(saved.folder / "adapter_model.safetensors")
        check = load_check(saved.folder)
    assert not check.agrees
    assert check.difference is not None
    assert check.difference > 1e-3
    assert not reproduce(saved.folder, on_disk).agrees


def test_load_check_without_peft_says_what_to_install(
    on_disk: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(on_disk, "0.fc_in@drop0", tmp_path / "out", form="adapter")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "peft.py").write_text("raise ModuleNotFoundError(\"No module named 'peft'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    with pytest.raises(ExportError, match="No module named 'peft'; pip install peft"):
        load_check(saved.folder)


@pytest.mark.slow
def test_a_fresh_process_loads_the_adapter_without_laserlm(on_disk: LanguageModel, tmp_path: Path) -> None:
    check = load_check(save(on_disk, components(on_disk), tmp_path / "out", form="adapter").folder)
    assert check.agrees
    assert not check.imported_laserlm
    assert "loads as adapter with peft on its base model" in str(check)


def test_what_an_adapter_cannot_hold_is_refused_with_another_form(llama: LanguageModel, make: Make, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="changes nothing"):
        save(llama, "1.fc_in@1", tmp_path / "out", form="adapter")
    with pytest.raises(ExportError, match="use the form factored or dense"):
        compress(llama, tmp_path / "out", ratio=0.5, method="plain", allocation="uniform", form="adapter")
    tied, shared = make("llama"), make("llama")
    tied.model.model.layers[2].mlp.up_proj.weight = tied.model.model.layers[0].mlp.up_proj.weight
    shared.model.model.layers[2] = shared.model.model.layers[1]
    for lm in (tied, shared):
        with pytest.raises(ExportError, match=r"an adapter cannot change \d\.fc_up: .*save the dense form"):
            save(lm, "2.fc_up@drop0", tmp_path / "out", form="adapter")
        save(lm, "0.fc_in@drop0", tmp_path / lm.name, form="adapter", overwrite=True)
    assert not (tmp_path / "out").exists()


def test_a_router_that_gives_out_more_than_a_tensor_is_refused(make: Make, tmp_path: Path) -> None:
    """peft's own layer around it fails in the first forward pass, after a save that succeeded."""
    lm = make("llama4")
    router = next(m.name for m in lm.matrices if m.name.endswith("router"))
    with pytest.raises(ExportError, match=rf"cannot change 1\.{router}: .*leave it out"):
        save(lm, f"1.{router}@0.5+0.self_attn.q_proj@0.5", tmp_path / "out", form="adapter")
    assert save(lm, "0.self_attn.q_proj@0.5", tmp_path / "out", form="adapter").form == "adapter"


def test_a_search_that_tries_components_is_saved_with_its_gain(llama: LanguageModel, tmp_path: Path) -> None:
    pairs = zip("abcdefghijklmnopqrst", ["Paris", "Rome"] * 10, strict=True)
    task = Task.of("capitals", [Example(c, f"The capital of {c} is", a) for c, a in pairs])
    grid = "1.fc_in@drop0+1.fc_in@drop1+1.fc_in@drop0-1"
    result = search(llama, task, grid=grid, strategy="exhaustive")
    assert result.candidates == 3  # two of them have the same rank
    result = replace(result, best=Intervention.parse("1.fc_in@drop0-1"))
    saved = save(llama, result, tmp_path / "out", form="adapter")
    assert saved.record["intervention"] == "1.fc_in@drop0-1"
    assert saved.record["result"]["test"]["n"] == 16
