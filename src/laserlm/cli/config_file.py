"""The configuration of a search as a YAML file: the options of ``laser search`` by their names, with underscores."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml

from laserlm import __version__
from laserlm.cli.numbers import number_hint
from laserlm.cli.progress import print_stderr
from laserlm.errors import LaserError
from laserlm.paths import atomic_file, check_new_file
from laserlm.provenance import mask_credentials

NAMES = {
    str: "a text",
    Path: "a path",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of texts",
}
RESEMBLANCE = 0.6
"""Least likeness of a wrong key to the one that is proposed."""


def option_types(command: Callable[..., None], without: frozenset[str]) -> dict[str, inspect.Parameter]:
    """Return the options of a command by name, without those that no configuration holds."""
    return {name: p for name, p in inspect.signature(command).parameters.items() if name not in without}


def read_configuration(file: Path, options: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return the options that a file sets, by name.

    Args:
        file: YAML, a mapping of names to values. An option is not set where its value is null.
        options: what it may set, with annotations as for Typer.

    Raises:
        LaserError: if the file cannot be read, a key is unknown or occurs twice, or a value is of a wrong type.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise LaserError(f"cannot read the configuration {file}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: text in another encoding, or no such date
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or (str(error).splitlines() or ["it is nested too deeply"])[0]
        raise LaserError(f"{file}{where} is no YAML: {reason}; write one 'name: value' a line") from error
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise LaserError(f"{file} holds no options; write one 'name: value' a line, such as 'task: worldfacts'")
    keys = [key.value for key, _ in node.value]
    for key in values:
        if key not in options:
            raise LaserError(f"{file}: no option {reprlib.repr(key)}; {_nearest(str(key), options)}")
        if keys.count(key) > 1:
            raise LaserError(f"{file}: {key} occurs {keys.count(key)} times; delete all but one")
    return {key: _checked(file, key, value, options[key]) for key, value in values.items() if value is not None}


def _nearest(key: str, options: Mapping[str, inspect.Parameter]) -> str:
    """Return which option a wrong key may mean."""
    aliases = {name: name for name in options}
    for name, option in options.items():
        for declared in _typer_option(option).param_decls or ():
            aliases |= {part.lstrip("-").replace("-", "_"): name for part in declared.split("/")}
    near = get_close_matches(key.lower().lstrip("-").replace("-", "_"), aliases, 1, RESEMBLANCE)
    return f"did you mean {aliases[near[0]]!r}?" if near else "'laser search --help' lists the options"


def _typer_option(option: inspect.Parameter) -> Any:
    """Return what an annotation tells Typer of an option or argument."""
    return get_args(option.annotation)[1]


def _checked(file: Path, key: str, value: Any, option: inspect.Parameter) -> Any:
    """Return a value as the command takes it.

    Raises:
        LaserError: if it is of a wrong type or out of range.
    """
    hint = get_args(option.annotation)[0]
    hint = next((kind for kind in get_args(hint) if kind is not NoneType), hint) if get_origin(hint) is not list else hint
    kind = get_origin(hint) or hint
    result = _converted(value, kind)
    about = _typer_option(option)
    low, high = getattr(about, "min", None), getattr(about, "max", None)
    if result is None or result != result or (low is not None and result < low) or (high is not None and result > high):
        allowed = NAMES[kind]
        if kind in (int, float) and (low, high) != (None, None):
            allowed += f" from {low:g}" + ("" if high is None else f" to {high:g}")
        hint = number_hint(value, key, is_whole=kind is int) if kind in (int, float) else ""
        quotes = "; write it in quotes" if kind in (str, Path) and not isinstance(value, list | dict) else ""
        # Of aliases a short file makes a value whose text fills the memory.
        raise LaserError(f"{file}: {key} is {reprlib.repr(value)}, but must be {allowed}{hint}{quotes}")
    return result


def _converted(value: Any, kind: type) -> Any:
    """Return a value of YAML as a type of an option, or None if it is none."""
    if kind is float and isinstance(value, str):  # YAML reads 1e-3 as a text
        try:
            return float(value)
        except ValueError:
            return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is list:
        texts = [value] if isinstance(value, str) else value
        is_right = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
        return [_expanded(text) for text in texts] if is_right else None
    if kind in (str, Path):
        return _expanded(value) if isinstance(value, str) else None
    return value if type(value) is kind else None


def _expanded(text: str) -> str:
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def as_configuration(*groups: Any, **more: Any) -> dict[str, Any]:
    """Return the options of groups and more as plain values. What is not set is left out, and so are passwords."""
    values = more | {f.name: getattr(group, f.name) for group in groups for f in fields(group)}
    plain: dict[str, Any] = {}
    for name, value in values.items():
        text = str(value)
        if "://" in text and mask_credentials(text) != text:
            print_stderr(f"{name} holds a password and is not written into the configuration; give --{name.replace('_', '-')}")
        elif value is not None:
            plain[name] = text if isinstance(value, Path) else list(value) if isinstance(value, list | tuple) else value
    return plain


def configuration_yaml(values: Mapping[str, Any]) -> str:
    """Return options as the text of a file that ``laser search --config`` takes."""
    options = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=10_000)
    return f"# Configuration of a search by laserlm {__version__}; run it with: laser search --config FILE\n{options}"


def write_configuration(file: Path, values: Mapping[str, Any]) -> None:
    """Write options into a file, unless they are there already.

    Raises:
        WriteError: if the file cannot be written, or holds something else.
    """
    text = configuration_yaml(values)
    with suppress(OSError, ValueError):
        if file.read_text(encoding="utf-8") == text:
            return
    check_new_file(file, kind="this configuration", is_ours=lambda _: False)
    with atomic_file(file) as part:
        part.write_text(text, encoding="utf-8")
