"""A folder goes in, and the same folder comes out, but for the matrices that were reduced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from families import bpe
from in_process import check_here
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto.tokenization_auto import AutoTokenizer

from laserlm.edit import applied
from laserlm.edit.apply import resolve
from laserlm.errors import ExportError, ModelError
from laserlm.export import load_check, reproduce, save
from laserlm.models import load
from laserlm.models.checkpoint_reader import list_matrices, open_checkpoint
from laserlm.models.matrices import default_matrices

VOCAB = 96
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
LABELS = {"id2label": {0: "bad", 1: "meh", 2: "good"}, "label2id": {"bad": 0, "meh": 1, "good": 2}}

TOWERS: dict[str, Callable[[], Any]] = {
    "qwen3_5": lambda: T.Qwen3_5ForConditionalGeneration(
        T.Qwen3_5Config(text_config=TEXT | LINEAR | {"num_hidden_layers": 4}, vision_config=QWEN_VISION)
    ),
    "gemma3": lambda: T.Gemma3ForConditionalGeneration(
        T.Gemma3Config(text_config=TEXT | {"head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=5)
    ),
    "qwen2_5_vl": lambda: T.Qwen2_5_VLForConditionalGeneration(
        T.Qwen2_5_VLConfig(text_config=TEXT | MROPE, vision_config=QWEN_VISION)
    ),
    "llava": lambda: T.LlavaForConditionalGeneration(
        T.LlavaConfig(
            text_config=TEXT | {"model_type": "llama"},
            vision_config=VISION | {"model_type": "clip_vision_model"},
            image_token_index=5,
        )
    ),
    "mistral3": lambda: T.Mistral3ForConditionalGeneration(
        T.Mistral3Config(
            text_config=TEXT | {"model_type": "mistral"},
            vision_config=VISION | {"model_type": "pixtral", "head_dim": 16},
        )
    ),
}
HEADS: dict[str, Callable[[], Any]] = {
    "reward": lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**TEXT, **LABELS)),
    "tokens": lambda: T.LlamaForTokenClassification(T.LlamaConfig(**TEXT, **LABELS)),
    "bert": lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT, **LABELS)),
    "pretraining": lambda: T.BertForPreTraining(T.BertConfig(**TEXT)),
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    check_here(monkeypatch)


def write_folder(folder: Path, model: Any, **extra: Tensor) -> Path:
    """Save a model with a tokenizer that has special tokens and puts a beginning-of-sequence token in front."""
    model.save_pretrained(folder)
    tokenizer = bpe({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}, prefix="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "<tool>"]})
    tokenizer.save_pretrained(folder)
    if extra:
        save_file(weights(folder) | extra, folder / "model.safetensors", {"format": "pt"})
    return folder


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(**(TEXT | settings)))


def weights(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def change(file: Path, **values: Any) -> None:
    content = read(file) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "remove"}))


def other_tensors(source: Path, out: Path) -> set[str]:
    """Names of tensors that are missing, new, or not the same bit by bit."""
    a, b = weights(source), weights(out)
    return a.keys() ^ b.keys() | {n for n in a.keys() & b.keys() if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])}


@pytest.mark.parametrize("family", list(TOWERS))
def test_a_model_with_a_tower_keeps_it_and_its_class(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = write_folder(tmp_path / "source", TOWERS[family]())
    (source / "preprocessor_config.json").write_text('{"size": 56}')
    lm = load(source)
    assert lm.kind == "causal"
    unnamed = [m for m in lm.matrices if not m.stack]
    towers = {m.stack for m in lm.matrices} - {""}
    assert unnamed
    assert len(towers) == 1
    assert all(m.path.startswith("model.language_model.") for m in unnamed)
    assert [m.path for m in list_matrices(source)] == [m.path for m in lm.matrices]
    out = save(lm, "0.mlp.gate_proj@r4", tmp_path / "out").folder
    assert other_tensors(source, out) == {name for name in weights(source) if name.endswith("0.mlp.gate_proj.weight")} - {
        name for name in weights(source) if "vision" in name or "visual" in name
    }
    ours, theirs = read(out / "config.json"), read(source / "config.json")
    assert (ours["architectures"], ours["model_type"]) == (theirs["architectures"], theirs["model_type"])
    assert ours["vision_config"].items() >= theirs["vision_config"].items()
    check = load_check(out)
    assert check.agrees
    assert check.lost == ()
    opened = getattr(T, read(source / "config.json")["architectures"][0]).from_pretrained(out)
    with applied(lm, "0.mlp.gate_proj@r4"), torch.no_grad():
        ids = torch.arange(9)[None]
        assert torch.equal(opened.eval()(input_ids=ids).logits, lm.model(input_ids=ids).logits)


def test_an_image_encoder_is_outside_the_default_grid_where_all_stacks_have_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lm = load(write_folder(tmp_path / "source", T.GitForCausalLM(T.GitConfig(**TEXT, vision_config=VISION))))
    tower = {m.stack for m in lm.matrices if m.in_tower}
    assert {m.stack for m in lm.matrices} - tower == {"git.encoder.layer"}
    assert {m.stack for m in default_matrices(lm.matrices)} == {"git.encoder.layer"}
    assert len(resolve(lm.matrices, f"{tower.pop()}.all.mlp@r2")) == 4


def test_a_table_of_complex_numbers_is_no_packed_weight(tmp_path: Path) -> None:
    text = TEXT | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    vision = VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    config = T.Llama4Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    source = write_folder(tmp_path / "source", T.Llama4ForConditionalGeneration(config))
    lm = load(source)
    assert any(buffer.is_complex() for buffer in lm.model.buffers())
    assert [m.path for m in list_matrices(source)] == [m.path for m in lm.matrices]
    assert {m.role for m in lm.matrices if not m.stack} == {"attn", "mlp", "other"}
    out = save(lm, "0.feed_forward.shared_expert.up_proj@r4", tmp_path / "out").folder
    (changed,) = other_tensors(source, out)
    assert changed.endswith("language_model.model.layers.0.feed_forward.shared_expert.up_proj.weight")
    assert load_check(out).agrees


def test_the_matrices_of_a_tower_are_reached_by_path_alone(tmp_path: Path) -> None:
    lm = load(write_folder(tmp_path / "source", TOWERS["gemma3"]()))
    (tower,) = {m.stack for m in lm.matrices} - {""}
    before = weights(tmp_path / "source")
    state = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    with applied(lm, "all.all@r1"):
        touched = {name for name, tensor in lm.model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert touched == {m.path for m in lm.matrices if not m.stack}
    out = save(lm, f"{tower}.1.mlp.fc1@r2", tmp_path / "out").folder
    (changed,) = other_tensors(tmp_path / "source", out)
    assert "vision" in changed
    assert changed.endswith("layers.1.mlp.fc1.weight")
    assert torch.linalg.matrix_rank(weights(out)[changed]) == 2 < torch.linalg.matrix_rank(before[changed])
    path = "model.language_model.layers.0.mlp.down_proj@r2"
    (changed,) = other_tensors(tmp_path / "source", save(lm, path, tmp_path / "by path").folder)
    assert "language_model" in changed
    assert changed.endswith("layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_head_that_predicts_no_tokens_is_kept(name: str, form: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = write_folder(tmp_path / "source", HEADS[name]())
    saved = save(load(source), "0.fc_out@r2", tmp_path / "out", form=form)
    (changed,) = other_tensors(source, saved.folder) & weights(source).keys()
    assert changed.endswith((".mlp.down_proj.weight", "layer.0.output.dense.weight"))
    assert read(saved.folder / "config.json")["architectures"] == read(source / "config.json")["architectures"]
    own_class = getattr(T, read(source / "config.json")["architectures"][0])
    assert not own_class.from_pretrained(saved.folder, output_loading_info=True)[1]["missing_keys"]
    assert load_check(saved.folder).lost == ()


@pytest.mark.parametrize(("model_type", "tensor"), [("llama", "mtp.fc.weight"), ("glm4_moe", "model.layers.2.eh_proj.weight")])
def test_layers_that_the_class_does_not_read_are_kept(model_type: str, tensor: str, tmp_path: Path) -> None:
    settings = TEXT | {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    model = (
        llama()
        if model_type == "llama"
        else T.Glm4MoeForCausalLM(T.Glm4MoeConfig(**settings, first_k_dense_replace=1, num_nextn_predict_layers=1))
    )
    source = write_folder(tmp_path / "source", model, **{tensor: torch.randn(32, 64)})
    lm = load(source)
    layer0 = next(m for m in lm.matrices if m.layer == 0 and m.path.endswith("gate_proj.weight"))
    out = save(lm, f"{layer0.id}@r4", tmp_path / "out").folder
    assert other_tensors(source, out) == {"model.layers.0.mlp.gate_proj.weight"}
    assert load_check(out).agrees


def test_experts_are_stored_as_the_source_stores_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = write_folder(tmp_path / "source", T.MixtralForCausalLM(T.MixtralConfig(**TEXT, num_local_experts=2)))
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in weights(source)
    lm = load(source)
    out = save(lm, "0.experts.1.fc_out@r3", tmp_path / "out").folder
    assert other_tensors(source, out) == {"model.layers.0.block_sparse_moe.experts.1.w2.weight"}


def test_the_number_of_experts_has_the_name_of_transformers_4_too(tmp_path: Path) -> None:
    settings = TEXT | {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    source = write_folder(tmp_path / "source", T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**settings)))
    out = save(load(source), "0.experts.1.fc_out@r3", tmp_path / "out").folder
    names = ("num_experts", "num_local_experts")
    assert [read(source / "config.json").get(name) for name in names] == [None, 3]
    assert [read(out / "config.json").get(name) for name in names] == [3, 3]
    assert load_check(out).agrees


def test_a_forward_pass_changes_no_weights_of_rwkv(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48}
    torch.manual_seed(0)
    source = write_folder(tmp_path / "source", T.RwkvForCausalLM(T.RwkvConfig(**sizes, num_hidden_layers=4, rescale_every=2)))
    lm = load(source)
    before, ids = lm.hash, torch.arange(9)[None]
    reference = T.RwkvForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        assert torch.allclose(lm.model(ids).logits, reference(ids).logits, atol=1e-3)  # the epsilon of the norms weighs less
    assert lm.hash == before
    out = save(lm, "0.attention.key@r2", tmp_path / "out").folder
    assert other_tensors(source, out) == {"rwkv.blocks.0.attention.key.weight"}
    assert read(out / "config.json")["rescale_every"] == 2
    assert load_check(out).agrees


def test_side_files_go_with_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_folder(tmp_path / "source", llama())
    texts = {
        "LICENSE": "terms",
        "preprocessor_config.json": "{}",
        "processor_config.json": "{}",
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]),
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        "2_Dense/config.json": "{}",
        "router_config.json": '{"types": {"query_0_SparseStaticEmbedding": "x"}}',
        "query_0_SparseStaticEmbedding/config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "tokenizer.model": "pieces",
        "generation_config.json": '{"temperature": 0.5, "do_sample": false}',
    }
    for name, text in texts.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    save_file({"linear.weight": torch.eye(2)}, source / "2_Dense" / "model.safetensors")
    for other in ("pytorch_model.bin", "checkpoint-5/config.json", "checkpoint-5/model.safetensors", ".git/HEAD"):
        (source / other).parent.mkdir(exist_ok=True)
        (source / other).write_text("other")
    (source / "README.md").write_text("the base model's card")
    out = save(load(source), "0.fc_up@r4", tmp_path / "out").folder
    assert {name: (out / name).read_text() for name in texts} == texts
    assert (out / "2_Dense" / "model.safetensors").read_bytes() == (source / "2_Dense" / "model.safetensors").read_bytes()
    assert not any((out / name).exists() for name in ("pytorch_model.bin", "checkpoint-5", ".git"))
    assert "pytorch_model.bin" in caplog.text
    assert "base model's card" not in (out / "README.md").read_text()


def test_side_files_go_with_pickled_weights_too(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", llama())
    torch.save(weights(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    (source / "preprocessor_config.json").write_text("{}")
    out = save(load(source, allow_pickle=True), "0.fc_in@r2", tmp_path / "out").folder
    assert (out / "preprocessor_config.json").is_file()
    assert not (out / "pytorch_model.bin").exists()
    assert load_check(out).agrees


def test_what_is_missing_afterwards_is_found_by_load_check(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", llama(), **{"mtp.fc.weight": torch.randn(3, 3)})
    (source / "LICENSE").write_text("terms")
    out = save(load(source), "0.fc_up@r4", tmp_path / "out").folder
    assert load_check(out).lost == ()
    (out / "LICENSE").unlink()
    change(out / "config.json", rms_norm_eps=0.1)
    tensors = weights(out)
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    check = load_check(out)
    assert not check.agrees
    assert check.lost == (
        "the tensor model.norm.weight has other values than in the source",
        "rms_norm_eps of the config is 0.1, in the source 1e-06",
        "the file LICENSE is missing",
    )
    for file in source.iterdir():
        file.unlink()
    assert load_check(out).lost is None


def test_stored_dtypes_stay_unless_another_is_asked_for(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", llama().bfloat16())
    tensors = weights(source)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    change(source / "config.json", dtype="float32")
    lm = load(source)
    saved = save(lm, "0.fc_up@r4", tmp_path / "out")
    assert other_tensors(source, saved.folder) == {"model.layers.0.mlp.up_proj.weight"}
    assert saved.record["dtype"] == {"base": "float32", "saved": "bfloat16"}
    assert reproduce(saved.folder, load(source, dtype="float32")).identical
    asked = save(lm, "0.fc_up@r4", tmp_path / "asked", dtype="float16")
    assert {str(t.dtype) for t in weights(asked.folder).values()} == {"torch.float16"}
    assert read(asked.folder / "config.json")["dtype"] == "float16"
    assert load_check(asked.folder).agrees
    on_loading = save(load(source, dtype="float16"), "0.fc_up@r4", tmp_path / "on loading")
    assert {str(t.dtype) for t in weights(on_loading.folder).values()} == {"torch.float16"}
    assert "--dtype float16" in on_loading.record["command"]


def test_a_head_stored_next_to_tied_embeddings_stays(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    source = write_folder(tmp_path / "source", model, **{"lm_head.weight": torch.randn(VOCAB, 32)})
    out = save(load(source), "0.fc_up@r4", tmp_path / "out").folder
    assert other_tensors(source, out) == {"model.layers.0.mlp.up_proj.weight"}


def test_tokenizer_files_are_the_sources(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", llama())
    change(source / "tokenizer_config.json", pad_token="remove", padding_side="left", model_max_length=17)
    out = save(load(source), "0.fc_up@r4", tmp_path / "out").folder
    ours, theirs = read(out / "tokenizer_config.json"), read(source / "tokenizer_config.json")
    assert (ours["padding_side"], ours["model_max_length"], "pad_token" in ours) == ("left", 17, False)
    assert ours["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert ours["additional_special_tokens"] == theirs["extra_special_tokens"] == ["<img>", "<tool>"]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, out)]
    assert sorted(tokenizers[0].all_special_tokens) == sorted(tokenizers[1].all_special_tokens)
    assert tokenizers[0]("a<tool>b")["input_ids"] == tokenizers[1]("a<tool>b")["input_ids"]


def test_shards_have_at_most_the_asked_size(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", llama())
    saved = save(load(source), "0.fc_up@r4", tmp_path / "out", shard_size="20KB")
    files = sorted(saved.folder.glob("*.safetensors"))
    assert len(files) > 3
    assert other_tensors(source, saved.folder) == {"model.layers.0.mlp.up_proj.weight"}
    assert read(saved.folder / "model.safetensors.index.json")["weight_map"].keys() == weights(source).keys()
    assert load_check(saved.folder).agrees


CODE = {
    "configuration_x.py": "from transformers import LlamaConfig\nclass XConfig(LlamaConfig):\n    model_type = 'xmodel'\n",
    "modeling_x.py": "from transformers import LlamaForCausalLM\nfrom .configuration_x import XConfig\n"
    "class XForCausalLM(LlamaForCausalLM):\n    config_class = XConfig\n    def forward(self, *args, **more):\n"
    "        out = super().forward(*args, **more)\n        out.logits = out.logits * 2.0\n        return out\n",
}


def test_a_model_with_code_of_its_own_keeps_it_and_the_flag(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", llama())
    for name, text in CODE.items():
        (source / name).write_text(text)
    classes = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    change(source / "config.json", model_type="xmodel", architectures=["XForCausalLM"], auto_map=classes)
    lm = load(source, allow_remote_code=True)
    saved = save(lm, "0.fc_up@r4", tmp_path / "out")
    assert {name: (saved.folder / name).read_text() for name in CODE} == CODE
    assert read(saved.folder / "config.json")["auto_map"] == classes
    assert "--allow-remote-code" in saved.record["command"]
    with pytest.raises(ExportError, match="--allow-remote-code"):
        load_check(saved.folder)
    assert load_check(saved.folder, allow_remote_code=True).agrees
    assert reproduce(saved.folder, lm).identical


def with_adapter(folder: Path, base: Path) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(T.LlamaForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return model.merge_and_unload()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_an_adapter_in_the_folder_is_merged_and_the_user_sees_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_folder(tmp_path / "both", llama())
    base = weights(source)
    merged = with_adapter(source, source)
    lm = load(source)
    assert "merged" in caplog.text
    assert torch.equal(lm.model.model.layers[1].self_attn.q_proj.weight, merged.model.layers[1].self_attn.q_proj.weight)
    assert [m.id for m in list_matrices(source)] == [m.id for m in lm.matrices]
    out = save(lm, "0.fc_up@r4", tmp_path / "out").folder
    changed = {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)} | {"model.layers.0.mlp.up_proj.weight"}
    saved = load_file(out / "model.safetensors")
    assert {name for name in base if not torch.equal(base[name], saved[name])} == changed
    assert not list(out.glob("adapter_*"))
    assert torch.equal(saved["model.layers.1.self_attn.q_proj.weight"], merged.model.layers[1].self_attn.q_proj.weight)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("place", ["source", "adapter"])
def test_no_adapter_is_saved_for_a_base_that_no_folder_holds(place: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", llama())
    with_adapter(tmp_path / place, source)
    lm = load(tmp_path / place)
    with pytest.raises(ExportError, match=r"merged adapter.*--form dense"):
        save(lm, "0.fc_up@r4", tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()
    assert load_check(save(lm, "0.fc_up@r4", tmp_path / "out").folder).agrees


def test_names_of_peft_in_a_checkpoint_are_explained(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", llama())
    tensors = {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in weights(source).items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for read_model in (load, list_matrices):
        with pytest.raises(ModelError, match="merge_and_unload"):
            read_model(source)


def test_matrices_of_a_tower_model_are_read_from_disk(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", TOWERS["llava"]())
    lm = load(source)
    reader = open_checkpoint(source)
    for matrix in (lm.matrices[0], lm.matrices[-1]):
        assert torch.equal(reader.read(matrix), lm.model.get_parameter(matrix.path))
