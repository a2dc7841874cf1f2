"""Classifiers, reward models and embedding models: what they are given, and how they are graded and searched."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from families import GROUPED, SIZES, bpe
from safetensors.torch import save_file

from laserlm import LanguageModel, load, task
from laserlm.edit import applied
from laserlm.errors import ScoringError
from laserlm.export import save
from laserlm.models.pooling import DenseModule, Pooling, read_pooling
from laserlm.scoring.evaluate import compare, evaluate
from laserlm.scoring.forward import batches, forward_logits
from laserlm.scoring.identity import identity
from laserlm.scoring.scorers import SCORERS
from laserlm.scoring.tokenize import encode
from laserlm.searching import search
from laserlm.searching.screen import loss_coefficients
from laserlm.tasks import Example, Split, Task

WORDS = ["Paris", "Rome", "Oslo", "Lisbon", "Madrid", "Norway", "Italy", "Spain", "France", "Portugal"]
TEXTS = [f"The capital of {a} is {b}{' and a city' * (i % 3)}" for i, a in enumerate(WORDS) for b in WORDS[: i % 4 + 2]]
ENCODER = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>", "sep_token": "</s>"}
CONFIGS: dict[str, Any] = {
    "bert": lambda **more: T.BertConfig(**SIZES, max_position_embeddings=128, **more),
    "llama": lambda **more: T.LlamaConfig(**GROUPED, **more),
}
CLASSES: dict[tuple[str, str], Any] = {
    ("bert", "head"): T.BertForSequenceClassification,
    ("llama", "head"): T.LlamaForSequenceClassification,
    ("bert", "body"): T.BertModel,
    ("llama", "body"): T.LlamaModel,
}


@cache
def _model(family: str, kind: str, pad: int | None) -> Any:
    torch.manual_seed(0)
    labels = {"classifier": {"num_labels": 3}, "reward": {"num_labels": 1}, "embedding": {}}[kind]
    model = CLASSES[family, "body" if kind == "embedding" else "head"](CONFIGS[family](**labels, pad_token_id=pad))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.ndim > 1 else 0.02))
    return model


def build(family: str, kind: Any, *, pad: int | None = 1) -> LanguageModel:
    tokenizer = bpe(ENCODER if family == "bert" else {"pad_token": "<pad>", "eos_token": "</s>"})
    return LanguageModel(copy.deepcopy(_model(family, kind, pad)), tokenizer, f"{family} {kind}", kind)


def labels() -> Task:
    """Three labels that depend on the text."""
    return Task.of("labels", [Example(str(i), text, str(len(text) % 3)) for i, text in enumerate(TEXTS)])


def preferences() -> Task:
    examples = [
        Example(str(i), text, a, (a, b)) for i, (text, a, b) in enumerate(zip(TEXTS, TEXTS[1:], TEXTS[2:], strict=False))
    ]
    return Task.of("preferences", examples, scorer="preference")


def pairs() -> Task:
    scores = [i * 7 % 10 / 10 for i in range(len(TEXTS))]
    examples = [
        Example(str(i), a, str(s), text_pair=b) for i, (a, b, s) in enumerate(zip(TEXTS, TEXTS[3:], scores, strict=False))
    ]
    return Task.of("pairs", examples, scorer="similarity")


TASKS = {"classifier": labels, "reward": preferences, "embedding": pairs}
EVERY = [(family, kind) for family in ("bert", "llama") for kind in TASKS]


def plain_outputs(lm: LanguageModel, text: str) -> torch.Tensor:
    """Return what transformers gives for one text: logits, or the mean of the last hidden states with length 1."""
    inputs = lm.require_tokenizer()(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = lm.model(**inputs)
    return output.logits[0] if "logits" in output else F.normalize(output.last_hidden_state.mean(1), dim=-1)[0]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_labels_are_scored_as_transformers_scores_single_texts(family: str) -> None:
    lm, split = build(family, "classifier", pad=None), labels().every
    scored = evaluate(lm, split, batch_size=7)
    assert scored.scorer == "label"
    for s, e in zip(scored.scores, split, strict=True):
        logprobs = plain_outputs(lm, e.prompt).log_softmax(0)
        assert s.logprob == pytest.approx(float(logprobs[int(e.answer)]), abs=1e-4)
        assert (s.predicted, s.correct) == (f"LABEL_{int(logprobs.argmax())}", int(logprobs.argmax()) == int(e.answer))
    assert len(scored.classes) == 3
    assert lm.model.config.pad_token_id is None


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_chosen_answer_is_right_when_its_reward_is_higher(family: str) -> None:
    lm, split = build(family, "reward"), preferences().validation
    for s, e in zip(evaluate(lm, split, batch_size=5).scores, split, strict=True):
        tokenizer = lm.require_tokenizer()
        pair = [tokenizer(e.prompt, c) if family == "bert" else tokenizer(f"{e.prompt} {c}") for c in e.choices]
        with torch.no_grad():
            chosen, rejected = (float(lm.model(torch.tensor([p["input_ids"]])).logits) for p in pair)
        assert s.correct == (chosen > rejected)
        assert s.loss == pytest.approx(-float(F.logsigmoid(torch.tensor(chosen - rejected))), abs=1e-4)


def test_a_reward_model_reads_conversations_by_its_template() -> None:
    lm, e = build("llama", "reward"), Example("a", "Rome", "Italy", ("Italy", "Spain"), messages=(("user", "Rome"),))
    tokenizer = lm.require_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    rows = encode(lm, [e], "preference")
    assert [tokenizer.decode(row.ids) for row in rows] == ["<user>Rome<assistant>Italy", "<user>Rome<assistant>Spain"]


def test_sentence_pairs_are_compared_by_cosine() -> None:
    lm, split = build("bert", "embedding"), pairs().every
    scored = evaluate(lm, split, batch_size=6)
    cosines = [float(plain_outputs(lm, e.prompt) @ plain_outputs(lm, e.text_pair)) for e in split]
    for s, e, cosine in zip(scored.scores, split, cosines, strict=True):
        assert float(s.predicted) == pytest.approx(cosine, abs=1e-4)
        assert s.loss == pytest.approx((cosine - float(e.answer)) ** 2 / 0.02, abs=1e-2)
    ranks = [torch.tensor(x).argsort().argsort().float() for x in (cosines, [float(e.answer) for e in split])]
    assert scored.spearman == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]), abs=0.05)  # scores have ties
    assert compare(scored, scored).base_spearman == scored.spearman


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_the_slopes_of_a_loss_are_those_of_finite_differences(family: str, kind: str) -> None:
    lm, split = build(family, kind), TASKS[kind]().validation.limit(3)
    lm.model.double()
    scorer: Any = evaluate(lm, split).scorer
    rows = encode(lm, split.examples, scorer)
    parameter = next(
        p
        for n, p in lm.model.named_parameters()
        if n.endswith(("layer.1.output.dense.weight", "layers.1.mlp.down_proj.weight"))
    )
    (batch,) = batches(lm, rows, 32)
    coefficients = loss_coefficients(lm, split.examples, rows, scorer, 32, False)
    logits = forward_logits(lm, batch, scored_only=False)
    total = torch.zeros((), dtype=logits.logprobs.dtype)
    for b, i in enumerate(batch.rows):
        weight, options = coefficients[i]
        total = total + weight * logits.logprobs[b] + (logits.choice_logprobs[b, : len(options)] * torch.tensor(options)).sum()
    total.backward()  # type: ignore[no-untyped-call]
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=parameter.dtype)
    slope = float((parameter.grad * direction).sum())
    losses = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            parameter.add_(step * direction)
            losses.append(sum(s.loss for s in evaluate(lm, split).scores))
            parameter.sub_(step * direction)
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=0.03, abs=1e-3)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "reward"), *(pytest.param("bert", kind, marks=pytest.mark.slow) for kind in ("classifier", "embedding"))],
)
def test_a_race_and_a_choice_of_components_run_on_every_kind(family: str, kind: str) -> None:
    lm = build(family, kind)
    examples = TASKS[kind]()
    race = search(lm, examples, grid="0-2.mlp@0.25,0.5", candidates=4, screen_examples=8, first_rung=8)
    assert race.strategy == "race"
    assert race.screened is not None
    best = str(race.best)
    with applied(lm, best):
        assert race.test.edited_loss == pytest.approx(evaluate(lm, examples.test).loss, abs=1e-5)
    other = Task.of("other", [*examples.every][::-1][:12], scorer=examples.test.scorer)
    chosen = search(lm, examples, strategy="components", grid="0.mlp@0.5", guards=(other,), steps=2, max_harm=0.5)
    assert chosen.harms[0].guard == "other"


def test_a_model_and_questions_of_another_kind_are_refused_by_name() -> None:
    with pytest.raises(
        ScoringError, match=r"preference is for a reward model, and bert embedding is an embedding model \(BertModel"
    ):
        evaluate(build("bert", "embedding"), preferences().every)
    with pytest.raises(ScoringError, match=r"similarity is for an embedding model.*\n?.*columns 'prompt', 'chosen'"):
        evaluate(build("llama", "reward"), pairs().every)
    wrong = Split("a", "all", (Example("x", "Rome", "blue"),), "answer")
    with pytest.raises(ScoringError, match="has the label 'blue', and bert classifier has the labels 'label_0'"):
        evaluate(build("bert", "classifier"), wrong)


def test_a_pair_of_texts_tells_the_two_apart() -> None:
    lm = build("bert", "classifier")
    lm.require_tokenizer().model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    e = Example("a", "Rome is a city", "1", text_pair="Oslo")
    (row,) = encode(lm, [e], "label")
    encoded = lm.require_tokenizer()("Rome is a city", "Oslo")
    assert (list(row.ids), list(row.type_ids)) == (encoded["input_ids"], encoded["token_type_ids"])


@pytest.mark.parametrize("kind", list(TASKS))
def test_the_kind_follows_from_the_checkpoint(kind: str, tmp_path: Path) -> None:
    lm = build("bert", kind)
    lm.model.save_pretrained(tmp_path)
    lm.require_tokenizer().save_pretrained(tmp_path)
    again = load(tmp_path)
    assert (again.kind, type(again.model), len(again.matrices)) == (kind, type(lm.model), len(lm.matrices))


def sentence_encoder(folder: Path, **pooling: Any) -> Path:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    return folder


def test_the_pooling_is_that_of_the_folder(tmp_path: Path) -> None:
    lm = build("bert", "embedding")
    lm.model.save_pretrained(tmp_path)
    lm.require_tokenizer().save_pretrained(tmp_path)
    sentence_encoder(tmp_path, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))  # as mpnet's has
    again = load(tmp_path)
    e = Example("a", "Rome is a city", "0.5", text_pair="Oslo is the capital")
    inputs = [again.require_tokenizer()(t, return_tensors="pt", return_token_type_ids=False) for t in (e.prompt, e.text_pair)]
    with torch.no_grad():
        first, second = (lm.model(**i).last_hidden_state[:, 0] for i in inputs)
    split = Split("a", "all", (e,), "similarity")
    assert float(evaluate(again, split).scores[0].predicted) == pytest.approx(
        float(F.cosine_similarity(first, second)), abs=1e-5
    )
    long = Split("a", "all", (Example("x", TEXTS[0] * 3, "0", text_pair="Oslo"),), "similarity")
    with pytest.raises(ScoringError, match="takes 9"):
        evaluate(again, long)


def add_dense(folder: Path, activation: str, out: int, width: int) -> torch.nn.Linear:
    """Add a dense module of random weights after the modules of a sentence encoder."""
    modules = json.loads((folder / "modules.json").read_text())
    name = f"{len(modules)}_Dense"
    linear = torch.nn.Linear(width, out)
    (folder / name).mkdir()
    settings = {"in_features": width, "out_features": out, "bias": True, "activation_function": f"torch.nn.{activation}"}
    (folder / name / "config.json").write_text(json.dumps(settings))
    save_file({f"linear.{key}": value for key, value in linear.state_dict().items()}, folder / name / "model.safetensors")
    modules.append({"path": name, "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    return linear


def test_dense_modules_follow_the_pooling(tmp_path: Path) -> None:
    lm = build("bert", "embedding")
    lm.model.save_pretrained(tmp_path)
    lm.require_tokenizer().save_pretrained(tmp_path)
    sentence_encoder(tmp_path, pooling_mode_cls_token=True)
    first, second = add_dense(tmp_path, "modules.activation.Tanh", 40, lm.width), add_dense(tmp_path, "Identity", 7, 40)
    e = Example("a", "Rome is a city", "0.5", text_pair="Oslo is the capital")
    with torch.no_grad():
        inputs = [lm.require_tokenizer()(t, return_tensors="pt", return_token_type_ids=False) for t in (e.prompt, e.text_pair)]
        a, b = (second(torch.tanh(first(lm.model(**i).last_hidden_state[:, 0]))) for i in inputs)
    split = Split("a", "all", (e,), "similarity")
    assert float(evaluate(load(tmp_path), split).scores[0].predicted) == pytest.approx(
        float(F.cosine_similarity(a, b)), abs=1e-5
    )
    add_dense(tmp_path, "Softplus", 7, 7)
    with pytest.raises(ScoringError, match="the activation of its module 4_Dense is Softplus"):
        evaluate(load(tmp_path), split)
    save(load(tmp_path), "0.fc_in@0.5", tmp_path / "out")
    for file in ("2_Dense/model.safetensors", "4_Dense/config.json", "modules.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_vectors_are_cut_where_sentence_transformers_cuts_them(tmp_path: Path) -> None:
    lm = build("bert", "embedding")
    lm.model.save_pretrained(tmp_path)
    lm.require_tokenizer().save_pretrained(tmp_path)
    sentence_encoder(tmp_path, pooling_mode_cls_token=True)
    whole = load(tmp_path)
    (tmp_path / "config_sentence_transformers.json").write_text('{"truncate_dim": 5, "similarity_fn_name": "cosine"}')
    cut = load(tmp_path)
    e = Example("a", "Rome is a city", "0.5", text_pair="Oslo is the capital")
    inputs = [cut.require_tokenizer()(t, return_tensors="pt", return_token_type_ids=False) for t in (e.prompt, e.text_pair)]
    with torch.no_grad():
        a, b = (lm.model(**i).last_hidden_state[:, 0] for i in inputs)
    split = Split("a", "all", (e,), "similarity")
    for model, width in ((whole, lm.width), (cut, 5)):
        cosine = float(F.cosine_similarity(a[:, :width], b[:, :width]))
        assert float(evaluate(model, split).scores[0].predicted) == pytest.approx(cosine, abs=1e-5)
    assert abs(float(F.cosine_similarity(a[:, :5], b[:, :5]) - F.cosine_similarity(a, b))) > 1e-3


def test_another_pooling_has_other_scores_in_a_store(tmp_path: Path) -> None:
    lm = build("bert", "embedding")
    split = pairs().validation
    rows = encode(lm, split.examples, "similarity")
    seen = []
    for pooling in (Pooling("mean"), Pooling("cls"), Pooling("mean", truncate_dim=lm.width - 1)):
        lm.pooling = pooling
        seen.append(identity(lm, "similarity", [split], rows, 0))
    assert seen[0] != seen[1]
    assert seen[0] != seen[2]
    for activation in ("Identity", "Tanh"):
        dense = DenseModule(torch.eye(lm.width), None, activation)
        lm.pooling = Pooling("mean", dense=(dense,))
        seen.append(identity(lm, "similarity", [split], rows, 0))
    assert seen[0] != seen[3] != seen[4]


def test_settings_of_sentence_transformers_that_are_not_used_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = sentence_encoder(tmp_path, pooling_mode_cls_token=True)
    settings = {"prompts": {"query": "find: ", "none": ""}, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    read_pooling(folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} puts 'find: ' in front of every text by default; laserlm does not: write it into the texts",
        f"{folder} compares its vectors by 'dot'; laserlm compares them by cosine",
    ]
    caplog.clear()
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"path": "2", "type": "x.Normalize"}]))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings | {"default_prompt_name": "none"}))
    read_pooling(folder)
    assert not caplog.records


@pytest.mark.parametrize(
    ("settings", "mode"), [({"pooling_mode_lasttoken": True}, "lasttoken"), ({"pooling_mode": "mean"}, "mean")]
)
def test_a_pooling_is_read_in_either_form(settings: dict[str, Any], mode: str, tmp_path: Path) -> None:
    pooling = read_pooling(sentence_encoder(tmp_path, **settings))
    assert pooling is not None
    assert (pooling.mode, pooling.problem) == (mode, "")


def test_two_poolings_at_once_are_refused(tmp_path: Path) -> None:
    pooling = read_pooling(sentence_encoder(tmp_path, pooling_mode_cls_token=True, pooling_mode_max_tokens=True))
    assert pooling is not None
    lm = build("bert", "embedding")
    lm.pooling = pooling
    with pytest.raises(ScoringError, match="its pooling is cls and max"):
        evaluate(lm, pairs().validation)


def test_every_scorer_of_texts_is_of_one_kind() -> None:
    assert {d.kind for d in SCORERS.values()} == {"", *TASKS}


def test_preferences_are_read_with_and_without_messages(tmp_path: Path) -> None:
    start = {"role": "user", "content": "Where is Rome?"}
    answers = [{"role": "assistant", "content": c} for c in ("In Italy", "In Spain")]
    rows = [
        {"prompt": "Where is Rome?", "chosen": "In Italy", "rejected": "In Spain"},
        {"prompt": "Where is Rome?", "chosen": [start, answers[0]], "rejected": [start, answers[1]]},
        {"prompt": [start], "chosen": answers[:1], "rejected": answers[1:]},
        {"chosen": [start, answers[0]], "rejected": [start, answers[1]]},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    read = task(str(file)).every
    assert read.scorer == "preference"
    assert {(e.prompt, e.choices, e.messages) for e in read} == {
        ("Where is Rome?", ("In Italy", "In Spain"), (("user", "Where is Rome?"),))
    }


def test_sentence_pairs_are_read_and_scaled(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text("sentence1,sentence2,score\nRome,Oslo,5\nParis,Rome,2.5\nMadrid,Rome,0\n")
    read = task(str(file))
    assert (read.every.scorer, [e.answer for e in read.every]) == ("similarity", ["1", "0.5", "0"])
    assert "divided by 5" in read.notes[0]


def test_texts_with_labels_are_questions_of_a_classifier(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text(
        "".join(json.dumps({"text": t, "text_pair": "Oslo", "label": i % 3}) + "\n" for i, t in enumerate(TEXTS[:9]))
    )
    read = task(str(file)).every
    assert read.examples[1] == Example("line 2", TEXTS[1], "1", fact="line 2", text_pair="Oslo", messages=(("user", TEXTS[1]),))
    assert evaluate(build("bert", "classifier"), read).n == 9
    causal = LanguageModel(T.LlamaForCausalLM(CONFIGS["llama"]()), build("llama", "reward").tokenizer, "llama", "causal")
    with pytest.raises(ScoringError, match="has a second text"):
        evaluate(causal, read)
