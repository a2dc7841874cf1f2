"""Commands on tasks, and evaluation of the tasks that have no choices."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import GPT2, TOKENIZERS
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from laserlm.models import LanguageModel
from laserlm.tasks.definitions import DEFINITIONS

LETTERS = "abcdefghijklmnopqrstuvwxyz"
Make = Callable[..., LanguageModel]
Run = Callable[..., tuple[int, str, str]]


def lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of data sets, made for this."""
    claims = [{"id": i, "claim": f"Rome {i} is a city.", "label": ["SUPPORTS", "REFUTES"][i % 2]} for i in range(10)]
    lines(tmp_path / "data" / "fever" / "paper_dev.jsonl", claims)
    examples = [
        {"id": i, "question": f"Is {i} Rome?", "prop": "city", "s_pop": i, "possible_answers": '["Rome", "Oslo"]'}
        for i in range(10)
    ]
    lines(tmp_path / "data" / "popqa" / "popqa.jsonl", examples)
    functions = [
        {
            "task_id": f"Made/{i}",
            "prompt": f"def f{i}():\n",
            "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n",
            "entry_point": f"f{i}",
        }
        for i in range(5)
    ]
    lines(tmp_path / "data" / "humaneval" / "HumanEval.jsonl", functions)
    (tmp_path / "data" / "text.txt").write_text("Rome is a city in Italy and Oslo is not.\n" * 300)
    return tmp_path / "data"


