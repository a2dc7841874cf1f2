"""Tasks of lm-evaluation-harness, held against what the harness itself makes of them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from laserlm.edit import applied
from laserlm.errors import TaskError
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import compare, evaluate
from laserlm.tasks import Task, task

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the harness

Make = Callable[..., LanguageModel]
ROWS = [
    {
        "q": f"The capital of {country} is",
        "choices": ["Paris", "a city in Italy", "Rome", "Madrid"],
        "a": i % 4,
        "t": ["Paris", "Rome is", "Oslo", "true"][i % 4],
        "two": [f"{country} is", f"{country} and Rome is"],
        "n": i % 2,
    }
    for i, country in enumerate(["France", "Spain", "Italy", "Norway", "Portugal", "Rome", "Lisbon", "Oslo"])
]
KINDS = {
    "made_choice": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: a
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "made_shots": """
output_type: multiple_choice
num_fewshot: 2
fewshot_split: test
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: a
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "made_inputs": """
output_type: multiple_choice
doc_to_text: n
doc_to_target: "a city in Italy"
doc_to_choice: "{{two}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "made_likelihood": """
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: " {{t}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "made_generate": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{t}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 6, do_sample: false}
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "(\\\\w+)"}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of task definitions over one file."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    for name, kind in KINDS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        (tmp_path / "tasks" / f"{name}.yaml").write_text(f"{head}test_split: test{kind}metadata: {{version: 1.0}}\n")
    return tmp_path / "tasks"


def theirs(lm: LanguageModel, name: str, folder: Path) -> dict[str, Any]:
    """Return what the harness says of a model, sample by sample, with its own Hugging Face model."""
    from lm_eval.evaluator import evaluate as evaluate_
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(name)
    for one in loaded["tasks"].values():
        one.set_fewshot_seed(1234)
    lm.model.name_or_path = "example"
    result: dict[str, Any] = evaluate_(
        HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4), loaded, bootstrap_iters=0
    )
    return result


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("intervention", ["", "0-2.mlp@0.1"])
def test_figures_are_those_of_the_harness(name: str, intervention: str, folder: Path, make: Make) -> None:
    lm = make("llama")
    dataset = task(f"lm-eval:{name}", data=folder)
    assert len(dataset.every) == len(ROWS)
    with applied(lm, intervention):
        ours = evaluate(lm, dataset.every, batch_size=3)
        reference = theirs(lm, name, folder)
    samples = sorted(reference["samples"][name], key=lambda s: s["doc_id"])
    metric = "exact_match" if name == "made_generate" else "acc"
    assert [s.correct for s in ours.scores] == [bool(sample[metric]) for sample in samples]
    label = "first" if name == "made_generate" else "none"
    assert ours.accuracy == reference["results"][name][f"{metric},{label}"]
    if name != "made_generate":
        for score, sample, e in zip(ours.scores, samples, dataset.every, strict=True):
            assert score.logprob == pytest.approx(sample["resps"][e.right][0][0], abs=1e-3)
    if name == "made_choice":
        assert ours.figures["acc_norm"] == reference["results"][name]["acc_norm,none"]
        assert 0 < len({s.predicted for s in ours.scores}) <= 4


def test_two_evaluations_of_a_harness_task_compare_in_pairs(folder: Path, make: Make) -> None:
    lm = make("llama")
    dataset = task("lm-eval:made_choice", data=folder)
    base = evaluate(lm, dataset.every)
    with applied(lm, "0-2.mlp@0.1"):
        result = compare(base, evaluate(lm, dataset.every))
    assert result.n == len(ROWS)
    assert result.base == base.accuracy


def test_a_text_of_the_harness_is_scored_by_perplexity(folder: Path, tmp_path: Path, make: Make) -> None:
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\ntest_split: test\n"
    rolling = f'task: made_text\n{head}output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{{{q}}}}"\n'
    (folder / "made_text.yaml").write_text(f"{rolling}metadata: {{version: 1.0}}\n")
    lm = make("llama")
    result = evaluate(lm, task("lm-eval:made_text", data=folder).every)
    reference = theirs(lm, "made_text", folder)["results"]["made_text"]
    # In a single window both read the same; the harness counts words by the white space between them.
    assert math.exp(-sum(s.logprob for s in result.scores) / result.words) == pytest.approx(
        reference["word_perplexity,none"], rel=1e-3
    )


@pytest.mark.parametrize("defaults", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_unknown_harness_task_is_an_error(defaults: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager as manager

    if not defaults:  # the harness takes many seconds to read the thousands of its own
        monkeypatch.setattr(
            "lm_eval.tasks.TaskManager",
            lambda include_path, include_defaults=True: manager(include_path=include_path, include_defaults=False),
        )
    with pytest.raises(TaskError, match="has no task 'nothing_of_this_name'"):
        task("lm-eval:nothing_of_this_name", data=folder)


def test_harness_tasks_that_cannot_be_loaded_are_errors(folder: Path) -> None:
    def asked(name: str) -> Task:
        return task(f"lm-eval:{name}", data=folder)

    with pytest.raises(TaskError, match="no folder"):
        task("lm-eval:made_choice", data=folder / "nothing")
    text = (folder / "made_choice.yaml").read_text().replace("{{choices}}", "{{missing}}")
    (folder / "made_broken.yaml").write_text(text.replace("made_choice", "made_broken"))
    with pytest.raises(TaskError, match="lm-evaluation-harness cannot make its task 'made_broken'"):
        asked("made_broken")
    (folder / "made_group.yaml").write_text("group: made_group\ntask: [made_choice, made_shots]\n")
    with pytest.raises(TaskError, match="'made_group' is a group of tasks"):
        asked("made_group")


def test_generated_programs_run_only_if_allowed(folder: Path) -> None:
    text = (folder / "made_generate.yaml").read_text().replace("made_generate", "made_unsafe")
    (folder / "made_unsafe.yaml").write_text(text + "unsafe_code: true\n")
    with pytest.raises(TaskError, match=r"which the harness does not confine\. Allow that with --allow-code-execution"):
        task("lm-eval:made_unsafe", data=folder)
    assert len(task("lm-eval:made_unsafe", data=folder, allow_code_execution=True).every) == len(ROWS)


def test_a_metric_between_right_and_wrong_is_refused(folder: Path, make: Make) -> None:
    (folder / "halves.py").write_text("def halves(doc, results):\n    return {'acc': 0.5}\n")
    text = (folder / "made_choice.yaml").read_text().replace("made_choice", "made_halves")
    (folder / "made_halves.yaml").write_text(text + "process_results: !function halves.halves\n")
    dataset = task("lm-eval:made_halves", data=folder)
    with pytest.raises(TaskError, match="no metric that is 0 or 1 for document 0"):
        evaluate(make("llama"), dataset.every)


def test_other_scorers_read_the_same_tokens(folder: Path, make: Make) -> None:
    lm = make("llama")
    dataset = task("lm-eval:made_likelihood", data=folder)
    ours, answers = (evaluate(lm, dataset.every, scorer=scorer) for scorer in (None, "answer"))  # type: ignore[arg-type]
    assert [s.logprob for s in answers.scores] == pytest.approx([s.logprob for s in ours.scores], abs=1e-5)
    assert [s.correct for s in answers.scores] == [s.correct for s in ours.scores]


def test_the_random_numbers_of_others_stay_as_they_are(folder: Path) -> None:
    random.seed(7)
    expected = [random.random() for _ in range(3)]
    random.seed(7)
    task("lm-eval:made_shots", data=folder)
    assert [random.random() for _ in range(3)] == expected
