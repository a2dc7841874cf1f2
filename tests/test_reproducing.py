"""docs/reproducing.md: its published figures are those that ship, its commands exist, and what it verifies can be run."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from families import CAUSAL, MASKED, TOKENIZERS
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForMaskedLM

from laserlm.cli import app
from laserlm.edit.apply import resolve
from laserlm.errors import LaserError
from laserlm.models import LanguageModel, load
from laserlm.reductions import Grid
from laserlm.searching.candidates import expand
from laserlm.studies.entities import MODELS, PUBLISHED
from laserlm.studies.published import CHECKPOINTS, published
from laserlm.tasks import task
from laserlm.tasks.definitions import DEFINITIONS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S)
Run = Callable[..., tuple[int, str, str]]

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-j-6b": ("gptj", {"n_layer": 28, "n_embd": 48, "n_positions": 512}),
    "llama-2-7b": ("llama", {"num_hidden_layers": 32}),
    "roberta-base": ("roberta", {"num_hidden_layers": 12, "max_position_embeddings": 514}),
    "mistral-7b-instruct-v0.1": ("mistral", {"num_hidden_layers": 32}),
    "bundled": ("llama", {"num_hidden_layers": 30}),
}
"""Family of each model of the page, and what its tiny copy has of its real shape: the blocks, and rank 40."""
FOLDERS = {"gpt-j-6b": "gpt-j-6b", "mistral-7b": "mistral-7b-instruct-v0.1"}
"""The folders that the page saves first, and the model in each."""
NAMES = {hub: name for name, (hub, _) in CHECKPOINTS.items()} | FOLDERS | {"bundled": "bundled"}
TEXT_OF_THE_PAPER = {"4.8 to 5.0", "4.8 to 4.9", "+24.8 points"}
"""Sections 5.1 and C.4 of arXiv 2312.13558: perplexity on the Pile twice, and robustness to paraphrases."""


@dataclass(frozen=True)
class Row:
    """One row of a table with published figures."""

    model: str
    task: str
    metric: str
    base: float
    edited: float
    losses: tuple[str, str]
    reduction: str
    command: str

    @property
    def figures(self) -> tuple[object, ...]:
        return (self.model, self.task, self.metric, self.base, self.edited, *self.losses, self.reduction)


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """Read every table as rows by the names of its columns."""
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        head, _, *lines = block.splitlines()
        yield [dict(zip(split(head), split(line), strict=True)) for line in lines]


def split(line: str) -> list[str]:
    """Split a row at the bars outside inline code."""
    bare = re.sub(r"`[^`]*`", lambda code: code[0].replace("|", "\0"), line.strip())
    return [cell.strip().replace("\0", "|") for cell in bare[1:-1].split("|")]


def rows() -> list[Row]:
    """Return the rows of the page that stand for published results."""
    results = []
    for table in tables(PROSE):
        for cells in table:
            if not {"model", "task", "reduction", "command"} <= cells.keys():
                continue
            named = next(head for head in cells if head.startswith("base") and head != "base loss")
            metric = {"base, %": "accuracy_percent", "base, pass@1": "pass_at_1"}.get(named, "")
            metric = metric or {"solved, %": "solved_percent", "return": "return"}[cells["figure"]]
            edited = next(cells[head] for head in cells if head.startswith("LASER") and head != "LASER loss")
            losses = (cells.get("base loss", ""), cells.get("LASER loss", ""))
            reduction = cells["reduction"].strip("`")
            figures = (float(cells[named]), float(edited), losses, reduction)
            results.append(Row(cells["model"], cells["task"], metric, *figures, cells["command"].strip("`")))
    return results


def shipped() -> list[tuple[object, ...]]:
    """Read the table that ships, by other means than laserlm does."""
    text = (files("laserlm.studies") / "data" / "published_results.csv").read_text(encoding="utf-8")
    head, *lines = csv.reader(text.splitlines())
    results: list[tuple[object, ...]] = []
    for line in lines:
        r = dict(zip(head, line, strict=True))
        named = (r["model"], r["task"], r["metric"])
        results.append((*named, float(r["base"]), float(r["edited"]), r["base_loss"], r["edited_loss"], r["intervention"]))
    return results


def commands() -> list[str]:
    """Return every command line of the page: in cells, in text and in blocks."""
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", PROSE)]
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.M | re.S)
    typed = [line.split(" # ")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(c for c in [*inline, *typed] if c.startswith("laser ")))


@cache
def root() -> Any:
    """Return the command line, built once."""
    return typer.main.get_command(app)


@cache
def parse_command(line: str) -> dict[str, Any]:
    """Parse a command line as the program would, down to the last option, and run nothing.

    A bare name of a command, as running text has it, is looked up.
    """
    words = shlex.split(line)[1:]
    command: Any = root()
    context: Any = None
    name, path = "laser", []
    while hasattr(command, "commands"):
        if not words and path:
            return {"path": path}
        context = command.make_context(name, words, parent=context)
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        path.append(name)
    if not words and any(p.required for p in command.params):
        return {"path": path}
    context = command.make_context(name, words, parent=context)
    return context.params | {"path": path}


def check(line: str) -> None:
    """Raise an error where a command names an option, model, task, matrix or grid that there is not."""
    p = parse_command(line)
    if p["path"] == ["verify"] and "name" in p:
        assert published(p["model"], p["name"]), f"nothing published of {p['model']} on {p['name']}"
        assert p["weights"] in (None, "bundled") or FOLDERS[p["weights"]] == p["model"]
        if p["weights"] == "bundled":
            resolve(tiny("bundled").matrices, published(p["model"], p["name"])[0].intervention)
        return
    assert not p.get("task") or p["task"] in DEFINITIONS or p["task"].startswith(("perplexity:", "jsonl:")), p["task"]
    model = p.get("model") or p.get("what")
    if model is None or model == "last" or p["path"][0] == "lab":
        return
    matrices = tiny(NAMES[model]).matrices
    if p.get("grid"):
        expand(Grid.parse(p["grid"]), matrices)
    if p.get("reduce"):
        resolve(matrices, "+".join(p["reduce"]))
    if p.get("scorer"):
        assert p["scorer"] in ("top10", "contains")


@cache
def tiny(name: str) -> LanguageModel:
    """Return a tiny random model of the family of a model of the page, with its number of blocks."""
    family, changes = SHAPES[name]
    model_type, settings, _ = (CAUSAL | MASKED)[family]
    kind: Any = "masked" if family in MASKED else "causal"
    config = AutoConfig.for_model(model_type, **settings | {"bos_token_id": 0, "eos_token_id": 0} | changes)
    torch.manual_seed(0)
    model = (AutoModelForMaskedLM if kind == "masked" else AutoModelForCausalLM).from_config(config)
    tokenizer = TOKENIZERS[kind]()
    tokenizer.model_max_length = 512
    return LanguageModel(model=model, tokenizer=tokenizer, name=name, kind=kind)


def test_the_page_has_the_published_rows_with_their_figures_and_no_others() -> None:
    assert Counter(r.figures for r in rows()) == Counter(shipped())
    assert len(rows()) == 54


def test_every_published_row_has_a_command_about_itself() -> None:
    without = []
    for row in rows():
        p = parse_command(row.command)
        if p["path"] == ["verify"]:
            assert row.reduction in {r.intervention for r in published(p["model"], p["name"])}
            assert (p["model"], p["name"]) == (row.model, row.task)
        elif p["path"] == ["evaluate"]:
            assert (p["reduce"], NAMES[p["model"]], p["task"]) == ([f"{row.reduction}:reference"], row.model, row.task)
            assert p["compare"]
        else:
            without.append((row.task, row.reduction))
    # As the page says: of these there is a search, but nothing that makes the published reduction.
    assert without == [("counterfact", "composed"), ("sokoban", ""), ("sokoban", "")]
    verified = {(r.model, r.task, r.intervention) for r in published()}
    assert {(r.model, r.task, r.reduction) for r in rows()} - verified == {
        ("gpt-j-6b", "counterfact", "composed"),
        ("decision-transformer", "sokoban", ""),
    }


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_page_can_be_typed(line: str) -> None:
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "laser verify gpt-j-6b counterfact --colour red",
        "laser verify gpt-j-6b chess",
        "laser verify gpt-5 counterfact",
        "laser proove gpt-j-6b counterfact",
        "laser analyze flop last",
        "laser search gpt-5 --task counterfact",
        "laser search gpt-j-6b --task counterfacts",
        "laser search gpt-j-6b --task counterfact --grid papers",
        "laser evaluate gpt-j-6b --task fever --reduce 28.fc_in@0.1",
        "laser evaluate gpt-j-6b --task fever --reduce 27.fc_up@0.1",
        "laser search gpt-j-6b --width many",
    ],
)
def test_a_command_that_there_is_not_would_be_found(line: str) -> None:
    with pytest.raises((LaserError, AssertionError, KeyError, typer._click.exceptions.UsageError)):
        check(line)


def test_every_task_and_grid_that_the_page_offers_is_there() -> None:
    offered = next(p for p in re.findall(r"`--grid ([^`]+)`", PROSE) if ":reference" in p)
    for name, n in [("gpt-j-6b", 448), ("llama-2-7b", 512), ("roberta-base", 192)]:
        (row,) = [c for t in tables(PROSE) for c in t if c.get("model") == name and "candidates" in c]
        assert int(row["candidates"]) == n == len(expand("paper", big(name)))
        exact = {str(c.intervention) for c in expand("paper", big(name))}
        assert {str(c.intervention).removesuffix(":reference") for c in expand(offered, big(name))} == exact


def big(name: str) -> Any:
    """Return the matrices of a model with as many blocks and wide enough that the paper's eight sizes are eight ranks."""
    family, changes = SHAPES[name]
    model_type, settings, _ = (CAUSAL | MASKED)[family]
    wide = {"n_embd": 128} if family == "gptj" else {"hidden_size": 128, "intermediate_size": 128}
    config = AutoConfig.for_model(model_type, **settings | changes | wide)
    with torch.device("meta"):
        model = (AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM).from_config(config)
    return LanguageModel(model=model, tokenizer=None, name=name, kind="masked" if family in MASKED else "causal").matrices


