from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import check_here

from laserlm.cli.compress import compress as command
from laserlm.export import compress
from laserlm.models import LanguageModel
from laserlm.reductions import Intervention

Make = Callable[..., LanguageModel]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    answers = ["Paris", "Rome", "true", "false"] * 5
    rows = [{"id": str(i), "prompt": f"The capital number {i} is", "answer": a} for i, a in enumerate(answers)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The capital of France is Paris and the capital of Italy is Rome in Italy or Oslo. " * 120)
    return file


def test_a_reduction_is_saved_checked_and_rebuilt(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_here(monkeypatch)
    out = tmp_path / "out"
    code, printed, _ = run("save", folder, "--reduce", "all.mlp@0.2", "--form", "factored", "--out", out, "--json")
    assert code == 0
    output = json.loads(printed)
    assert output["form"] == "factored"
    assert output["parameters"] < output["base_parameters"]
    assert len(output["matrices"]) == 9
    code, printed, err = run("save", folder, "--reduce", "all.mlp@0.2", "--out", out)
    assert (code, printed) == (1, "")
    assert "exists already" in err
    code, printed, _ = run("reproduce", out)
    assert code == 0
    assert "equal, bit by bit" in printed
    code, printed, _ = run("load-check", out, "--json")
    assert code == 0
    check = json.loads(printed)
    assert (check["imported_laserlm"], check["in_float32"], check["agrees"]) == (True, True, True)
    other = tmp_path / "other"
    assert run("save", folder, "--reduce", "all.mlp@0.3", "--out", other)[0] == 0
    (other / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    code, _, err = run("load-check", other)
    assert code == 1
    assert "model.safetensors" in err
    assert "changed since the model was saved" in err
    (out / "model.safetensors").write_bytes(b"")
    code, _, err = run("load-check", out)
    assert code == 1
    assert "does not load" in err


def test_matrices_that_stay_unreduced_are_named(run: Run, make: Make, tmp_path: Path) -> None:
    lm = make("mixtral")
    lm.model.save_pretrained(tmp_path / "model")
    lm.require_tokenizer().save_pretrained(tmp_path / "model")
    reduction = ("--reduce", "1.all@0.2", "--form", "factored")
    code, printed, _ = run("save", tmp_path / "model", *reduction, "--out", tmp_path / "out")
    assert code == 0
    assert "1.experts.0.fc_out stays one matrix: not the weight of a linear layer" in printed


def test_what_a_search_found_is_saved_with_its_gain_and_scored_again(
    run: Run, folder: Path, questions: Path, tmp_path: Path
) -> None:
    store = tmp_path / "runs.db"
    task = ("--task", f"jsonl:{questions}")
    code, printed, _ = run("search", folder, *task, "--grid", "2.mlp@0.1,0.5", "--metric", "loss", "--store", store, "--json")
    assert code == 0
    best = json.loads(printed)["best"]
    code, _, _ = run("save", folder, "--run", "last", "--store", store, "--out", tmp_path / "out")
    assert code == 0
    record = json.loads((file := tmp_path / "out" / "laser.json").read_text())
    assert record["intervention"] == best
    assert record["result"]["test"]["n"] == 16
    assert "of 6 candidates by loss" in (tmp_path / "out" / "README.md").read_text()
    code, printed, err = run("reproduce", tmp_path / "out", *task)
    assert code == 0, err
    assert "recorded:" in printed
    assert "again:" in printed
    questions.write_text(questions.read_text().replace("Rome", "Oslo"))
    record["found"] = record.pop("result")  # as laserlm 0.1.0 wrote it
    file.write_text(json.dumps(record))
    code, printed, err = run("reproduce", tmp_path / "out", *task)
    assert code == 0
    assert "not the examples" in err
    questions.unlink()
    code, printed, err = run("reproduce", tmp_path / "out", *task, "--json")
    assert code == 0
    assert json.loads(printed)["test"] is None
    assert "not compared" in err


def test_nothing_or_two_things_to_save_is_an_error(run: Run, folder: Path, tmp_path: Path) -> None:
    both = ("--reduce", "1.mlp@0.5", "--run", "last")
    for options, message in (((), "give --reduce SPEC, or --run ID"), (both, "--reduce and --run both name a reduction")):
        code, _, err = run("save", folder, *options, "--out", tmp_path / "out")
        assert code == 1
        assert message in err
    code, _, err = run("save", folder, "--run", "last", "--store", tmp_path / "none.db", "--out", tmp_path / "out")
    assert code == 1
    assert not (tmp_path / "out").exists()


def test_a_model_is_compressed_to_a_budget(run: Run, folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--ratio", 0.5, "--measure", 0.8, "--calibration", text, "--refine", 3, "--quantised", "--out", out, "--json")
    code, printed, err = run("compress", folder, *options)
    assert code == 0, err
    output = json.loads(printed)
    report = (tmp_path / "out.html").read_text()
    assert output["report"] == str(tmp_path / "out.html")
    assert str(tmp_path) not in report
    for perplexity in (output["base_perplexity"], output["perplexity"]):
        assert f"{perplexity:.2f}" in report
    assert all(f'id="{name}"' in report for name in ("ranks", "perplexity"))
    assert "3 steps towards the unchanged model" in report
    record = json.loads((out / "laser.json").read_text())
    quantised = record["compression"]["perplexity"]["quantised"]
    assert quantised["q4_0"]["bytes"] < quantised["q8_0"]["bytes"] < 4 * output["base_parameters"]
    assert all(f"{measured['perplexity']:.2f}" in report for measured in quantised.values())
    assert f"--refine 3 --products {record['compression']['products']} --calibration" in record["command"]
    assert "--quantised --measure 0.8" in record["command"]
    assert output["parameters"] < 0.8 * output["base_parameters"]
    assert output["perplexity"] != output["base_perplexity"]
    sizes = [record["compression"]["perplexity"]["bytes"][name] for name in ("base", "0.5", "0.8")]
    sizes += [quantised[name]["bytes"] for name in ("q8_0", "q4_0")]
    assert all(f'<td class="n">{size / 2**20:.1f}</td>' in report for size in sizes)
    assert output["at"] == record["compression"]["perplexity"]["at"]
    assert output["quantised"] == quantised
    code, printed, _ = run("reproduce", out)
    assert code == 0
    code, printed, _ = run("compress", folder, *options[:-1], "--overwrite")
    assert f"  with 80% of the parameters: {output['at']['0.8']:.2f}" in printed
    rounded = quantised["q4_0"]
    assert f"weights as q4_0, {rounded['bytes'] / 2**20:.1f} MiB: {rounded['perplexity']:.2f}" in printed
    code, _, err = run("compress", folder, "--out", out, "--overwrite", "--measure", 2)
    assert code == 1
    assert "a ratio of 2.0 is out of range" in err


def test_options_of_compress_have_the_defaults_of_the_function() -> None:
    of_function, of_command = (inspect.signature(f).parameters for f in (compress, command))
    both = of_function.keys() & of_command.keys() - {"out", "ratio", "measure", "dtype"}
    assert both >= {"method", "allocation", "tokens", "dense_above", "refine", "quantised", "form"}
    assert {name: of_command[name].default for name in both} == {name: of_function[name].default for name in both}


def test_the_last_blocks_are_swept_with_ratios_in_any_way_of_writing_them(run: Run, folder: Path, questions: Path) -> None:
    task = ("--task", f"jsonl:{questions}", "--limit", 3)
    code, printed, _ = run("sweep-layers", folder, "--ratios", ".1", ".25", ".5", "--from-top", 2, *task, "--json")
    assert code == 0
    rows = json.loads(printed)
    assert [(r["top"], r["rho"]) for r in rows] == [(0, None), *((t, r) for t in (1, 2) for r in ("0.1", "0.25", "0.5"))]
    assert [r["intervention"] for r in rows][1] == "top1.all@0.1"
    assert rows[-1]["parameters"] < 1
    code, again, _ = run("sweep-layers", folder, "--ratios", ".1,.25,.5", "--from-top", 2, *task, "--json")
    assert again == printed
    code, _, err = run("sweep-layers", folder, "--ratios", "much", *task)
    assert code == 1
    assert "much" in err


def test_components_of_a_file_are_scored_saved_as_an_adapter_and_checked(
    run: Run, folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_here(monkeypatch)
    components = "1.fc_in@drop0,3-5+2.fc_up@drop7"
    file, out = tmp_path / "edit.json", tmp_path / "out"
    Intervention.parse(components).write(file)
    code, printed, _ = run("evaluate", folder, "--task", f"jsonl:{questions}", "--reduce", f"@{file}", "--json")
    assert code == 0
    assert json.loads(printed)["intervention"] == components
    code, printed, _ = run("save", folder, "--reduce", f"@{file}", "--form", "adapter", "--out", out)
    assert code == 0
    assert "an adapter for 2 matrices, 400 parameters in" in printed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # in peft
        code, printed, _ = run("load-check", out, "--json")
    assert code == 0
    assert json.loads(printed)["form"] == "adapter"
    code, printed, _ = run("reproduce", out)
    assert code == 0
    assert "all 2 tensors are equal, bit by bit" in printed
    code, printed, _ = run("evaluate", out, "--task", f"jsonl:{questions}", "--json")
    assert code == 0
    assert json.loads(printed)["intervention"] == ""
    file.write_text("{")
    code, _, err = run("evaluate", folder, "--task", f"jsonl:{questions}", "--reduce", f"@{file}")
    assert code == 1
    assert "cannot read the reductions in" in err
