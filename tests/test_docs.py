"""Every command line and every block of Python in the README and the documentation is run, page by page, as a reader would.

A page has a working folder of its own with the files that its text takes for granted, and its blocks are run in order. What
takes long is run on fewer questions (``SHORT``); what cannot be run here is read by the command line's own parser, and stands
in ``ONLY_READ`` with the reason. Blocks in other languages (``text``, ``json``) show what is printed or written.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from families import bpe
from markdown_it import MarkdownIt
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import laserlm
from laserlm.cli import app
from laserlm.cli import search as search_command
from laserlm.paths import cache_folder

Run = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "examples/cluster/README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
CACHE = cache_folder()  # before a fixture moves it: the bundled model is converted once
LANGUAGES = {"sh", "python", "text", "json", "jsonl", "yaml"}

SHORT = {
    "search": "--limit 12 --width 4",
    "evaluate": "--limit 12",
    "sweep-layers": "--limit 6",
    "compress": "--tokens 2048",
    "analyze controls": "--limit 12 --draws 1",
    "analyze components": "--limit 60",
    "analyze low-rank": "--limit 12",
    "analyze calibration": "--limit 60",
    "analyze generations": "--limit 12",
    "analyze frequency": "--limit 60 --workers 1",
    "analyze side-effects": "--limit 12 --passages 1 --examples 6",
    "verify": "--limit 4",
    "lab noisy-recall": "--steps 20 --seeds 1",
    "lab sokoban train": "--steps 2 --levels 40",
    "lab sokoban evaluate": "--limit 4",
    "lab sokoban search": "--limit 4 --grid 1.fc_in@0.5",
}
ONLY_READ = {
    "--address auto": "needs a Ray cluster that is there already",
    "laser lm-eval --model laser": "the harness reads its task from the hub",
    "laser lab rank-constraint": "trains for a quarter of an hour; its parts are tested in tests/lab",
    "Qwen/Qwen2.5-7B-Instruct": "a model on the hub",
}
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


def options_of(words: list[str]) -> set[str]:
    """Return the options of the command that words of a command line name; raises where there is no such command."""
    command: Any = typer.main.get_command(app)
    for word in words:
        if not hasattr(command, "commands") or word.startswith("-"):
            break
        if word not in command.commands:
            raise AssertionError(f"no command {word!r} in {' '.join(words)!r}")
        command = command.commands[word]
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def parse(words: list[str]) -> None:
    """Let the command line read its arguments without running anything; exits where it cannot."""
    command: Any = typer.main.get_command(app)
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
                    given = {word.partition("=")[0] for word in words if word.startswith("--")}
                    assert given <= options_of(words), f"{page}: {child.content}"


def test_examples_of_the_help_are_what_the_commands_take() -> None:
    def commands(command: Any) -> Iterator[Any]:
        yield command
        for one in getattr(command, "commands", {}).values():
            yield from commands(one)

    examples = [
        shlex.split(line)[1:]
        for command in commands(typer.main.get_command(app))
        for line in re.findall(r"^Example: (laser .*)$", command.help or "", re.MULTILINE)
    ]
    assert len(examples) > 30
    for words in examples:
        if words[0] != "lm-eval":  # the harness reads them
            parse(words)


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results database with one small search whose choice changes something."""
    store = tmp_path_factory.mktemp("docs") / "runs.db"
    command = "search bundled --task worldfacts --limit 120 --metric loss --grid 28-29.v_proj@0.05,0.75 --cache"
    subprocess.run(
        [sys.executable, "-c", "from laserlm.cli import main; main()", *command.split(), CACHE, "--store", store],
        check=True,
        capture_output=True,
    )
    return store


