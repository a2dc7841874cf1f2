"""``laser chat``: base and edited model reply side by side, each with its own history."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from laserlm.cli import main
from laserlm.edit import applied
from laserlm.models import load
from laserlm.scoring.generation import generate_for
from laserlm.tasks import Decoding, Example

Run = Callable[..., tuple[int, str, str]]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SPEC = "all.all@0.2"


@pytest.fixture
def chat_folder(folder: Path) -> Path:
    """A tiny model with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def ask(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_each_line_is_a_question_and_each_side_has_its_own_history(
    run: Run, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(monkeypatch, "The capital of France?", "", "And of Italy?", "/reset", "And of Italy?")
    code, out, err = run("chat", chat_folder, "--reduce", SPEC, "--max-new-tokens", 4, "--system", "Be short.")
    assert (code, err) == (0, "The conversation is forgotten.\n")

    lm = load(str(chat_folder))

    def replies(*questions: str, spec: str) -> list[str]:
        messages, texts = [("system", "Be short.")], []
        for question in questions:
            messages.append(("user", question))
            example = Example("q", question, "", messages=tuple(messages), needs_template=True)
            with applied(lm, spec):
                ((text,),) = generate_for(lm, [example], Decoding(new_tokens=4))
            texts.append(text.strip())
            messages.append(("assistant", text.strip()))
        return texts

    first, second, last = ("base: {}\nedited: {}\n" for _ in range(3))
    questions = ("The capital of France?", "And of Italy?")
    turns = zip(replies(*questions, spec=""), replies(*questions, spec=SPEC), strict=True)
    expected = "".join(text.format(*turn) for text, turn in zip((first, second), turns, strict=True))
    again = replies("And of Italy?", spec="") + replies("And of Italy?", spec=SPEC)
    assert out == expected + last.format(*again)


@pytest.mark.parametrize(("width", "same_line"), [("120", True), ("80", False)])
def test_a_wide_terminal_shows_the_replies_in_columns_and_a_narrow_one_below_each_other(
    chat_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    width: str,
    same_line: bool,
) -> None:
    ask(monkeypatch, "The capital of France?", "/quit", "Never asked")
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    for name, value in (("COLUMNS", width), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["laser", "chat", str(chat_folder), "--reduce", SPEC, "--max-new-tokens", "2"])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert not left.value.code
    assert "base and edited by all.all@0.2" in err
    heads = [line for line in out.splitlines() if "base" in line]
    assert heads
    assert all(("edited" in line) == same_line for line in heads)
    assert "edited" in out
    assert out.count("> ") == 2


def test_ctrl_c_ends_the_conversation_without_an_error(run: Run, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        def readline(self, *_: object) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    assert run("chat", chat_folder) == (0, "", "")


def test_a_question_beyond_the_context_is_left_out(run: Run, chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "The capital of France? " * 100, "And of Italy?")
    code, out, err = run("chat", chat_folder, "--max-new-tokens", 2)
    assert code == 0
    assert "Ask for fewer new tokens" in err
    assert "/reset starts again" in err
    assert out.startswith("base: ")
    assert out.count("base: ") == 1


@pytest.mark.slow
def test_the_run_of_a_search_replies(
    run: Run, finished_search: tuple[str, Path], chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    id_, store = finished_search
    ask(monkeypatch, "The capital of France?")
    code, out, err = run("chat", chat_folder, "--run", id_, "--store", store, "--max-new-tokens", 2)
    assert code == 0, err
    assert [line.partition(":")[0] for line in out.splitlines() if ": " in line] == ["base", "edited"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 1, "has no chat template, so it cannot hold a conversation. Let it continue a text: laser generate"),
        (("--run", "last", "--reduce", SPEC), 2, "exclude each other"),
        (("--temperature", "0"), 2, "leave it out for greedy replies"),
    ],
)
def test_what_cannot_chat_is_refused(run: Run, folder: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    result, _, err = run("chat", folder, *arguments)
    assert result == code
    assert message in " ".join(err.replace("│", " ").split())
