"""Models that need more than a text: which kind they are, and that they are reduced and saved without a score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from families import TOKENIZERS, bpe
from in_process import check_here
from peft import PeftModel
from safetensors.torch import load_file

from laserlm.edit import applied
from laserlm.errors import ModelError, ScoringError
from laserlm.export import load_check, save
from laserlm.models import LanguageModel, load
from laserlm.models.kinds import head_kinds
from laserlm.models.matrices import default_matrices
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.tokenize import decoder_start, max_length
from laserlm.tasks import Example, Split

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
SPEECH = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WHISPER = SPEECH | TOKENS | {"vocab_size": 96, "num_mel_bins": 8, "max_source_positions": 16}
LABELS = {"num_labels": 1, "pad_token_id": None}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    check_here(monkeypatch)
    torch.manual_seed(0)


def write_folder(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    bpe({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}, prefix="<s>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "architecture", "kind"),
    [
        (T.MarianConfig(), "MarianMTModel", "encoder-decoder"),
        (T.WhisperConfig(), "WhisperForConditionalGeneration", "headless"),
        (T.Kosmos2Config(), "Kosmos2ForConditionalGeneration", "headless"),
        (T.Wav2Vec2Config(), "Wav2Vec2ForSequenceClassification", "headless"),
        (T.ElectraConfig(), "ElectraForPreTraining", "headless"),
        (T.BertConfig(), "BertForPreTraining", "masked"),
        (T.FlaubertConfig(), "FlaubertWithLMHeadModel", "masked"),
        (T.GPT2Config(), "GPT2LMHeadModel", "causal"),
    ],
)
def test_the_kind_follows_from_the_class(config: Any, architecture: str, kind: str) -> None:
    config.architectures = [architecture]
    assert head_kinds(config) == [kind]


def test_a_model_of_speech_is_reduced_and_saved_but_not_scored(tmp_path: Path) -> None:
    model = T.WhisperForConditionalGeneration(T.WhisperConfig(**WHISPER))
    lm = load(write_folder(tmp_path / "source", model))
    saved = save(lm, "model.decoder.layers.1.fc1@r2", tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "source", saved.folder))
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["model.decoder.layers.1.fc1.weight"]
    assert before.keys() == after.keys()
    assert load_check(saved.folder).agrees
    with pytest.raises(ModelError, match="from text alone, so it is not scored"):
        evaluate(lm, Split("made", "test", (Example("1", "Rome is", "a city"),), "answer"))


def test_outputs_are_not_recorded_where_tokens_alone_give_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = SIZES | {"projection_dim": 32}
    vision = {name: value for name, value in SIZES.items() if name != "vocab_size"} | {"image_size": 28, "patch_size": 14}
    lm = load(write_folder(tmp_path / "source", T.CLIPModel(T.CLIPConfig(text_config=settings, vision_config=vision))))
    saved = save(lm, "text_model.encoder.layers.1.mlp.fc1@r2", tmp_path / "out")
    assert "no outputs are recorded" in caplog.text
    check = load_check(saved.folder)
    assert (check.agrees, check.difference) == (True, None)


def test_what_a_forward_pass_raises_is_reported(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(input_ids: Any = None, attention_mask: Any = None, **_: Any) -> None:
        raise ValueError("You have to specify pixel_values")

    monkeypatch.setattr(llama.model, "forward", forward)
    with pytest.raises(ScoringError, match=r"ends with ValueError: You have to specify pixel_values\. .*laser save MODEL"):
        evaluate(llama, Split("made", "test", (Example("1", "Rome is", "a city"),), "answer"))


def test_a_part_that_reads_sound_is_a_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SIZES | {"model_type": "llama"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    config = T.LlavaConfig(text_config=text, vision_config=vision | {"model_type": "clip_vision_model", "patch_size": 14})
    lm = load(write_folder(tmp_path, T.LlavaForConditionalGeneration(config)))
    tower = type(lm.model.model.vision_tower)
    monkeypatch.setattr(tower, "main_input_name", "input_ids")  # as the audio encoder of Phi-4 multimodal says
    monkeypatch.setattr(tower, "input_modalities", "audio")
    assert {m.in_tower for m in default_matrices(lm.matrices)} == {False}
    assert any(m.in_tower for m in lm.matrices)


def test_the_decoder_begins_as_either_config_says() -> None:
    model = T.T5ForConditionalGeneration(T.T5Config(d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=1, vocab_size=96))
    lm = LanguageModel(model, TOKENIZERS["encoder-decoder"](), "t5", "encoder-decoder")
    with pytest.raises(ScoringError, match=r"generation_config\.json of t5 has a decoder_start_token_id"):
        decoder_start(lm)
    model.generation_config.decoder_start_token_id = 7
    assert decoder_start(lm) == (7,)


def test_a_limit_of_minus_one_is_none(llama: LanguageModel) -> None:
    llama.model.config.max_position_embeddings = -1
    assert max_length(llama) == llama.require_tokenizer().model_max_length


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_the_adapter_of_a_reward_model_loads_in_peft(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", T.LlamaForSequenceClassification(T.LlamaConfig(**SIZES, **LABELS)))
    lm = load(source)
    saved = save(lm, "1.fc_in@r2", tmp_path / "out", form="adapter")
    opened: Any = PeftModel.from_pretrained(T.AutoModelForSequenceClassification.from_pretrained(source), saved.folder)
    ids = torch.arange(5, 14)[None]
    with applied(lm, "1.fc_in@r2"), torch.no_grad():
        torch.testing.assert_close(opened.eval()(input_ids=ids).logits, lm.model(input_ids=ids).logits, atol=1e-5, rtol=0)
    assert load_check(saved.folder).agrees
