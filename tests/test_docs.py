"""Every command line and every block of Python in the README and the documentation is run, page by page, as a reader would.

A page has a working folder of its own with the files that its text takes for granted, and its blocks are run in order, once
on a small model that stands in for the bundled one and once, in the slow tier, on the bundled model itself, unless other pages
have the same commands (``REPEATING``). What takes long is run on fewer questions (``SHORT``). What cannot be run here is
read by the command line's own parser, and stands in ``ONLY_READ`` with the reason, and what is left to one of the two models
stands in ``ONLY_BUNDLED`` or ``ONLY_STAND_IN``.
Blocks in other languages (``text``, ``json``) show what is printed or written.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from families import bpe
from markdown_it import MarkdownIt
from stand_in import save_stand_in
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import laserlm
from laserlm.cli import app
from laserlm.cli import demo as demo_command
from laserlm.export import load_in_subprocess
from laserlm.paths import cache_folder

Run = Callable[..., tuple[int, str, str]]
Load = Callable[..., laserlm.LanguageModel]

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "examples/cluster/README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "python", "text", "json", "jsonl", "yaml"}

WIDTH = 4
"""Candidates that a search's screen sends on."""
TEXT_LENGTH = 4_500
"""Characters that are kept of a text that a page makes."""
PASSAGE_LENGTH = 120
"""Characters of a passage whose perplexity is measured, and of the text before it."""
GUARD = {"PASSAGES": 8, "PASSAGE_TOKENS": 16}
"""Size of the text that a model writes for a search, on which the harm of a reduction is measured."""
SHORT = {
    "search --config": "--limit 12",  # its file names the strategy
    "search bundled --task web-of-lies": f"--limit 6 --width {WIDTH}",
    "search": f"--limit 12 --width {WIDTH}",
    "evaluate bundled --task humaneval": "--limit 2 --new-tokens 32",
    "evaluate": "--limit 12",
    "sweep-layers": "--limit 6",
    "compress": "--tokens 512 --refine 2",
    "analyze controls": "--limit 12 --draws 1",
    "analyze components": "--limit 60",
    "analyze low-rank": "--limit 12",
    "analyze calibration": "--limit 60",
    "analyze generations": "--limit 12",
    "analyze paraphrases": "--limit 12",
    "analyze terms": "--limit 24",
    "analyze frequency": "--limit 60 --workers 1",
    "analyze side-effects": "--limit 6 --passages 1 --examples 3",
    "verify": "--limit 4",
    "lab noisy-recall": "--steps 20 --seeds 1",
    "lab sokoban train": "--steps 2 --levels 40",
    "lab sokoban evaluate": "--limit 4",
    "lab sokoban search": "--limit 4 --grid 1.fc_in@0.5",
}
GRID = "top2.all@0.75,0.1"
"""What a search of the bundled model looks through, unless it names a grid within the last two blocks.

Most of its time goes into decompositions, which all pages share then.
"""
ONLY_READ = {
    "--address auto": "needs a Ray cluster that is there already",
    "--executor ray --workers 2": "the block of Python after it does the same",
    "laser lm-eval --model laser": "the harness reads its task from the hub",
    "laser lab rank-constraint": "trains for a quarter of an hour; its parts are tested in tests/lab",
    "Qwen/Qwen2.5-7B-Instruct": "a model on the hub",
    "--task qa.csv": "writes answers for minutes; tests/tasks and tests/cli read such files",
    "--form gguf": "tests/export/test_gguf_file.py writes one",
    "laser chat": "reads lines from a terminal; tests/cli/test_chat.py types them",
}
ONLY_BUNDLED = {
    "laser.Ray(": "starts a cluster",
    "laser app": "starts a server in a process of its own",
    "laser lab ": "trains models of its own, or plays with them; neither model has a part in it",
    "noisy-recall/seed-0": "a model that the line before trains",
    "--task humaneval": "its problems are longer than what the stand-in takes",
    "laser setup": "checks the package that the bundled model comes in",
}
"""Commands and blocks that are run on the bundled model only, and why."""
ONLY_STAND_IN = {
    "laser compress bundled": "decomposes all matrices of the model, which takes a minute",
}
"""Commands that are only read on the bundled model, and why."""
REPEATING = ("docs/faq.md", "docs/nothing-helps.md", "docs/reproducing.md")
"""Pages that are run on the stand-in only, which saves four minutes. Most of their commands stand on other pages too."""
SMALLER = {"(11, 288, 570)": "(1, 16, 31)"}
"""What a block says of matrices as wide as the bundled model's, and what it says of the stand-in's."""
NARROWER = {"--type fc_in --type fc_out": "--type v_proj --type k_proj"}
"""Large matrices of the bundled model that a command decomposes, and small ones that it decomposes here."""
FRESH = "docs/quickstart.md"
"""The page whose saved model is loaded in a fresh process on the stand-in too."""
ELSEWHERE = {
    "pipx": "make wheel",
    "uvx": "would fetch PyTorch once more, for a cache of its own",
}
CAPITALS = {"France": "Paris", "Norway": "Oslo", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Japan": "Tokyo"}
TEXT = "The river rises in the hills and flows to the sea. In spring the water is high and the fields lie under it.\n"


def blocks(page: str) -> Iterator[tuple[int, str, str]]:
    """Return line, language and content of every block of code."""
    for token in MarkdownIt().parse((ROOT / page).read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            yield token.map[0] + 1, token.info.strip(), token.content


def commands(content: str) -> Iterator[str]:
    """Return the commands of laser one by one, and what stands between them as scripts for the shell."""
    others: list[str] = []
    for line in re.sub(r"\\\n\s*", "", content).splitlines():
        plain = re.match(r"(laser|pip|make|pipx|uvx) ", line) and not re.search(r"[|>&]", line)
        if plain or not line.strip():
            yield from ["\n".join(others)] * bool(others)
            others = []
            yield from [line] * bool(plain)
        else:
            others.append(line)
    yield from ["\n".join(others)] * bool(others)


def setting_up(command: str) -> bool:
    """Tell whether a command is one of pip or make, which is tried without a page and without a model."""
    return command.startswith(("pip ", "make "))


@cache
def command_line() -> Any:
    """Return the whole command line, built once."""
    return typer.main.get_command(app)


def options_of(words: list[str]) -> set[str]:
    """Return the options of the command that words of a command line name; raises where there is no such command."""
    command = command_line()
    for word in words:
        if not hasattr(command, "commands") or word.startswith("-"):
            break
        if word not in command.commands:
            raise AssertionError(f"no command {word!r} in {' '.join(words)!r}")
        command = command.commands[word]
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def parse(words: list[str]) -> None:
    """Let the command line read its arguments without running anything; exits where it cannot."""
    command = command_line()
    context = None
    while hasattr(command, "commands"):
        name, *words = words
        if name not in command.commands:
            raise AssertionError(f"no command {name!r}")
        context = command.make_context("laser", [name], parent=context, resilient_parsing=True)
        command = command.commands[name]
    command.make_context("laser", words, parent=context)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    for line, language, content in blocks(page):
        assert language in LANGUAGES, f"{page}:{line}: a block without a language is not run: {content[:60]!r}"
        if language in ("text", "yaml") and page != "README.md":
            assert not re.search(r"(?m)^(laser|pip install) ", content), f"{page}:{line}: a command that is not run"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_have_the_options_that_they_are_given(page: str) -> None:
    for token in MarkdownIt().enable("table").parse((ROOT / page).read_text(encoding="utf-8")):
        for child in token.children or []:
            if child.type == "code_inline" and child.content.startswith("laser ") and "|" not in child.content:
                words = child.content.split()[1:]
                if words[0] != "lm-eval" and words[0].islower():
                    options = {word.partition("=")[0] for word in words if word.startswith("--")}
                    assert options <= options_of(words), f"{page}: {child.content}"


def test_examples_of_the_help_are_what_the_commands_take() -> None:
    def commands(command: Any) -> Iterator[Any]:
        yield command
        for one in getattr(command, "commands", {}).values():
            yield from commands(one)

    examples = [
        shlex.split(line)[1:]
        for command in commands(command_line())
        for line in re.findall(r"^Example: (laser .*)$", command.help or "", re.MULTILINE)
    ]
    assert len(examples) > 30
    for words in examples:
        if words[0] != "lm-eval":  # the harness reads them
            parse(words)


@dataclass(frozen=True)
class Named:
    """What the word ``bundled`` stands for while a page is run.

    Args:
        cache: the cache folder that holds the converted model.
        load: ``laserlm.load``, which loads that model once in all.
        real: whether it is the bundled model itself.
    """

    cache: Path
    load: Load
    real: bool


@pytest.fixture(scope="session")
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Named]:
    """The stand-in or the bundled model, loaded and hashed once; after all pages its weights are what they were."""
    real = request.param == "bundled"
    lm: laserlm.LanguageModel
    if real:
        lm = request.getfixturevalue("bundled")
    else:
        folder = tmp_path_factory.mktemp("stand-in") / "laserlm"
        save_stand_in(folder)
        lm = laserlm.load("bundled", cache=folder)
    before = lm.hash
    load_anew = laserlm.load
    loaded: dict[tuple[object, ...], laserlm.LanguageModel] = {(): lm}

    def load(name: str | Path, **options: Any) -> laserlm.LanguageModel:
        asked = tuple(sorted((key, value) for key, value in options.items() if key != "cache" and value not in (None, False)))
        if str(name) != "bundled" or Path(options.get("cache") or cache_folder()) != lm.cache:
            return load_anew(name, **options)
        if asked not in loaded:
            loaded[asked] = load_anew(name, **options)
        return loaded[asked]

    yield Named(lm.cache, load, real)
    assert lm.hash == before
    for one in loaded.values():
        assert not one.active
        assert replace(one).hash == one.hash  # the copy knows no hash, and computes it


@pytest.fixture(scope="session")
def searched(named: Named, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results database with one small search whose choice changes something."""
    store = tmp_path_factory.mktemp("docs") / "runs.db"
    task = laserlm.task("worldfacts")
    task = replace(task, validation=task.validation.limit(60), test=task.test.limit(30))
    lm = named.load("bundled", cache=named.cache)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in GUARD.items():
            patch.setattr(f"laserlm.searching.guard.{name}", size)
        result = laserlm.search(lm, task, metric="loss", grid="28-29.v_proj@0.05,0.75", store=store)
    assert result.best
    return store


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models by the names of those of the hub that pages name."""
    folder = tmp_path_factory.mktemp("hub")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 12, "intermediate_size": 48}
    tiny(folder / "EleutherAI" / "pythia-160m", "gpt_neox", **sizes)
    tiny(folder / "EleutherAI" / "gpt-j-6b", "gptj", n_embd=32, n_head=4, n_layer=28, rotary_dim=4)
    return folder


@pytest.fixture
def place(page: str, named: Named, searched: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a page, and shorter searches and tasks for its blocks of Python."""
    folder = tmp_path / "work"
    shutil.copytree(hub, folder)
    (folder / "texts").mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    facts = [(f"The capital of {country} is", city, country) for country, city in CAPITALS.items()]
    facts += [(f"{city} is the capital of", country, city) for country, city in CAPITALS.items()]
    rows = [{"prompt": prompt, "answer": answer, "subject": subject} for prompt, answer, subject in facts]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("corpus.txt", "general.txt", "texts/one.txt"):
        (folder / name).write_text(TEXT * 40 + "\n\nParis is the capital of France.\n")
    for name in ("counterfact.json", "counterfact_500.json"):
        # Several times, for a choice of components needs validation questions of several records.
        (folder / name).write_text(json.dumps([record(n, *fact) for n, fact in enumerate([*CAPITALS.items()] * 3)]))
    (folder / "paper_dev.jsonl").write_text(
        "".join(
            json.dumps({"id": n, "claim": f"{city} lies in {country}.", "label": "SUPPORTS" if n % 2 else "REFUTES"}) + "\n"
            for n, (country, city) in enumerate(CAPITALS.items())
        )
    )
    shutil.copy(searched, folder.parent / "runs.db")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LASER_STORE", str(folder.parent / "runs.db"))
    monkeypatch.setenv("LASER_CACHE", str(named.cache))
    monkeypatch.setenv("XDG_CACHE_HOME", str(named.cache.parent))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("LASER_DATA", raising=False)
    whole = laserlm.task

    def few(*arguments: Any, **named: Any) -> laserlm.Task:
        result = whole(*arguments, **named)
        return replace(result, validation=result.validation.limit(12), test=result.test.limit(12))

    search = laserlm.search

    def narrow(*arguments: Any, **named: Any) -> laserlm.SearchResult:
        if len(arguments) > 2:  # the settings of a command
            return search(*arguments, **named)
        usual = {} if "grid" in named else {"strategy": "strengths"}
        if "max_harm" in named:  # the demo's; strengths need more questions to change anything
            named |= {"strategy": "race", "max_harm": None}
        width = {} if (usual | named).get("strategy") == "strengths" else {"candidates": WIDTH}
        return search(*arguments, **{"grid": GRID} | width | usual | named)

    monkeypatch.setattr(laserlm, "search", narrow)
    monkeypatch.setattr("laserlm.searching.search", narrow)
    monkeypatch.setattr(laserlm, "task", few)
    monkeypatch.setattr(laserlm, "load", named.load)
    monkeypatch.setattr("laserlm.models.load", named.load)
    # The lab's own sizes take minutes; its figures are tested in tests/lab.
    monkeypatch.setattr("laserlm.lab.recall.study.N_SEQUENCES", 100)
    monkeypatch.setattr("laserlm.lab.recall.study.GRID", "1.all@0,0.5")
    monkeypatch.setattr("laserlm.lab.sokoban.training.N_HELD_OUT", 60)
    monkeypatch.setattr(demo_command, "N_VALIDATION", 12)
    monkeypatch.setattr(demo_command, "N_TEST", 12)
    for name, size in GUARD.items():
        monkeypatch.setattr(f"laserlm.searching.guard.{name}", size)
    for name in ("PASSAGE_CHARACTERS", "CONTEXT_CHARACTERS"):
        monkeypatch.setattr(f"laserlm.tasks.perplexity.{name}", PASSAGE_LENGTH)
    return folder


def record(number: int, country: str, city: str) -> dict[str, Any]:
    """A record in CounterFact's schema."""
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Sylvania", "id": "Q2"},
            "target_true": {"str": city, "id": "Q1"},
            "subject": country,
        },
        "paraphrase_prompts": [f"{country} is governed from", f"The government of {country} sits in"],
    }