def test_sizes_of_the_weights_are_those_of_their_shapes() -> None:
    # transformers' own defaults are the shapes of these models, but for RoBERTa.
    roberta = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    shapes = {"gpt-j-6b": ("gptj", {}), "llama-2-7b": ("llama", {}), "mistral-7b-instruct-v0.1": ("mistral", {})}
    shapes["roberta-base"] = ("roberta", roberta)
    sizes = {c["model"]: c["weights as published"] for t in tables(PROSE) for c in t if "weights as published" in c}
    assert sizes.keys() == CHECKPOINTS.keys()
    for name, (model_type, settings) in shapes.items():
        config = AutoConfig.for_model(model_type, **settings)
        with torch.device("meta"):
            model = (AutoModelForMaskedLM if model_type == "roberta" else AutoModelForCausalLM).from_config(config)
        dtype = CHECKPOINTS[name][1] or "float16"  # the blog's code runs Mistral in half precision
        size = sum(p.numel() for p in model.parameters()) * (4 if dtype == "float32" else 2) / 1e9
        assert sizes[name] == f"{size:.1f} GB, {dtype}"


def test_the_data_sets_are_where_the_tasks_read_them() -> None:
    cases = [c for t in tables(PROSE) for c in t if "read from" in c]
    assert {c["task"] for c in cases} == {r.task for r in published()}
    for c in cases:
        d = DEFINITIONS[c["task"]]
        assert c["read from"].strip("`") == (d.url or (d.hub.path if d.hub else ""))
        n = int(c["rows"].replace(",", ""))
        assert c["rows"] in d.rows
        assert c["test"] == ("all" if c["task"] == "humaneval" else f"{n - n // 5:,}")


