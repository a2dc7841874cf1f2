"""Checkpoints whose weights are stored in few bits: what is kept of them, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from export.test_source import TEXT, change, llama, other_tensors, read, weights, write_folder
from in_process import check_here
from safetensors.torch import save_file

from laserlm.edit import applied
from laserlm.errors import ExportError, WeightError
from laserlm.export import load_check, save
from laserlm.export.source import Source
from laserlm.export.source_check import differences
from laserlm.models import LanguageModel, load
from laserlm.models.quantised import leave_in_floats, packed_weights, with_floats
from laserlm.models.weight_files import stored_metadata


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    check_here(monkeypatch)


def fp8_folder(folder: Path, model: Any = None) -> tuple[Path, Any]:
    """Write a model whose matrices are eight-bit floats with a scale for each block of 16 x 16."""
    model = model or llama()
    write_folder(folder, model)
    tensors = weights(folder)
    for name in [name for name in tensors if "_proj" in name]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].view(rows // 16, 16, columns // 16, 16)
        scales = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scales[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic", "fmt": "e4m3"}
    change(folder / "config.json", quantization_config=settings)
    return folder, model


def test_an_fp8_checkpoint_keeps_its_eight_bits_but_in_reduced_matrices(tmp_path: Path) -> None:
    source, model = fp8_folder(tmp_path / "source")
    lm = load(source)
    parameter = "model.layers.0.mlp.up_proj.weight"
    out = save(lm, "0.fc_up@r4", tmp_path / "out").folder
    assert other_tensors(source, out) == {parameter, f"{parameter}_scale_inv"}
    assert weights(out)[parameter].dtype == lm.dtype
    floats = read(out / "config.json")["quantization_config"]["modules_to_not_convert"]
    assert floats == ["model.layers.0.mlp.up_proj", "lm_head"]  # with a list of its own, transformers adds no head
    assert load_check(out).agrees
    with pytest.raises(ExportError, match=r"quantised by fp8, .*--form dense"):  # else read without their scales
        save(lm, "0.fc_up@r4", tmp_path / "factors", form="factored")
    ids = torch.arange(9)[None]
    opened = T.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    reference = T.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with applied(lm, "0.fc_up@r4"), torch.no_grad():
        reference.get_parameter(parameter).copy_(lm.model.get_parameter(parameter).to(weights(out)[parameter].dtype))
        assert torch.allclose(opened(ids).logits, reference(ids).logits, atol=1e-5)
        assert (opened(ids).logits - model.eval()(ids).logits).abs().max() < 1


def test_eight_bits_of_experts_stay_as_they_are_or_the_reduction_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    source, _ = fp8_folder(tmp_path / "source", T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**(TEXT | sizes))))
    lm = load(source)
    out = save(lm, "0.q_proj@r4", tmp_path / "out").folder
    parameter = "model.layers.0.self_attn.q_proj.weight"
    assert other_tensors(source, out) == {parameter, f"{parameter}_scale_inv"}
    assert load_check(out).agrees
    with pytest.raises(ExportError, match=r"experts.down_proj of .* put together from several weights of few bits"):
        save(lm, "0.experts.1.fc_out@r4", tmp_path / "experts")
    assert not (tmp_path / "experts").exists()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_a_model_with_packed_matrices_is_refused_with_a_way_out(dtype: torch.dtype, tmp_path: Path) -> None:
    lm = load(write_folder(tmp_path / "source", llama()))
    for layer in lm.model.model.layers:
        layer.mlp.gate_proj = torch.nn.Module()
        layer.mlp.gate_proj.register_buffer("packed_data", torch.zeros(4, 4, dtype=dtype))
    with pytest.raises(WeightError, match=r"quantised.*unquantised"):
        _ = lm.matrices


def test_weights_that_transformers_unpacks_are_saved_from_an_unpacked_copy(tmp_path: Path) -> None:
    """As the experts of gpt-oss: four bits a value, and a scale for 32 values."""
    sizes = TEXT | {"intermediate_size": 32, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    source = write_folder(tmp_path / "source", T.GptOssForCausalLM(T.GptOssConfig(**sizes)).bfloat16())
    tensors = weights(source)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 255, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full(shape, 120, dtype=torch.uint8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    change(source / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    lm = load(source)
    reduction = f"{next(m.id for m in lm.matrices if m.expert == 1)}@r2"
    with pytest.raises(ExportError, match=r"_blocks of .* is packed \(U8\), .*\(FOLDER, save_original_format=False\)"):
        save(lm, reduction, tmp_path / "out")
    copy = tmp_path / "copy"
    T.AutoModelForCausalLM.from_pretrained(source).save_pretrained(copy, save_original_format=False)
    T.AutoTokenizer.from_pretrained(source).save_pretrained(copy)
    assert save(load(copy), reduction, tmp_path / "out").record["source"]["changed"] != []


LAYOUTS: dict[str, dict[str, Any]] = {
    "bitsandbytes, 4 bits": {
        "weight": lambda m, n: torch.randint(0, 255, (m * n // 2, 1), dtype=torch.uint8),
        "weight.absmax": lambda m, n: torch.rand(m * n // 64),
        "weight.quant_state.bitsandbytes__nf4": lambda m, n: torch.zeros(90, dtype=torch.uint8),
    },
    "bitsandbytes, 8 bits": {
        "weight": lambda m, n: torch.randint(-9, 9, (m, n), dtype=torch.int8),
        "SCB": lambda m, n: torch.rand(m),
        "weight_format": lambda m, n: torch.tensor(0, dtype=torch.uint8),
    },
    "compressed-tensors, 4 bits": {
        "weight_packed": lambda m, n: torch.randint(0, 9, (m, n // 8), dtype=torch.int32),
        "weight_scale": lambda m, n: torch.rand(m, n // 16),
        "weight_shape": lambda m, n: torch.tensor([m, n]),
    },
    "compressed-tensors, 8 bits": {
        "weight": lambda m, n: torch.randint(-9, 9, (m, n), dtype=torch.int8),
        "weight_scale": lambda m, n: torch.rand(m, 1),
    },
    "torchao, 8 bits": {
        "_weight_qdata": lambda m, n: torch.randint(-9, 9, (m, n), dtype=torch.int8),
        "_weight_scale": lambda m, n: torch.rand(m, 1),
        "_weight_zero_point": lambda m, n: torch.zeros(m, 1, dtype=torch.int8),
    },
}
"""What is stored in place of a weight (m, n), by its name below the module."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_weights_give_way_to_floats_where_they_are_reduced_alone(layout: str, tmp_path: Path) -> None:
    model = llama(attention_bias=True)
    source = write_folder(tmp_path / "source", model)
    tensors = weights(source)
    header = {"format": "pt"} | {name: '{"_type": "Tensor"}' for name in tensors if layout.startswith("torchao")}
    for module in [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]:
        header |= {name: '{"_type": "Int8Tensor"}' for name in [f"{module}.weight"] if name in header}
        m, n = tensors.pop(f"{module}.weight").shape
        tensors |= {f"{module}.{name}": make(m, n) for name, make in LAYOUTS[layout].items()}
    save_file(tensors | {"steps": torch.tensor(3)}, source / "model.safetensors", header)
    change(source / "config.json", quantization_config={"quant_method": layout.partition(",")[0]})
    tokenizer = T.AutoTokenizer.from_pretrained(source)
    loaded = {"name": str(source), "revision": None, "dtype": None}
    lm = LanguageModel(model, tokenizer, "packed", "causal", loaded=loaded)
    checkpoint = Source.of(lm)
    assert checkpoint is not None
    assert checkpoint.dtype == torch.float32
    reduced = {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"}
    (tmp_path / "out").mkdir()
    with applied(lm, "0.fc_up@r4+1.q_proj@r2"):
        written = checkpoint.write_weights(lm, tmp_path / "out", [f"{m}.weight" for m in reduced], None, "5GB")
        expected = {f"{m}.weight": lm.model.get_parameter(f"{m}.weight").detach().clone() for m in reduced}
    saved = weights(tmp_path / "out")
    assert {n: torch.equal(saved[n], value) for n, value in expected.items()} == dict.fromkeys(expected, True)
    described = {name: '{"_type": "Tensor"}' for name in expected if name in header}
    assert stored_metadata(tmp_path / "out") == header | described
    gone = {f"{m}.{name}" for m in reduced for name in LAYOUTS[layout]}
    assert other_tensors(source, tmp_path / "out") == gone | expected.keys()
    assert set(written.changed) | set(written.added) == expected.keys()
    assert set(written.dropped) == gone - expected.keys()
    assert set(checkpoint.modules_in_floats(lm, expected)) == reduced | {"lm_head"}
    (tmp_path / "out" / "config.json").write_bytes((source / "config.json").read_bytes())
    assert not [line for line in differences(source, tmp_path / "out", written.as_dict()) if "tensor" in line]


def test_the_parts_of_a_packed_weight_are_found_by_its_name() -> None:
    stored = {f"0.experts.{e}.up.{part}": None for e in (0, 1) for part in ("weight_packed", "weight_scale")}
    names = [f"0.experts.{e}.up.weight" for e in (0, 1)]
    packed = packed_weights([n for n in stored if "packed" in n], stored, names)
    assert packed == {name: [f"{name}_packed", f"{name}_scale"] for name in names}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_on_eight_bits_is_in_the_saved_weights(tmp_path: Path) -> None:
    source, _ = fp8_folder(tmp_path / "source")
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(T.AutoModelForCausalLM.from_pretrained(source), settings).save_pretrained(tmp_path / "adapter")
    lm = load(tmp_path / "adapter")
    out = save(lm, "0.fc_up@r4", tmp_path / "out").folder
    opened = T.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert "quantization_config" not in read(out / "config.json")
    with applied(lm, "0.fc_up@r4"):
        expected = {name: p.detach().float() for name, p in lm.model.named_parameters()}
    assert all(torch.equal(p, expected[name]) for name, p in opened.named_parameters())
    update = load(source, adapter=tmp_path / "adapter")
    assert [(m.id, m.max_rank) for m in update.matrices] == [("0.q_proj", 2), ("1.q_proj", 2)]
    merged = T.AutoModelForCausalLM.from_pretrained(save(update, "", tmp_path / "merged").folder)
    assert all(torch.equal(p, update.model.get_parameter(name)) for name, p in merged.named_parameters())


@pytest.mark.parametrize(
    ("method", "name", "before"),
    [
        ("bitsandbytes", "llm_int8_skip_modules", None),
        ("compressed-tensors", "ignore", ["lm_head", "a"]),
        ("fp8", "modules_to_not_convert", []),
    ],
)
def test_the_config_names_modules_in_floats_where_its_method_looks(method: str, name: str, before: list[str] | None) -> None:
    settings = {"quant_method": method, "bits": 8, name: before}
    after = ["lm_head", "a", "b"] if before else ["a", "b"]
    assert leave_in_floats(settings, ["a", "b"]) == {"quant_method": method, "bits": 8, name: after}


class Packed(torch.nn.Module):
    """A layer of bitsandbytes, with the weight that its codes stand for."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.source_cls, self.weight, self.bias = type(layer), layer.weight, layer.bias


Packed.__module__ = "bitsandbytes.nn.modules"


def dequantize(model: Any) -> Any:
    """Make layers linear, as ``PreTrainedModel.dequantize`` does."""
    for path in [path for path, module in model.named_modules() if isinstance(module, Packed)]:
        old = model.get_submodule(path)
        linear = torch.nn.Linear(*old.weight.shape)
        linear.weight, linear.bias = torch.nn.Parameter(old.weight.detach().T.clone()), old.bias
        model.set_submodule(path, linear)
    return model


def test_layers_of_gpt2_that_bitsandbytes_packed_are_as_in_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = T.GPT2LMHeadModel(T.GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=96)).eval()
    expected, ids = model.state_dict(), torch.arange(9)[None]
    logits = model(ids).logits
    monkeypatch.setattr(type(model), "dequantize", dequantize)
    for name in ("attn.c_proj", "mlp.c_fc"):
        model.transformer.h[0].set_submodule(name, Packed(model.transformer.h[0].get_submodule(name)))
    model = with_floats(model, T.GPT2Config(quantization_config={"quant_method": "bitsandbytes"}))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(ids).logits, logits)


def test_a_checkpoint_without_packed_layers_is_loaded_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a reduction of all its layers: transformers' ``dequantize`` fails then."""
    monkeypatch.delattr(T.PreTrainedModel, "dequantize")
    model = llama()
    assert with_floats(model, T.LlamaConfig(quantization_config={"quant_method": "bitsandbytes"})) is model


def test_a_config_that_says_less_than_is_stored_is_found(tmp_path: Path) -> None:
    source, _ = fp8_folder(tmp_path / "source")
    folder = save(load(source), "0.fc_up@r4", tmp_path / "out").folder
    written = read(folder / "laser.json")["source"]
    settings = read(folder / "config.json")["quantization_config"]
    assert differences(source, folder, written) == []
    same = save(load(source), "", tmp_path / "same").folder
    assert differences(source, same, read(same / "laser.json")["source"]) == []
    up = "model.layers.0.mlp.up_proj"
    for changed, line in [
        (settings | {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp.up_proj"]}, f"{up}.weight is stored as floats"),
        (settings | {"weight_block_size": [8, 8]}, "weight_block_size of quantization_config is another"),
        (None, "quantization_config of the config is missing"),
    ]:
        change(folder / "config.json", quantization_config=changed)
        (found,) = differences(source, folder, written)
        assert found.startswith(line)
    change(source / "config.json", quantization_config=settings | {"modules_to_not_convert": ["lm_head", "a"]})
    change(folder / "config.json", quantization_config=settings)
    assert differences(source, folder, written) == ["a is not in floats any more in quantization_config"]


@pytest.mark.parametrize("reduction", ["all.all@0.5", "0.fc_up@r4"])
def test_the_config_tells_of_a_quantisation_as_long_as_there_are_codes(reduction: str, tmp_path: Path) -> None:
    source, _ = fp8_folder(tmp_path / "source")
    out = save(load(source), reduction, tmp_path / "out").folder
    has_codes = any(tensor.dtype == torch.float8_e4m3fn for tensor in weights(out).values())
    assert ("quantization_config" in read(out / "config.json")) == has_codes == (reduction == "0.fc_up@r4")
    assert load_check(out).agrees


@pytest.mark.slow
@pytest.mark.parametrize("package", ["bitsandbytes==0.50.2", "compressed-tensors==0.20.1", "torchao==0.18.0"])
def test_real_packages_read_what_is_saved(package: str, tmp_path: Path) -> None:
    """In a process of its own, with the package installed for it alone."""
    library = tmp_path / "library"
    packages = [package, *(["loguru"] if package.startswith("compressed") else [])]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--target", str(library), *packages]
    subprocess.run(pip, check=True)
    script = Path(__file__).parent / "quantise_and_save.py"
    command = [sys.executable, str(script), package.partition("==")[0], str(tmp_path / "work")]
    environment = os.environ | {"PYTHONPATH": f"{library}{os.pathsep}{Path(__file__).parents[1]}"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == {"bitsandbytes": 9, "compressed-tensors": 4, "torchao": 2}[package.partition("==")[0]]
    for answer in answers:
        is_all = answer["reduction"].startswith("all")
        assert answer["agrees"], answer
        assert answer["has_codes"] == [False, not is_all], answer
        assert answer["layers"][0] in ("Linear", "Conv1D"), answer
        assert ("bit" in answer["layers"][1]) == (package.startswith("bits") and not is_all), answer
        assert answer["from_edited"] < answer["limit"] < answer["from_base"], answer
