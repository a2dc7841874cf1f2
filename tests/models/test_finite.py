from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from laserlm.errors import ScoringError, WeightError
from laserlm.models import LanguageModel, load
from laserlm.models.finite import is_finite, not_finite, overflow
from laserlm.scoring.evaluate import evaluate
from laserlm.tasks import Example, Split

MLP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture
def checkpoint(llama: LanguageModel, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    llama.model.save_pretrained(folder)
    llama.require_tokenizer().save_pretrained(folder)
    return folder


def change(folder: Path, changes: dict[str, list[float]]) -> None:
    """Replace the first values of some tensors."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, values in changes.items():
        tensors[name].view(-1)[: len(values)] = torch.tensor(values)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_one_value_among_many_is_found_in_every_dtype_and_place(dtype: torch.dtype) -> None:
    values = torch.full((257, 33), 440.0).to(dtype)  # their sum overflows float16
    assert is_finite(values)
    assert is_finite(values.T)
    assert is_finite(values[:0])
    for wrong in (math.nan, *([] if dtype == torch.float8_e4m3fn else [math.inf, -math.inf])):
        for place in (0, 4000, -1):
            changed = values.float().flatten()
            changed[place] = wrong
            assert not is_finite(changed.view(257, 33).to(dtype)), (wrong, place)
    assert is_finite(torch.empty(3, device="meta", dtype=dtype))
    assert is_finite(torch.arange(3))


def test_a_damaged_checkpoint_names_each_tensor_with_its_counts(checkpoint: Path) -> None:
    change(checkpoint, {MLP: [math.nan, math.inf, -math.inf], NORM: [math.nan]})
    with pytest.raises(WeightError) as caught:
        load(checkpoint)
    text = str(caught.value)
    assert f"{MLP} (1 NaN, 2 infinite of 1,536 values)" in text
    assert f"{NORM} (1 NaN of 32 values)" in text
    assert "The checkpoint is damaged; copy or download it again" in text
    assert "dtype" not in text
    with pytest.raises(WeightError, match="The checkpoint is damaged; copy"):
        load(checkpoint, dtype="float16")


def test_of_many_damaged_tensors_the_first_are_named_and_the_others_counted(checkpoint: Path) -> None:
    names = [name for name in load_file(checkpoint / "model.safetensors") if name.startswith("model.layers.")]
    change(checkpoint, {name: [math.nan] for name in names})
    with pytest.raises(WeightError, match=rf" and {len(names) - 4} other tensors\. The checkpoint is damaged"):
        load(checkpoint)


def test_weights_that_only_the_dtype_makes_infinite_are_reported_with_a_wider_one(checkpoint: Path) -> None:
    change(checkpoint, {MLP: [1e5, -1e6]})
    with pytest.raises(WeightError, match=r"2 infinite of 1,536 values\)\. The file holds larger values than float16 does"):
        load(checkpoint, dtype="float16")
    assert not not_finite(load(checkpoint, dtype="bfloat16").model)


def test_a_damaged_copy_of_a_converted_model_names_the_command_that_removes_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "gguf.json").write_text("{}")
    change(checkpoint, {MLP: [math.nan]})
    monkeypatch.setattr("laserlm.models.loading.set_up_bundled", lambda cache: checkpoint)
    with pytest.raises(WeightError, match=r"'bundled' has weights.*converted copy in .* is damaged; .*'laser clear-cache'"):
        load("bundled")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_damaged_adapter_is_not_blamed_on_its_base(checkpoint: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(load(checkpoint).model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(math.inf)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(WeightError, match=r"the adapter .* makes weights of .*checkpoint that are not finite: .*q_proj\."):
        load(tmp_path / "adapter")


def test_outputs_that_are_not_finite_are_explained_by_weights_or_dtype(llama: LanguageModel) -> None:
    split = Split("example", "all", (Example("a", "The capital of France is", "Paris"),), "answer")
    norm = llama.model.get_parameter(NORM)
    with torch.no_grad():
        norm[0] = math.inf
    with pytest.raises(ScoringError, match=r"the weights are not finite: model\.norm\.weight \(1 infinite of 32 values\)"):
        evaluate(llama, split)
    with torch.no_grad():
        norm.fill_(3e38)
    with pytest.raises(ScoringError, match=r"overflows float32, which ends at 3\.4e\+38\. Check its weights"):
        evaluate(llama, split)


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (torch.float16, "overflows float16, which ends at 6.55e+04. Load it with dtype float32 or bfloat16 (--dtype float32)."),
        (torch.bfloat16, "overflows bfloat16, which ends at 3.39e+38. Load it with dtype float32 (--dtype float32)."),
        (torch.int8, "the model in int8 is not. Load it with dtype float32 (--dtype float32)."),
    ],
)
def test_an_overflow_names_a_dtype_that_is_not_the_models_own(dtype: torch.dtype, says: str) -> None:
    assert overflow(torch.nn.Linear(2, 2), dtype).endswith(says)