@pytest.fixture
def data_folder(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the folder of data sets in the environment."""
    monkeypatch.setenv("LASER_DATA", str(data))


def test_all_tasks_are_listed_with_size_source_licence_and_scorer(run: Run) -> None:
    rows = json.loads(run("tasks", "--json")[1])
    assert [r["task"] for r in rows] == [*DEFINITIONS, "FILE", "hub:ORG/NAME", "perplexity:FILE", "lm-eval:NAME"]
    fever = next(r for r in rows if r["task"] == "fever")
    assert fever["source"] == "fever/fever"
    assert (fever["licence"], fever["scorer"]) == ("CC BY-SA 3.0", "choice")
    assert "13,086" in fever["rows"]
    assert [r["task"] for r in csv.DictReader(io.StringIO(run("tasks", "--csv")[1]))] == [r["task"] for r in rows]
    code, out, _ = run("tasks")
    assert code == 0
    assert "epistemic-reasoning" in out


def test_examples_are_shown_with_the_tokens_that_are_scored(run: Run, folder: Path, data: Path) -> None:
    code, out, err = run("tasks", "show", "fever", "--data", data, "--model", folder)
    assert code == 0, err
    assert "2 validation and 8 test examples; fever, CC BY-SA 3.0" in out
    assert out.count("Consider the following claim: Rome") == 3
    assert "The claim is[ true]   not [ false]" in out
    rows = json.loads(run("tasks", "show", "popqa", "--data", data, "--model", folder, "-n", 1, "--json")[1])
    (example,) = rows["examples"]
    assert example["prompt"] == "Q: Is 0 Rome? A:"
    assert example["text"] == "Q: Is 0 Rome? A:[ Rome]"
    code, _, err = run("tasks", "show", "nothing")
    assert (code, "no task 'nothing'" in err) == (1, True)


def test_masked_and_encoder_decoder_examples_are_shown(run: Run, make: Make, data: Path, tmp_path: Path) -> None:
    for family, expected in (("roberta", "The claim is[ true]"), ("t5", "The claim is => <unk>[true]")):
        lm = make(family)
        lm.model.save_pretrained(tmp_path / family)
        lm.require_tokenizer().save_pretrained(tmp_path / family)
        code, out, err = run("tasks", "show", "fever", "--data", data, "--model", tmp_path / family, "-n", 1)
        assert code == 0, err
        assert expected.replace(" ", "") in out.replace(" ", "").replace("</s>", "")


def test_a_data_folder_is_taken_from_the_environment(
    run: Run, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LASER_DATA", str(data))
    values = json.loads(run("evaluate", folder, "--task", "fever", "--json")[1])
    assert (values["n"], values["scorer"], values["majority_rate"]) == (8, "choice", 0.5)
    assert values["balanced_accuracy"] is not None
    # A task that comes with laserlm does not look there, and one that is not there asks the hub.
    assert json.loads(run("evaluate", folder, "--task", "worldfacts", "--limit", 2, "--json")[1])["n"] == 2
    code, _, err = run("evaluate", folder, "--task", "truthfulqa")
    assert (code, "from the hub" in err) == (1, True)


def test_what_the_model_writes_is_evaluated_and_compared(run: Run, folder: Path, data: Path) -> None:
    command = ("evaluate", folder, "--task", "popqa", "--data", data, "--reduce", "1.fc_in@0.1", "--compare", "--new-tokens", 4)
    values = json.loads(run(*command, "--json")[1])
    assert {"accuracy_reference", "exact_match", "f1", "f1_reference"} <= values.keys()
    assert values["comparison"]["n"] == values["n"] == 8
    code, out, _ = run(*command)
    assert code == 0
    assert "accuracy_reference 0." in out or "accuracy_reference 1." in out


def test_a_perplexity_is_printed_as_one(run: Run, folder: Path, data: Path) -> None:
    command = ("evaluate", folder, "--task", f"perplexity:{data / 'text.txt'}", "--reduce", "1.fc_in@0.1", "--compare")
    values = json.loads(run(*command, "--json")[1])
    assert values["perplexity"] > 1
    assert values["tokens"] > values["words"] > 0
    out = run(*command)[1]
    assert "perplexity" in out
    assert "change of loss" in out
    assert "accuracy" not in out
    searched = ("search", folder, "--task", f"perplexity:{data / 'text.txt'}", "--grid", "2.mlp@0.5", "--store", data / "r.db")
    code, out, err = run(*searched)
    assert code == 0, err
    assert "passages" in out
    assert "accuracy" not in out


def test_programs_run_only_where_that_is_allowed(run: Run, folder: Path, data: Path) -> None:
    command = ("evaluate", folder, "--task", "humaneval", "--data", data, "--new-tokens", 3, "--limit", 2)
    code, _, err = run(*command)
    assert (code, "--allow-code-execution" in err) == (1, True)
    values = json.loads(run(*command, "--allow-code-execution", "--samples", 10, "--temperature", 1, "--json")[1])
    assert (values["n"], values["pass@1"], values["pass@10"]) == (2, 0.0, 0.0)
    assert values["scorer"] == "program"


def test_a_search_where_the_model_writes_shows_its_finalists(run: Run, folder: Path, data: Path, tmp_path: Path) -> None:
    command = ("search", folder, "--task", "popqa", "--data", data, "--new-tokens", 3, "--grid", "2.mlp@0.5,0.1")
    code, out, err = run(*command, "--store", tmp_path / "runs.db")
    assert code == 0, err
    assert "Generated text decides" in out
    assert "the unchanged model" in out


def test_a_published_result_is_verified_on_a_model_of_its_architecture(run: Run, tmp_path: Path) -> None:
    config = AutoConfig.for_model("gptj", **GPT2 | {"n_layer": 28, "rotary_dim": 4, "bos_token_id": 0, "eos_token_id": 0})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    TOKENIZERS["causal"]().save_pretrained(tmp_path / "model")
    rows = [{"_id": str(i), "question": f"Is {i} in Rome", "answer": "Rome"} for i in range(10)]
    command = ("verify", "gpt-j-6b", "hotpotqa", "--data", lines(tmp_path / "dev.jsonl", rows), "--weights", tmp_path / "model")
    code, out, err = run(*command, "--limit", 4)
    assert code == 0, err
    assert "hotpotqa, 27.fc_in@0.1" in out
    assert "LASER project page (LASER)" in out
    assert "4 test rows, the first of 8" in out
    assert "--answer-tokenizer meta-llama/Llama-2-7b-hf" in out
    (result,) = json.loads(run(*command, "--json")[1])
    assert (result["published"]["base"], result["published"]["edited"]) == (19.6, 19.5)
    # The answer stands in every question, where the publication finds it too.
    assert result["accuracies"] == [100.0, 100.0]
    assert result["edited"]["intervention"] == "27.fc_in@0.1:reference"
    assert result["base"]["n"] == 8


def test_verify_says_what_there_is_and_when_the_hub_is_out_of_reach(run: Run, tmp_path: Path) -> None:
    code, _, err = run("verify", "gpt-j-6b", "sokoban")
    assert code == 1
    assert "no published result of 'gpt-j-6b' on 'sokoban' can be run; there are roberta-base counterfact" in err
    file = lines(tmp_path / "paper_dev.jsonl", [{"id": i, "claim": f"Rome {i}", "label": "SUPPORTS"} for i in range(10)])
    code, out, err = run("verify", "gpt-j-6b", "fever", "--data", file)
    assert (code, out) == (1, "")
    assert "cannot load 'EleutherAI/gpt-j-6b'" in err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the harness
def test_the_harness_runs_a_reduced_model_and_says_what_we_say(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [{"q": f"The capital of {c} is", "choices": ["Paris", "Rome", "Oslo"], "a": i % 3} for i, c in enumerate(LETTERS)]
    lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made.yaml").write_text(
        f"task: made\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: a\ndoc_to_choice: "{{choices}}"\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\nmetadata: {version: 1.0}\n"
    )
    command = ["lm-eval", "--model", "laser", "--device", "cpu", "--tasks", "made", "--include_path", tmp_path / "tasks"]
    losses: list[float] = []
    for reduce in ("", "0-2.mlp@0.05+1.v_proj@0.5"):
        out = tmp_path / f"out{len(reduce)}"
        arguments = ["--model_args", f"pretrained={folder},reduce={reduce}", "--output_path", out, "--log_samples"]
        code, _, err = run(*command, *arguments)
        assert code == 0, err[-2000:]
        # The harness takes a name once in a process.
        monkeypatch.setattr("lm_eval.api.registry.model_registry.register", lambda *_, **__: None)
        asked = ("evaluate", folder, "--task", "lm-eval:made", "--data", tmp_path / "tasks", "--split", "all")
        ours = json.loads(run(*asked, "--reduce", reduce, "--scores", tmp_path / "scores.jsonl", "--json")[1])
        (results,) = out.rglob("results_*.json")
        assert json.loads(results.read_text())["results"]["made"]["acc,none"] == ours["accuracy"]
        (samples,) = out.rglob("samples_*.jsonl")
        theirs = {s["doc_id"]: s for s in map(json.loads, samples.read_text().splitlines())}
        for score in map(json.loads, (tmp_path / "scores.jsonl").read_text().splitlines()):
            sample = theirs[int(score["id"])]
            assert float(sample["filtered_resps"][int(sample["target"])][0]) == pytest.approx(score["logprob"], abs=1e-4)
        losses.append(ours["loss"])
    assert abs(losses[0] - losses[1]) > 0.001