def test_the_published_entities_are_those_that_the_study_prints() -> None:
    (table,) = [t for t in tables(PROSE) if t and set(MODELS) <= t[0].keys()]
    expected = [
        {m: f"{v[m]:.2f}" if v[m] > 1 else f"{v[m]:.3f}" for m in MODELS} for s in PUBLISHED.values() for v in s.values()
    ]
    assert [{m: c[m] for m in MODELS} for c in table] == expected


def test_what_the_page_counts_among_the_published_rows_is_so() -> None:
    laser = [r for r in rows() if r.metric == "accuracy_percent" and all(r.losses)]
    assert [(r.model, r.task) for r in laser if r.edited < r.base] == [("gpt-j-6b", "hotpotqa")]
    assert [(r.model, r.task) for r in laser if r.edited == r.base] == [("roberta-base", "truthfulqa")]
    assert sum(float(r.losses[1]) > float(r.losses[0]) for r in laser) == 6
    assert [v for r in laser if r.task == "truthfulqa" for v in (r.base, r.edited)].count(56.2) == 3
    # Wilson's interval of 29 of 164, and half that of a share of two fifths of 1,600.
    p, n, z = 29 / 164, 164, 1.96
    middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z * sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
    low, high = middle - half, middle + half
    assert (round(100 * low, 1), round(100 * high, 1)) == (12.6, 24.2)
    assert "12.6 to 24.2 %" in PROSE
    outside = sorted(r.edited for r in rows() if r.task == "humaneval" and not low < r.edited < high)
    assert (len(outside), outside[-1]) == (3, 0.0366)
    assert round(196 * sqrt(0.4 * 0.6 / 1600), 1) == 2.4


