"""Checkpoints whose weights are stored in few bits: what is kept of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from export.test_source import TEXT, change, llama, other_tensors, read, weights, write_folder
from in_process import check_here
from safetensors.torch import save_file

from laserlm.edit import applied
from laserlm.errors import ExportError, WeightError
from laserlm.export import load_check, save
from laserlm.models import load


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    check_here(monkeypatch)


def fp8_folder(folder: Path) -> tuple[Path, Any]:
    """Write a model whose matrices are eight-bit floats with a scale for each block of 16 x 16."""
    model = llama()
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
    assert read(out / "config.json")["quantization_config"]["modules_to_not_convert"] == ["model.layers.0.mlp.up_proj"]
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
