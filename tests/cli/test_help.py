from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from laserlm.cli import app

WORDS = 10
"""Words of an option's help at most, without its default."""


def commands(command: Any, names: tuple[str, ...] = ()) -> Iterator[Any]:
    if not hasattr(command, "commands"):
        yield pytest.param(command, id=" ".join(names))
        return
    for name, part in command.commands.items():
        yield from commands(part, (*names, name))


@pytest.mark.parametrize("command", list(commands(typer.main.get_command(app))))
def test_every_command_is_documented_with_an_example_and_short_helps(command: Any, request: pytest.FixtureRequest) -> None:
    assert f"Example: laser {request.node.callspec.id}" in (command.help or "")
    for parameter in command.params:
        text = parameter.help or ""
        assert text or parameter.hidden, parameter.name
        assert len(re.split(r"; default[:.]", text)[0].split()) <= WORDS, text