@pytest.mark.realdata
def test_constant_answers_score_what_the_page_says(real_data: Path) -> None:
    statements = task("truthfulqa", data=real_data, split="paper")
    answers = Counter(e.answer for e in statements.test)
    assert round(100 * answers["false"] / answers.total(), 1) == 56.2
    entailed = Counter(e.answer for e in task("epistemic-reasoning", data=real_data).every)
    assert round(100 * entailed["entailment"] / entailed.total(), 2) == 37.05
    assert "37.05 %" in PROSE


def test_every_other_figure_is_published_or_measured_somewhere() -> None:
    """A number with a point, outside code and outside the rows above, stands in the pages of measured figures too."""
    measured = "".join((ROOT / "docs" / f"{n}.md").read_text() for n in ("findings", "benchmarks", "lab", "tasks", "scaling"))
    shown = {str(v) for r in shipped() for v in r}
    known = set(re.findall(r"\d+\.\d+", measured)) | shown | HERE
    lines = [line for line in PROSE.splitlines() if not any(f"`{r.command}`" in line for r in rows())]
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|" + "|".join(map(re.escape, TEXT_OF_THE_PAPER)), "", "\n".join(lines))
    text = "\n".join(line for line in text.splitlines() if "share with" not in line and "entities in a text" not in line)
    assert set(re.findall(r"\d+\.\d+", text)) <= known


HERE = {
    *("12.1", "27.0", "14.5", "0.5"),  # GB, tested above
    *("37.05", "62.95"),  # constant answers, tested above
    *("0.6", "12.6", "24.2", "2.4"),  # of HumanEval and epistemic reasoning, tested above
    *("14.2", "5.760", "5.721", "5.785", "7.0", "7.2", "6.390", "6.511"),  # measured for this page, with commands beside them
}
"""Numbers that were worked out or measured for the page."""

