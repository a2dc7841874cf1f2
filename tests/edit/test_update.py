"""The update of a LoRA adapter, reduced in place of the weights: loading, editing, searching and saving."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from in_process import check_here
from peft import LoraConfig, get_peft_model

from laserlm.cli.analyze.study import StudyOptions
from laserlm.cli.options import UpdatedModelOptions
from laserlm.edit import applied
from laserlm.errors import ExportError, MatrixError, ModelError, ReportError, WeightError
from laserlm.export import load_check, reproduce, save
from laserlm.export.update_adapter import adapter_of
from laserlm.models import load, loading, read_matrix
from laserlm.models.adapter import with_adapter
from laserlm.models.matrices import matrix_in
from laserlm.reductions import Intervention
from laserlm.searching import SearchConfig, search
from laserlm.searching.memory_plan import MemoryPlanner
from laserlm.searching.plan import plan
from laserlm.store import Store
from laserlm.tasks import Example, Task
from laserlm.web.report import write_report
from laserlm.web.submissions import submission

# Of peft with transformers 5, when a model gets an adapter.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
RANK = 4
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"]}
Folders = tuple[Path, Path]


def saved_adapter(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Folders:
    """Save a model and a random LoRA of it, and return both folders."""
    base, adapter = folder / "base", folder / "lora"
    lm = build(family)
    lm.model.to(dtype).save_pretrained(base)
    lm.require_tokenizer().save_pretrained(base)
    settings = {"r": RANK, "lora_alpha": 6, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2", **settings}
    wrapped: Any = get_peft_model(load(base).model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) / 5
    wrapped.save_pretrained(adapter)
    return base, adapter


def test_commands_load_the_adapter_that_they_are_given(tmp_path: Path) -> None:
    base, folder = saved_adapter(tmp_path)
    options = UpdatedModelOptions(model=str(base), adapter=folder)
    update = options.load().update
    assert update is not None
    assert update.folder == folder
    assert UpdatedModelOptions(model=str(base)).load().update is None
    assert options.load_named(str(base)).update is not None  # as commands do that load a model again by its name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reduction_changes_the_update_and_leaves_the_base(family: str, tmp_path: Path) -> None:
    base, folder = saved_adapter(tmp_path, family)
    lm, plain, merged = load(base, adapter=folder), load(base), load(folder)
    assert {m.max_rank for m in lm.matrices} == {RANK}
    assert lm.hash != merged.hash  # results of the two are kept apart
    for m in lm.matrices:
        torch.testing.assert_close(lm.model.get_parameter(m.path), merged.model.get_parameter(m.path))
    with applied(lm, "all.all@r0"):
        for path in lm.update.weights:
            assert torch.equal(lm.model.get_parameter(path), plain.model.get_parameter(path))
    m = next(m for m in lm.matrices if not m.parts)
    W = {x: read_matrix(x.model, next(o for o in x.matrices if o.id == m.id)) for x in (plain, merged)}
    U, S, Vh = torch.linalg.svd((W[merged] - W[plain]).double(), full_matrices=False)
    expected = W[plain].double() + U[:, :2] * S[:2] @ Vh[:2]
    with applied(lm, f"{m.id}@r2"):
        value = lm.model.get_parameter(m.path).detach()
        torch.testing.assert_close(matrix_in(value, m), expected.float(), atol=1e-5, rtol=0)


def questions() -> Task:
    examples = [Example(id=str(i), prompt=f"The city {i} is", answer=a) for i, a in enumerate(["red", "blue", "big"] * 8)]
    return Task.of("cities", examples, scorer="answer")


@pytest.mark.parametrize("strategy", ["race", pytest.param("components", marks=pytest.mark.slow)])
def test_a_search_reduces_the_update(strategy: Any, tmp_path: Path) -> None:
    base, folder = saved_adapter(tmp_path)
    lm = load(base, adapter=folder)
    config = SearchConfig(strategy=strategy, metric="loss", steps=2, candidates=4, random_candidates=1)
    result = search(lm, questions(), config)
    assert plan(lm, questions(), config).disk == 0
    assert result.candidates > 0
    assert {f"{r.layers}.{r.matrix}" for r in result.best.reductions} <= {m.id for m in lm.matrices}


def test_what_follows_a_search_of_an_update_names_the_adapter(tmp_path: Path) -> None:
    base, folder = saved_adapter(tmp_path)
    lm = load(base, adapter=folder)
    file = str(tmp_path / "runs.db")
    config = SearchConfig(grid="0.all@r0", strategy="exhaustive", metric="loss")
    result = search(lm, questions(), config, store=file)
    assert result.best
    named = f"laser save {base} --adapter {folder} --run {result.run} --out out"
    assert result.next_commands(str(base), "out")[0][0] == named
    with Store.open(file, create=False) as store:
        info = store.find(result.run)
        assert info.full_model == f"{base} with the adapter {folder}"
        with pytest.raises(ReportError, match=r"reduced the update of an adapter \(--adapter\)"):
            submission(info)
        report = write_report(store, result.run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"--adapter {folder} --run {result.run}" in report
    assert "laser analyze components" not in report  # which studies the components of weights
    with StudyOptions(run_or_model=result.run, store=file).pair() as pair:
        assert pair.lm.hash == lm.hash
    with pytest.raises(ExportError, match=f"load that model with --adapter {folder}"):
        save(load(base), result, tmp_path / "out")
    record = save(lm, result, tmp_path / "out").record
    assert record["result"]["settings"]["adapter"] == folder.name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_dense_and_as_a_smaller_adapter_the_weights_are_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_here(monkeypatch)
    base, folder = saved_adapter(tmp_path, family)
    lm = load(base, adapter=folder)
    text = "0.all@r2" if family == "llama" else "0.q_proj@r1+1.fc_in@drop0"
    dense = save(lm, text, tmp_path / "dense")
    small = save(lm, text, tmp_path / "small", form="adapter")
    with applied(lm, text):
        for saved in (dense, small):
            weights = load(saved.folder).model.state_dict()
            for name, tensor in lm.model.state_dict().items():
                torch.testing.assert_close(weights[name], tensor, atol=2e-6, rtol=1e-5, msg=name)
    assert small.parameters < sum(w.up.numel() + w.down.numel() for w in lm.update.weights.values()) or family == "gpt2"
    for saved in (dense, small):
        assert load_check(saved.folder).agrees
        assert reproduce(saved.folder, lm).agrees
    assert f"--adapter {folder.name}" in dense.record["command"]
    assert dense.record["base"]["hash"] == load(base).hash


def test_the_base_keeps_its_bits_in_half_precision_too(tmp_path: Path) -> None:
    base, folder = saved_adapter(tmp_path, dtype=torch.bfloat16)
    lm, plain = load(base, adapter=folder), load(base)
    with applied(lm, "all.all@r0"):
        for path in lm.update.weights:
            assert torch.equal(lm.model.get_parameter(path), plain.model.get_parameter(path))


@pytest.mark.slow
def test_the_command_line_searches_lists_and_saves_an_update(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    base, folder = saved_adapter(tmp_path)
    rows = [{"prompt": f"The city {i} is", "answer": "red" if i % 2 else "blue"} for i in range(16)]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with_adapter = [str(base), "--adapter", str(folder)]
    code, out, _ = run("matrices", *with_adapter, "--json")
    assert code == 0
    assert {m["max_rank"] for m in json.loads(out)} == {RANK}
    store = str(tmp_path / "runs.db")
    code, out, _ = run("search", *with_adapter, "--task", f"jsonl:{file}", "--strategy", "race", "--store", store, "--json")
    assert code == 0
    assert json.loads(out)["candidates"] > 0
    code, _, _ = run("save", *with_adapter, "--reduce", "0.q_proj@r1", "--form", "adapter", "--out", str(tmp_path / "out"))
    assert code == 0
    code, out, _ = run("evaluate", str(tmp_path / "out"), "--task", f"jsonl:{file}")
    assert code == 0
    task = ["--task", f"jsonl:{file}", "--scorer", "first_token"]
    code, out, _ = run("generate", *with_adapter, "The city", "--reduce", "0.q_proj@r0", "--json")
    assert (code, [row["variant"] for row in json.loads(out)["generations"]]) == (0, ["base", "edited", "removed part"])
    code, out, _ = run("sweep-layers", *with_adapter, *task, "--from-top", "1", "--ratios", "0.5", "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    code, out, _ = run("analyze", "flips", *with_adapter, *task, "--reduce", "0.q_proj@r0", "--store", store, "--json")
    assert code == 0
    code, _, error = run("analyze", "flips", "last", "--adapter", str(folder), "--store", store)
    assert (code, "leave out --adapter" in error) == (1, True)
    code, _, error = run("compress", *with_adapter, "--out", str(tmp_path / "small"))
    in_one_line = " ".join(error.replace("│", " ").split())  # typer breaks it in a box
    assert (code, "name the adapter's folder as the model" in in_one_line) == (2, True)


def test_what_cannot_be_done_with_an_update_is_refused(tmp_path: Path) -> None:
    base, folder = saved_adapter(tmp_path)
    lm = load(base, adapter=folder)
    saved = save(lm, "0.q_proj@r1", tmp_path / "dense", form="factored")
    assert [m.reason_kept_dense for m in saved.matrices] == ["a base weight of full rank, to which the adapter adds its update"]
    with pytest.raises(MatrixError, match="':split' and ':reference' are not for the update"):
        save(lm, "0.q_proj@r1:reference", tmp_path / "out")
    with pytest.raises(MatrixError, match="no matrix 'k_proj'"):
        save(lm, "0.k_proj@r1", tmp_path / "out")
    with pytest.raises(WeightError, match="only the update of an adapter can be changed here"):
        read_matrix(lm.model, lm.matrices[0])
    with applied(lm, "0.q_proj@r1"), pytest.raises(MatrixError, match="is reduced once"), applied(lm, "0.q_proj@r2"):
        pass
    with pytest.raises(ModelError, match=r"is no folder with an adapter_config\.json"):
        load(base, adapter=base)


def test_what_an_adapter_holds_besides_is_merged_and_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, folder = saved_adapter(tmp_path, modules_to_save=["norm"])
    lm = load(base, adapter=folder)
    assert "7 tensors of the adapter" in caplog.text
    # What the record names is the hash of a model that exists, although the norm is not that of the base.
    assert save(lm, "0.q_proj@r1", tmp_path / "dense").record["base"]["hash"] == load(base).hash
    with pytest.raises(ExportError, match=r"a smaller adapter would lose .*layernorm\.weight"):
        save(lm, "0.q_proj@r1", tmp_path / "small", form="adapter")
    other, dora = saved_adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(ModelError, match="of type DoRA"):
        load(other, adapter=dora)


def test_stacked_experts_are_merged_and_not_reduced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, folder = tmp_path / "base", tmp_path / "experts"
    built = build("mixtral")
    built.model.save_pretrained(base)
    built.require_tokenizer().save_pretrained(base)
    experts = next(m for m in load(base).matrices if m.expert is not None)
    save(load(base), f"0.q_proj@drop0+{experts.id}@drop0", folder, form="adapter")
    lm, merged = load(base, adapter=folder), load(folder)
    assert {m.id for m in lm.matrices} == {"0.q_proj"}
    assert "2 tensors of the adapter" in caplog.text
    torch.testing.assert_close(lm.model.get_parameter(experts.path), merged.model.get_parameter(experts.path))


@pytest.mark.parametrize("keeps_update", [True, False])
def test_an_adapter_is_merged_on_the_cpu_whatever_the_device(
    keeps_update: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = saved_adapter(tmp_path)
    # The meta device stands for CUDA, which need not be here: nothing can be computed on it.
    monkeypatch.setattr(loading, "_device", lambda device: torch.device("cpu" if device == "cpu" else "meta"))
    lm = load(base, adapter=folder) if keeps_update else load(folder)
    assert {p.device.type for p in lm.model.parameters()} == {"meta"}
    if lm.update is not None:
        assert {t.device.type for w in lm.update.weights.values() for t in (w.base, w.up, w.down)} == {"meta"}


def test_an_update_of_weights_that_are_not_in_memory_or_quantised_is_refused(tmp_path: Path) -> None:
    base, folder = saved_adapter(tmp_path)
    lm = load(base)
    lm.model.lm_head.to("meta")
    with pytest.raises(WeightError, match="is offloaded and not in memory; load the model with a device_map"):
        with_adapter(lm, folder, keeps_update=True)
    lm = load(base)
    weight = lm.model.get_parameter(lm.matrices[0].path)
    weight.requires_grad_(requires_grad=False).data = weight.data.to(torch.int8)
    with pytest.raises(WeightError, match="load it without quantisation"):
        with_adapter(lm, folder, keeps_update=True)


def test_a_smaller_adapter_that_cannot_hold_the_update_is_refused(tmp_path: Path) -> None:
    base, folder = saved_adapter(tmp_path)
    lm = load(base, adapter=folder)
    path, weight = next(iter(lm.update.weights.items()))
    large = replace(weight, up=weight.up * 1e6)
    beyond = replace(lm, update=replace(lm.update, weights={**lm.update.weights, path: large}))
    with pytest.raises(ExportError, match=r"too large for torch\.float16; save them in bfloat16"):
        adapter_of(beyond, Intervention.parse("1.q_proj@r1"), dtype=torch.float16)
    with pytest.raises(ExportError, match="is a base model with a merged adapter"):
        adapter_of(load(folder, adapter=folder), Intervention.parse("1.q_proj@r1"))
    first, second = (lm.model.model.layers[i].self_attn.q_proj for i in (0, 1))
    second.weight = first.weight
    with pytest.raises(ExportError, match=r"an adapter cannot change model\.layers\.0.* several layers share the weights"):
        adapter_of(lm, Intervention.parse("1.q_proj@r1"))


def test_a_plan_counts_all_blocks_and_the_base_weights_of_an_update(tmp_path: Path) -> None:
    base, folder = saved_adapter(tmp_path, layers_to_transform=[1])
    plain, lm = load(base), load(base, adapter=folder)
    assert {m.layer for m in lm.matrices} == {1}
    planners = [MemoryPlanner(x, x.matrices, memory=2**30, batch_size=4) for x in (plain, lm)]
    assert planners[0].n_blocks == planners[1].n_blocks
    kept = sum(t.nbytes for w in lm.update.weights.values() for t in (w.base, w.up, w.down))
    assert planners[1].weights == planners[0].weights + kept
    config = SearchConfig(grid="1.all@r1", strategy="exhaustive")
    assert plan(lm, questions(), config).pass_flop == plan(plain, questions(), config).pass_flop
