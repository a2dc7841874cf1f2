"""Numbers that options cannot read: what the error says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from cli.test_config_file import read
from cli.test_help import commands

from laserlm.cli import app
from laserlm.cli.numbers import SHARES, NumberErrorGroup, number_hint
from laserlm.errors import LaserError

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("search", "--max-harm", "5%"), "--max-harm': '5%' is not a number; a share is written as a fraction: 0.05"),
        (("search", "--memory", "1,5"), "--memory': '1,5' is not a number; write 1.5"),
        (("search", "--max-harm", "little"), "--max-harm': 'little' is not a number"),
        (("search", "--memory", "5%"), "--memory': '5%' is not a number"),
        (("search", "--memory", "1,000"), "'1,000' is not a number; write it without a comma, and decimals after a point"),
        (("compress", "--tokens", "16,384"), "--tokens': '16,384' is not a whole number; write 16384"),
        (("compress", "--measure", "33.3333333%"), "is not a number; a share is written as a fraction: 0.333333333"),
        (("search", "--limit", "10%"), "--limit': '10%' is not a whole number"),
        (("search", "--keep", "34"), "--keep': 34 is more than 1, the most that is allowed"),
        (("search", "--limit", "0"), "--limit': 0 is less than 1, the least that is allowed"),
        (("compress", "--ratio", "80 %"), "--ratio': '80 %' is not a number; a share is written as a fraction: 0.8"),
        (("lab", "noisy-recall", "--steps", "x"), "--steps': 'x' is not a whole number"),
    ],
)
def test_the_error_names_the_text_and_how_it_is_written(arguments: tuple[str, ...], expected: str, run: Run) -> None:
    model = () if arguments[0] == "lab" else ("bundled", "--out", "out") if arguments[0] == "compress" else ("bundled",)
    code, _, err = run(*arguments[:-2], *model, *arguments[-2:])
    said = " ".join(err.replace("│", " ").split())
    assert code == 2
    assert f"{expected} ╰" in said


def test_other_errors_stay_as_they_are(run: Run) -> None:
    code, _, err = run("search", "bundled", "--executor", "cloud")
    assert (code, "no executor 'cloud'; there are local and ray" in err) == (2, True)


@pytest.mark.parametrize(("kind", "expected"), [("float", "; a share is written as a fraction: 0.05"), ("integer", "")])
def test_messages_of_older_parsers_are_read_too(kind: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    option: Any = SimpleNamespace(name="max_harm")

    def fail(*_: object) -> None:
        raise typer.BadParameter(f"'5%' is not a valid {kind}.", param=option)

    monkeypatch.setattr("typer.core.TyperGroup.invoke", fail)
    with pytest.raises(typer.BadParameter) as raised:
        NumberErrorGroup(name="laser").invoke(None)
    assert raised.value.message == f"'5%' is not a {'whole ' * (kind == 'integer')}number{expected}"


def test_a_configuration_says_the_same(tmp_path: Path) -> None:
    with pytest.raises(LaserError, match=r"limit is '1,000', but must be a whole number from 1; write 1000$"):
        read("limit: 1,000", tmp_path / "limit.yaml")
    with pytest.raises(LaserError, match=r"memory is '5%', but must be a number from 0$"):
        read("memory: 5%", tmp_path / "memory.yaml")
    with pytest.raises(LaserError, match=r"max_harm is '5%', but must be a number; a share is written as a fraction: 0\.05"):
        read("max_harm: 5%", tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("0.5%", "0.005"),
        ("-5 %", "-0.05"),
        ("100%", "1"),
        ("33.3333333%", "0.333333333"),
        ("0,125", "0.125"),
        (".5", ""),
        ("1e-3", ""),
        ("5%%", ""),
        ("1.000,5", ""),
        ("%", ""),
    ],
)
def test_only_a_text_that_means_a_number_is_written_as_one(text: str, written: str) -> None:
    assert number_hint(text, "ratio").rpartition(" ")[2] == written


@pytest.mark.parametrize("text", ["1,000", "16,384", "-1,000,000", "1,000%"])
def test_a_comma_that_may_stand_between_thousands_is_not_made_a_point(text: str) -> None:
    assert number_hint(text, "ratio") == "; write it without a comma, and decimals after a point"


@pytest.mark.parametrize(("text", "written"), [("16,384", "; write 16384"), ("1,5", ""), ("10%", ""), ("1.000", "")])
def test_a_whole_number_is_written_without_commas(text: str, written: str) -> None:
    assert number_hint(text, "tokens", is_whole=True) == written


def test_only_options_that_are_shares_are_given_in_per_cent() -> None:
    names = {option.name for command in commands(typer.main.get_command(app)) for option in command.values[0].params}
    assert names > SHARES
    assert number_hint("5%", "memory") == ""