CLAIMS = [{"id": i, "claim": f"Rome {i} is a city.", "label": ["SUPPORTS", "REFUTES"][i % 2]} for i in range(5)]
TEXTS = [{"hard_text": f"He is in Rome {i}", "profession": [20, 14][i % 2], "gender": i % 2} for i in range(5)]
FACT = {
    "prompt": "{} is a city in",
    "relation_id": "P17",
    "target_new": {"str": "Norway", "id": "Q2"},
    "target_true": {"str": "Italy", "id": "Q1"},
}
DATA: dict[str, list[dict[str, Any]]] = {
    "counterfact": [
        {"case_id": i, "requested_rewrite": FACT | {"subject": f"Rome {i}"}, "paraphrase_prompts": [f"{i} a", f"{i} b"]}
        for i in range(5)
    ],
    "hotpotqa": [{"_id": str(i), "question": f"Is {i} in Rome", "answer": "Rome"} for i in range(5)],
    "fever": CLAIMS,
    "bios-gender": TEXTS,
    "bios-profession": TEXTS,
    "truthfulqa": [{"question": f"Is {i} Rome?", "mc2_targets": {"Yes": 1, "No": 0}} for i in range(5)],
    "epistemic-reasoning": [
        {
            "inputs": f"Premise: {i}. Hypothesis: {i}.\nRelation:",
            "multiple_choice_targets": ["entailment", "non-entailment"],
            "multiple_choice_scores": [0, 1],
        }
        for i in range(5)
    ],
    "wikidata-qa": [{"inputs": f"The capital of {i} is", "targets": ["Rome"]} for i in range(5)],
    "humaneval": [
        {
            "task_id": "Made/0",
            "prompt": "def f():\n",
            "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n",
            "entry_point": "f",
        }
    ],
}
"""A few made-up rows of each task with published results."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a tiny model once."""

    @cache
    def saved(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        tiny(name).model.save_pretrained(folder)
        tiny(name).require_tokenizer().save_pretrained(folder)
        return folder

    return saved


def verifying() -> list[str]:
    """Return the commands of the page that verify, one for each model and task."""
    by_name = {}
    for line in commands():
        p = parse_command(line)
        if p["path"] == ["verify"] and "name" in p and p["weights"] != "bundled":
            by_name[p["model"], p["name"]] = line
    return list(by_name.values())


def test_all_that_can_be_verified_is_on_the_page() -> None:
    pairs = {(p["model"], p["name"]) for p in map(parse_command, verifying())}
    assert pairs == {(r.model, r.task) for r in published()}


@pytest.mark.parametrize("line", verifying())
def test_a_verification_of_the_page_runs(line: str, saved: Callable[[str], Path], run: Run, tmp_path: Path) -> None:
    words = shlex.split(line)[1:]
    p = parse_command(line)
    weights = saved(p["model"])
    for option, value in pairwise(list(words)):
        if option in ("--weights", "--answer-tokenizer"):
            words[words.index(value, words.index(option))] = str(weights)
    words += [] if "--weights" in words else ["--weights", str(weights)]
    words += ["--new-tokens", "3", "--allow-code-execution"] if p["name"] == "humaneval" else []
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(DATA[p["name"]]))
    code, out, err = run(*words, "--data", file, "--limit", 2, "--json")
    assert code == 0, err
    values = json.loads(out)
    assert [v["published"]["intervention"] for v in values] == [r.intervention for r in published(p["model"], p["name"])]
    for v in values:
        assert v["edited"]["n"] == v["base"]["n"] <= 2
        assert v["edited"]["intervention"].endswith(":reference")


def test_pickled_weights_become_a_folder_of_the_same_weights(run: Run, tmp_path: Path) -> None:
    (line,) = [c for c in commands() if "--allow-pickle" in c and "--out gpt-j-6b" in c]
    lm = tiny("gpt-j-6b")
    lm.model.save_pretrained(tmp_path / "hub")
    lm.require_tokenizer().save_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").unlink()
    torch.save({name: tensor.half() for name, tensor in lm.model.state_dict().items()}, tmp_path / "hub" / "pytorch_model.bin")
    words = shlex.split(line)[1:]
    words[words.index("EleutherAI/gpt-j-6b")] = str(tmp_path / "hub")
    words[words.index("--out") + 1] = str(tmp_path / "gpt-j-6b")
    refused, _, message = run(*(w for w in words if w != "--allow-pickle"))
    assert (refused, "--allow-pickle" in message) == (1, True)
    code, _, err = run(*words)
    assert code == 0, err
    again = load(tmp_path / "gpt-j-6b", dtype="float16")
    first = load(tmp_path / "hub", dtype="float16", allow_pickle=True)
    assert again.hash == first.hash