def tiny(folder: Path, family: str, **sizes: int) -> None:
    """Put a tiny model where the page names one of the hub's, so that ``from_pretrained`` takes it."""
    torch.manual_seed(0)
    tokenizer = bpe({"eos_token": "<eos>"})
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=512, **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def runnable() -> list[str]:
    """Return the pages with something to run, the cluster's apart, whose commands are for other machines."""
    pages = [page for page in PAGES if page.startswith(("README", "docs"))]
    return [page for page in pages if any(language in ("sh", "python") for _, language, _ in blocks(page))]


@pytest.mark.filterwarnings("default")  # those of other libraries' commands; laserlm's own are errors in its own tests
@pytest.mark.parametrize(
    ("named", "page"),
    [("stand-in", page) for page in runnable()]
    + [
        pytest.param("bundled", page, marks=[pytest.mark.slow, pytest.mark.bundled])
        for page in runnable()
        if page not in REPEATING
    ],
    indirect=["named"],
)
def test_every_command_and_every_block_of_a_page_runs(
    page: str, place: Path, named: Named, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not named.real and page != FRESH:
        monkeypatch.setattr(subprocess, "run", load_here(subprocess.run))
    names: dict[str, Any] = {"__name__": "__main__"}
    for line, language, content in blocks(page):
        where = f"{page}:{line}"
        if language == "python" and (named.real or not any(words in content for words in ONLY_BUNDLED)):
            for wide, narrow in SMALLER.items() if not named.real else ():
                content = content.replace(wide, narrow)
            exec(compile("\n" * line + content, str(ROOT / page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        elif language == "sh":
            for command in commands(content):
                do(command, run, where, real=named.real)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=[pytest.mark.slow] if line.startswith("pip") else [])
        for line in sorted(
            {
                command.partition(" #")[0].strip()
                for page in runnable()
                for _, language, content in blocks(page)
                if language == "sh"
                for command in commands(content)
                if setting_up(command)
            }
        )
    ],
)
def test_every_line_that_installs_or_makes_is_one_that_the_tool_takes(line: str) -> None:
    tool, *words = shlex.split(line)
    dry = {
        "make": ["make", "-n"],
        "pip": [sys.executable, "-m", "pip", "install", "--dry-run", "--no-build-isolation", "--quiet"],
    }
    done = subprocess.run([*dry[tool], *words[tool == "pip" :]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def do(command: str, run: Run, where: str, *, real: bool) -> None:
    """Run one command of a page."""
    label = f"{where}: {command}"
    words = shlex.split(command, comments=True)
    if setting_up(command) or words[0] in ELSEWHERE:
        return
    if words[0] != "laser":
        process = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, check=False)
        assert process.returncode == 0, f"{label}\n{process.stderr}"
        for text in Path().glob("*.txt"):
            text.write_text(text.read_text(encoding="utf-8")[:TEXT_LENGTH], encoding="utf-8")
    elif any(words_of in command for words_of in ONLY_READ | (ONLY_STAND_IN if real else ONLY_BUNDLED)):
        if words[1] != "lm-eval":
            parse(words[1:])
    elif words[1] == "app":
        served([*words[1:], "--port", "0"], label)
    else:
        for wide, narrow in NARROWER.items() if real else ():
            words = shlex.split(shlex.join(words).replace(wide, narrow))
        code, _, err = run(*words[1:], *short(words[1:], whole=not real))
        assert code == 0, f"{label}\n{err}"


def load_here(start: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``subprocess.run``, but for loading a saved model alone, which is done in this process."""

    def run(command: list[str], **options: Any) -> Any:
        if str(load_in_subprocess.__file__) not in command:
            return start(command, **options)
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
            patch.setattr(sys, "argv", command[command.index(str(load_in_subprocess.__file__)) :])
            load_in_subprocess.main()
        return subprocess.CompletedProcess(command, 0, output.getvalue(), "")

    return run


def short(words: list[str], *, whole: bool) -> list[str]:
    """Return the options that make a command quick; a later option holds where one is given twice."""
    merged = " ".join(words)
    if "--strategy exhaustive" in merged or "perplexity:" in merged:
        return ["--limit", "2", *(["--grid", "29.v_proj@0.75"] if words[0] == "search" else [])]
    is_wide = not re.search(r"--grid 2[89]\.", merged)
    grid = ["--grid", GRID] if merged.startswith("search bundled") and is_wide and not whole else []
    takes_default = words[0] == "search" and "--strategy" not in merged and "--grid" not in merged
    options = next((options.split() for start, options in SHORT.items() if merged.startswith(f"{start} ")), [])
    scales = "--strategy strengths" in merged
    if scales or (takes_default and grid):  # else a race
        width = options.index("--width")
        strategy = [] if scales else ["--strategy", "strengths"]
        return [*options[:width], *options[width + 2 :], *grid, *strategy]
    return [*options, *grid]


def served(words: list[str], message: str) -> None:
    """Start the app, ask it for its page, and end it."""
    code = "from laserlm.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            with urllib.request.urlopen(process.stdout.readline().strip(), timeout=60) as reply:
                assert reply.status == 200, message
        finally:
            process.terminate()
