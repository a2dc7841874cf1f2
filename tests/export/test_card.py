"""What a saved folder says to others: no more gain than was shown, and nothing about this machine."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from in_process import check_here
from safetensors.torch import load_file, save_file

from laserlm.errors import ExportError, ModelError
from laserlm.export import load_check, push, save
from laserlm.export.card import unclear_gain
from laserlm.export.record import file_hashes
from laserlm.models import LanguageModel, load
from laserlm.scoring.statistics import Interval
from laserlm.searching import SearchResult, search
from laserlm.searching.guard import Harm
from laserlm.searching.result import Point
from laserlm.tasks import Example, Task
from laserlm.tasks.definitions import DEFINITIONS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def base(llama: LanguageModel, tmp_path: Path) -> Path:
    folder = tmp_path / "private" / "my-model"
    llama.model.save_pretrained(folder)
    llama.require_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: research-only\n---\n# A model\n")
    return folder


@pytest.fixture
def search_result(llama: LanguageModel) -> SearchResult:
    task = Task.of("capitals", [Example(str(i), f"The capital of {i} is", ("Paris", "Rome")[i % 2]) for i in range(20)])
    result = search(llama, task, grid="1.fc_in@0.1", strategy="exhaustive", metric="loss", guards=())
    return replace(result, best=result.best or type(result.best).parse("1.fc_in@0.1"))


@pytest.mark.parametrize(
    ("interval", "heading", "says"),
    [
        (Interval(0.01, 0.2), "Gain on capitals", ""),
        (
            Interval(-0.01, 0.2),
            "Measured on capitals",
            "on held-out questions, -1.0 to +20.0 points, includes zero.",
        ),
        (Interval(0.0, 0.2), "Measured on capitals", "includes zero."),
        (Interval(-0.2, -0.1), "Measured on capitals", "-20.0 to -10.0 points, lies below zero."),
    ],
)
def test_a_card_claims_a_gain_only_where_its_interval_is_above_zero(
    interval: Interval,
    heading: str,
    says: str,
    llama: LanguageModel,
    search_result: SearchResult,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    search_result = replace(search_result, test=replace(search_result.test, interval=interval))
    card = (save(llama, search_result, tmp_path / "out").folder / "README.md").read_text()
    assert f"## {heading}, and harm" in card
    assert ("**No gain is claimed.**" in card) is bool(says)
    assert says in card
    assert ("shows no gain" in caplog.text) is bool(says)
    assert says in caplog.text


def test_the_hub_reads_the_metrics_of_the_test_split_with_the_harm(
    llama: LanguageModel, search_result: SearchResult, tmp_path: Path
) -> None:
    test = replace(search_result.test, base=0.25, edited=0.5, gain=0.25, interval=Interval(0.1, 0.4))
    harm = Harm("self", "text", replace(search_result.test, base_loss=1.0, edited_loss=1.5, loss_interval=Interval(0.4, 0.6)))
    settings = search_result.settings | {"task": "fever", "scorer": "choice"}
    search_result = replace(search_result, test=test, harms=(harm,), settings=settings)
    saved = save(llama, search_result, tmp_path / "out")
    data = ModelCard.load(saved.folder / "README.md").data
    accuracy, perplexity = data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_split) == ("accuracy", 0.5, "test")
    assert accuracy.metric_name == f"accuracy (choice; base model 25.0%, gain +25.0 points [+10.0, +40.0], {test.n} questions)"
    hub = DEFINITIONS["fever"].hub
    assert hub is not None
    assert (accuracy.dataset_type, accuracy.dataset_revision) == (hub.path, hub.revision)
    assert (data.datasets, data.metrics) == ([hub.path], ["accuracy", "perplexity"])
    assert (perplexity.metric_type, perplexity.metric_value) == ("perplexity", round(math.exp(1.5), 4))
    assert perplexity.metric_name == "perplexity (harm: x1.649 [1.492, 1.822] of the base model's)"
    assert perplexity.dataset_name == "text that the base model wrote"
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "out")


def test_figures_of_validation_are_no_metrics(llama: LanguageModel, search_result: SearchResult, tmp_path: Path) -> None:
    point = Point("1.fc_in@0.5", search_result.validation, ())
    saved = save(llama, replace(search_result, points=(point,)), tmp_path / "out", point=1)
    data = ModelCard.load(saved.folder / "README.md").data
    assert data.eval_results is None
    assert "Not tested on held-out questions" in (saved.folder / "README.md").read_text()
    saved = save(llama, "1.fc_in@0.5", tmp_path / "plain")
    assert ModelCard.load(saved.folder / "README.md").data.metrics is None


def test_the_metric_of_a_text_is_its_perplexity_and_a_file_is_no_data_set_of_the_hub(
    llama: LanguageModel, search_result: SearchResult, tmp_path: Path
) -> None:
    settings = search_result.settings | {"task": f"perplexity:{tmp_path}/own.txt", "scorer": "perplexity"}
    saved = save(llama, replace(search_result, settings=settings), tmp_path / "out")
    data = ModelCard.load(saved.folder / "README.md").data
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", round(math.exp(search_result.test.edited_loss), 4))
    assert result.dataset_name == "perplexity:own.txt"
    assert data.datasets is None


def test_the_gain_on_a_text_is_that_of_the_loss(search_result: SearchResult) -> None:
    values = search_result.as_dict()
    values["settings"] = values["settings"] | {"scorer": "perplexity"}
    for interval, says in (([-0.2, -0.1], ""), ([-0.1, 0.1], "includes zero"), ([0.1, 0.2], "rises"), (None, "includes zero")):
        values["test"] = values["test"] | {"loss_interval": interval}
        assert says in unclear_gain(values)
        assert bool(says) is bool(unclear_gain(values))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("form", ["dense", "adapter"])
def test_card_and_record_name_no_place_of_this_machine_and_the_folder_is_still_checked(
    form: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_here(monkeypatch)
    saved = save(load(base), "1.mlp@0.3", tmp_path / "reduced", form=form)
    card, record = ((saved.folder / name).read_text() for name in ("README.md", "laser.json"))
    for text in (card, record):
        assert str(tmp_path) not in text
        assert "private" not in text
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.base_model) == ("other", "research-only", None)
    assert "| base model | my-model |" in card
    assert "DIR" not in card
    assert "`laser load-check reduced`" in card
    assert json.loads(record)["command"].startswith("laser save my-model ")
    assert json.loads((saved.folder / "laser.local.json").read_text()) == {"base": str(base)}
    assert load_check(saved.folder).agrees
    base.rename(base.with_name("moved"))
    if form == "adapter":
        shutil.copytree(base.with_name("moved"), tmp_path / "here" / "my-model")  # of the same name, but not the base model
        monkeypatch.chdir(tmp_path / "here")
        gone = "belongs to the local model 'my-model', which is not where it was"
        with pytest.raises(ModelError, match=gone):
            load(saved.folder)
        with pytest.raises(ExportError, match=gone):
            load_check(saved.folder)
        (saved.folder / "laser.local.json").write_text(json.dumps({"base": "my-model"}))
        assert load(saved.folder).matrices
        assert load_check(saved.folder).agrees
        weights = tmp_path / "here" / "my-model" / "model.safetensors"
        tensors = load_file(weights)
        tensors["model.norm.weight"] += 1
        save_file(tensors, weights, {"format": "pt"})
        with pytest.raises(ModelError, match=r"was saved for my-model with weights \w{12}, and .*my-model has \w{12}; write"):
            load(saved.folder)
        assert load(saved.folder, dtype="bfloat16").matrices  # its hash is not comparable
    else:
        assert load_check(saved.folder).agrees


def test_only_fields_that_hold_paths_lose_their_folders(
    llama: LanguageModel, search_result: SearchResult, tmp_path: Path
) -> None:
    text = tmp_path / "private" / "guard.txt"
    harm = Harm(f"perplexity:{text}", "text", search_result.test)
    settings = search_result.settings | {
        "guards": [{"name": harm.guard, "hash": "0"}, {"name": f"{'a' * 300}/b", "hash": "0"}],
        "chat": {"system": "/no_think"},
    }
    saved = save(llama, replace(search_result, settings=settings, harms=(harm,)), tmp_path / "out")
    card, record = ((saved.folder / name).read_text() for name in ("README.md", "laser.json"))
    assert str(tmp_path) not in card + record
    assert "on perplexity:guard.txt (" in card
    kept = json.loads(record)["result"]
    assert kept["harms"][0]["guard"] == "perplexity:guard.txt"
    assert [guard["name"] for guard in kept["settings"]["guards"]] == ["perplexity:guard.txt", f"{'a' * 300}/b"]
    assert kept["settings"]["chat"] == {"system": "/no_think"}


@pytest.mark.parametrize("form", ["dense", "factored", "adapter"])
def test_a_card_for_the_hub_names_the_id_where_it_loads_and_a_folder_elsewhere(
    form: Any, llama: LanguageModel, tmp_path: Path
) -> None:
    saved = save(llama, "1.mlp@0.1", tmp_path / "out", form=form, hub_id="me/mine")
    card = (saved.folder / "README.md").read_text()
    assert ('PeftModel.from_pretrained(base, "me/mine")' if form == "adapter" else 'from_pretrained("me/mine")') in card
    assert "`hf download me/mine --local-dir mine`" in card
    assert "`laser reproduce mine`" in card
    assert "`laser load-check mine`" in card
    assert ('`laserlm.load("mine")`' in card) is (form == "adapter")
    (saved.folder / ".cache").mkdir()
    (saved.folder / ".cache" / "mine.metadata").write_text("a file that a download adds")
    assert file_hashes(saved.folder) == saved.record["files"]


def test_a_push_is_private_unless_it_is_asked_for_and_leaves_local_paths_out(
    run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    class Hub:
        def create_repo(self, hub_id: str, **options: Any) -> None:
            calls.append({"id": hub_id} | options)

        def upload_folder(self, **options: Any) -> str:
            calls[-1] |= options
            return "https://example.com"

    monkeypatch.setattr("laserlm.export.saving.HfApi", Hub)
    for number, flags in enumerate(([], ["--public"], ["--private"])):
        out = tmp_path / f"out{number}"
        code, _, err = run("save", base, "--reduce", "1.mlp@0.3", "--out", out, "--push", "me/mine", *flags)
        assert code == 0, err
        assert (calls[-1]["id"], calls[-1]["private"]) == ("me/mine", flags != ["--public"])
        assert calls[-1]["ignore_patterns"] == ["laser.local.json"]
    assert 'from_pretrained("me/mine")' in (out / "README.md").read_text()
    push(out, "me/other")
    assert calls[-1]["private"] is True
    out, plain = tmp_path / "compressed", ("--method", "plain", "--allocation", "uniform")
    code, _, err = run("compress", base, "--ratio", 0.5, *plain, "--out", out, "--push", "me/small")
    assert code == 0, err
    assert calls[-1]["id"] == "me/small"
    assert 'from_pretrained("me/small")' in (out / "README.md").read_text()


def test_an_adapter_of_a_local_base_model_is_not_pushed(run: Run, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    code, _, err = run("save", base, "--reduce", "1.mlp@0.3", "--form", "adapter", "--out", out, "--push", "me/mine")
    assert (code, out.is_dir()) == (1, True)
    assert f"its base model is the folder {base}, which nobody else has" in err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_pickled_adapter_needs_the_flag(base: Path, tmp_path: Path) -> None:
    folder = save(load(base), "1.mlp@0.3", tmp_path / "adapter", form="adapter").folder
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors, and pickled weights can run code; --allow"):
        load(folder)
    assert load(folder, allow_pickle=True).matrices


def test_a_card_shows_spearman_for_sentence_pairs_and_no_perplexity_for_labels(
    llama: LanguageModel, search_result: SearchResult, tmp_path: Path
) -> None:
    pairs = replace(search_result.test, base_spearman=0.5, edited_spearman=0.75, scorer="similarity")
    labels = replace(search_result.test, base_loss=1.0, edited_loss=1.5, loss_interval=Interval(0.4, 0.6), scorer="label")
    harm = Harm("topics", "questions", labels)
    assert str(harm).startswith("exp(loss) x1.649 [1.492, 1.822] on topics")
    search_result = replace(
        search_result, test=pairs, harms=(harm,), settings=search_result.settings | {"scorer": "similarity"}
    )
    card = (save(llama, search_result, tmp_path / "out").folder / "README.md").read_text()
    assert "Spearman 0.500 | Spearman 0.750 |" in card
    spearman, loss = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert (spearman.metric_type, spearman.metric_value) == ("spearmanr", 0.75)
    assert (loss.metric_type, loss.metric_value) == ("exp_loss", round(math.exp(1.5), 4))


def test_the_card_of_strengths_names_no_low_rank(llama: LanguageModel, tmp_path: Path) -> None:
    scaled = save(llama, "1.fc_in@scale0=0.5", tmp_path / "scaled")
    assert "matrices of scaled singular values" in (scaled.folder / "README.md").read_text()
    adapter = save(llama, "1.fc_in@scale0=0.5", tmp_path / "adapter", form="adapter")
    assert "scales singular components of" in (adapter.folder / "README.md").read_text()
