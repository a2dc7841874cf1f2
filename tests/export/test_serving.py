"""What docs/saving.md says of peft and of tools that do not know the factored layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import pipeline
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from laserlm.export import save
from laserlm.low_rank import LowRankLinear
from laserlm.models import LanguageModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that is going

SPEC = "all.mlp@0.2"
IDS = torch.arange(20, 36)[None]


def with_adapter(folder: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options)
    tuned = get_peft_model(model, lora)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        outputs: torch.Tensor = model(input_ids=IDS).logits
    return outputs


@pytest.mark.parametrize(
    ("family", "rope", "older"),
    [
        ("llama", {"rope_theta": 77.0}, {"rope_theta": 77.0}),
        ("gpt_neox", {"rope_theta": 77.0}, {"rotary_emb_base": 77.0, "rotary_pct": 0.25}),
        ("phi", {"rope_theta": 77.0}, {"rope_theta": 77.0, "partial_rotary_factor": 0.5}),
        (
            "llama",
            {"rope_theta": 77.0, "rope_type": "linear", "factor": 4.0},
            {"rope_theta": 77.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        (
            "gpt_neox",
            {"rope_theta": 77.0, "rope_type": "linear", "factor": 4.0},
            {"rotary_emb_base": 77.0, "rotary_pct": 0.25, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
    ],
)
def test_transformers_4_finds_the_rotary_settings(
    make: Callable[..., LanguageModel], family: str, rope: dict[str, Any], older: dict[str, Any], tmp_path: Path
) -> None:
    lm = make(family)
    lm.model.config.rope_parameters |= rope
    config = json.loads((save(lm, "0.fc_in@0.5", tmp_path / "out").folder / "config.json").read_text())
    assert {name: config[name] for name in older} == older
    assert config["rope_parameters"].items() >= rope.items()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.rope_parameters.items() >= rope.items()


def test_a_saved_model_is_for_others_too(llama: LanguageModel, tmp_path: Path) -> None:
    folder = save(llama, "0.fc_in@0.5", tmp_path / "out").folder
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_an_adapter_of_the_factored_form_is_merged_into_the_dense_one(llama: LanguageModel, tmp_path: Path) -> None:
    factored = save(llama, SPEC, tmp_path / "factored", form="factored").folder
    dense = save(llama, SPEC, tmp_path / "dense").folder
    tuned = with_adapter(factored)
    assert isinstance(tuned.base_model.model.model.layers[0].mlp.up_proj.base_layer, LowRankLinear)
    tuned.save_pretrained(tmp_path / "adapter")
    expected = logits(tuned)
    untuned = AutoModelForCausalLM.from_pretrained(dense)
    assert not torch.allclose(logits(untuned.eval()), expected, atol=1e-3)
    merged = PeftModel.from_pretrained(untuned, tmp_path / "adapter").merge_and_unload().eval()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), logits(merged))


@pytest.mark.parametrize("safe", [True, False])
def test_an_adapter_is_never_merged_into_factors(safe: bool, llama: LanguageModel, tmp_path: Path) -> None:
    tuned = with_adapter(save(llama, SPEC, tmp_path / "factored", form="factored").folder)
    with pytest.raises(RuntimeError, match="size"):
        tuned.merge_and_unload(safe_merge=safe)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_read_the_full_weight_are_refused(options: dict[str, Any], llama: LanguageModel, tmp_path: Path) -> None:
    folder = save(llama, SPEC, tmp_path / "factored", form="factored").folder
    with pytest.raises(RuntimeError, match="size"):
        with_adapter(folder, **options)


def test_tools_see_a_method_that_they_do_not_know(llama: LanguageModel, tmp_path: Path) -> None:
    factored = save(llama, SPEC, tmp_path / "factored", form="factored").folder
    dense = save(llama, SPEC, tmp_path / "dense").folder
    # llama.cpp's converter and vLLM refuse by this name; without it they could take factors for weights.
    assert json.loads((factored / "config.json").read_text())["quantization_config"]["quant_method"] == "laserlm"
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_pipeline_takes_the_folder(form: str, llama: LanguageModel, tmp_path: Path) -> None:
    folder = save(llama, SPEC, tmp_path / "out", form=form).folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", device_map="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    written = pipeline("text-generation", model=str(folder))("The capital of", max_new_tokens=4, do_sample=False)
    assert written[0]["generated_text"].startswith("The capital of")