@pytest.fixture
def place(tmp_path: Path, searched: Path, monkeypatch: pytest.MonkeyPatch, bundled: object) -> Path:
    """The working folder of a page."""
    folder = tmp_path / "work"
    (folder / "texts").mkdir(parents=True)
    facts = [(f"The capital of {country} is", city, country) for country, city in CAPITALS.items()]
    facts += [(f"{city} is the capital of", country, city) for country, city in CAPITALS.items()]
    rows = [{"prompt": prompt, "answer": answer, "subject": subject} for prompt, answer, subject in facts]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("corpus.txt", "general.txt", "texts/one.txt"):
        (folder / name).write_text(TEXT * 200 + "\n\nParis is the capital of France.\n")
    for name in ("counterfact.json", "counterfact_500.json"):
        (folder / name).write_text(json.dumps([record(n, *fact) for n, fact in enumerate(CAPITALS.items())]))
    (folder / "paper_dev.jsonl").write_text(
        "".join(
            json.dumps({"id": n, "claim": f"{city} lies in {country}.", "label": "SUPPORTS" if n % 2 else "REFUTES"}) + "\n"
            for n, (country, city) in enumerate(CAPITALS.items())
        )
    )
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 12, "intermediate_size": 48}
    tiny(folder / "EleutherAI" / "pythia-160m", "gpt_neox", **sizes)
    tiny(folder / "EleutherAI" / "gpt-j-6b", "gptj", n_embd=32, n_head=4, n_layer=28, rotary_dim=4)
    shutil.copy(searched, folder.parent / "runs.db")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LASER_STORE", str(folder.parent / "runs.db"))
    monkeypatch.setenv("LASER_CACHE", str(CACHE))
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE.parent))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("LASER_DATA", raising=False)
    whole = laserlm.task

    def few(*given: Any, **named: Any) -> laserlm.Task:
        made = whole(*given, **named)
        return replace(made, validation=made.validation.limit(12), test=made.test.limit(12))

    monkeypatch.setattr(laserlm, "task", few)
    monkeypatch.setattr(search_command, "DEMO_VALIDATION", 36)
    monkeypatch.setattr(search_command, "DEMO_TEST", 24)
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
    tokenizer = bpe({"eos_token": "<eos>"})
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=512, **sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.bundled
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of other libraries' commands; laserlm's own are errors in its own tests
@pytest.mark.parametrize(
    "page",
    [
        p
        for p in PAGES
        if p.startswith(("README", "docs")) and any(language in ("sh", "python") for _, language, _ in blocks(p))
    ],
)
def test_every_command_and_every_block_of_a_page_runs(page: str, place: Path, run: Run) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for line, language, content in blocks(page):
        where = f"{page}:{line}"
        if language == "python":
            exec(compile("\n" * line + content, str(ROOT / page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
        elif language == "sh":
            for command in commands(content):
                do(command, run, where)


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


def do(command: str, run: Run, where: str) -> None:
    """Run one command of a page."""
    said = f"{where}: {command}"
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        made = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert made.returncode == 0, f"{said}\n{made.stderr}"
    elif words[0] == "pip":
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-build-isolation", "--quiet"]
        made = subprocess.run([*pip, *words[2:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert made.returncode == 0, f"{said}\n{made.stderr}"
    elif words[0] in ELSEWHERE:
        return
    elif words[0] != "laser":
        made = subprocess.run(["bash", "-euo", "pipefail", "-c", command], capture_output=True, text=True, check=False)
        assert made.returncode == 0, f"{said}\n{made.stderr}"
    elif any(words_of in command for words_of in ONLY_READ):
        if words[1] != "lm-eval":
            parse(words[1:])
    elif words[1] == "app":
        served([*words[1:], "--port", "0"], said)
    else:
        code, _, err = run(*words[1:], *short(words[1:]))
        assert code == 0, f"{said}\n{err}"


def short(words: list[str]) -> list[str]:
    """Return the options that make a command quick; a later option holds where one is given twice."""
    if "--dry-run" in words:
        return []
    joined = " ".join(words)
    if "--strategy exhaustive" in joined or "perplexity:" in joined:
        return ["--limit", "2", *(["--grid", "29.v_proj@0.75"] if words[0] == "search" else [])]
    return next((options.split() for start, options in SHORT.items() if joined.startswith(f"{start} ")), [])


def served(words: list[str], said: str) -> None:
    """Start the app, ask it for its page, and end it."""
    code = "from laserlm.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            with urllib.request.urlopen(process.stdout.readline().strip(), timeout=60) as reply:
                assert reply.status == 200, said
        finally:
            process.terminate()
