"""Whatever a parser is given, it returns a value or raises a LaserError. The inputs are the same in every run.

``scripts/fuzz.sh`` tries more of them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from safetensors.torch import save

from laserlm.cli.config_file import option_types, read_configuration
from laserlm.cli.search import NOT_CONFIGURED, search
from laserlm.errors import LaserError
from laserlm.export.record import read_record
from laserlm.models.weight_files import read_tensor, stored_tensors
from laserlm.reductions import Grid, Intervention, Layers, Size, short_form
from laserlm.searching import SearchConfig
from laserlm.tasks import task
from laserlm.web.submissions import find_problems, load_submission

set_hypothesis_home_dir(tempfile.mkdtemp(prefix="laser-hypothesis-"))  # no test writes where it is started
QUICK, SLOW = 200, int(os.environ.get("LASER_FUZZ", "10000"))

REDUCTIONS = ("27.fc_in@0.01", "20-27.mlp@0.1:bottom", "all.fc_out@r40:reference", "encoder.3.q_proj@0.5:split4+top4.all@1")
GRIDS = ("all.all@0.5,0.1", "0-3.mlp@r4,r8:bottom+top2.attention@0.9", "*.*@*", "all.all@0.5;all.all@0.1")
QUESTIONS = (
    b"".join(b'{"id": "%c", "prompt": "The capital of France is", "answer": "Paris"}\n' % i for i in b"abc"),
    b'{"prompt": "2 + 2 =", "answer": "4", "choices": ["4", "5"], "group": "sums"}\n' * 3,
)
TABLES = (b"prompt,answer\n" + b"The capital of France is,Paris\n" * 3, b'id;prompt;answer\n1;"a\nb";c\n2;d;e\n')
CONFIGURATIONS = (
    b"grid: 1.mlp@0.5\ntask: worldfacts\nlimit: 3\nguard: [self, a.txt]\nmax_harm: 0.05\n",
    b"{chat: true, keep: 0.5}",
)
OPTIONS = option_types(search, NOT_CONFIGURED)
RECORD = {
    "format": 1,
    "base": {"name": "gpt2", "revision": None, "kind": "causal"},
    "dtype": {"base": "float32"},
    "matrices": [],
}
FILE = {"schema": "laserlm.reductions", "version": 1, "reductions": ["27.fc_in@0.01"]}
SUBMISSION: dict[str, Any] = {
    "format": 1,
    "method": "LASER",
    "model": {"name": "some/model", "sha256": "a" * 64},
    "task": {"name": "worldfacts", "scorer": "answer", "validation": "c" * 64, "test": "d" * 64},
    "intervention": "1.fc_in@0.5",
    "result": {
        "n": 1000,
        "base": {"accuracy": 0.185, "loss": 3.5},
        "edited": {"accuracy": 0.215, "loss": 3.25},
        "gain": 0.03,
        "interval": [0.017, 0.045],
        "corrected": 40,
        "broken": 10,
    },
}
TENSORS = save({"a.weight": torch.ones(4, 3), "b": torch.zeros(2, dtype=torch.float16)})

Edits = list[tuple[int, int, Any]]


def edited(valid: Any, edits: Edits) -> Any:
    """Return a text or bytes in which pieces are replaced, left out, or put in."""
    for place, length, piece in edits:
        at = place % (len(valid) + 1)
        valid = valid[:at] + piece + valid[at + length :]
    return valid


def like(valid: Sequence[Any], pieces: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Return a strategy of lists of inputs: valid ones after one edit and more, and the pieces alone.

    Drawing takes longer than parsing, so the same edits serve for several inputs.
    """

    def inputs(edits: Edits) -> list[Any]:
        copies = [edited(one, edits[:n]) for one in valid for n in range(1, len(edits) + 1)]
        return [*copies, *(piece for _, _, piece in edits)]

    return st.lists(st.tuples(st.integers(0, 400), st.integers(0, 6), pieces), min_size=1, max_size=4).map(inputs)


def texts(valid: Sequence[str]) -> st.SearchStrategy[list[str]]:
    return like(valid, st.text(max_size=8) | st.text("0123456789.-@+:,;*rxe_ topallmlpsbf", max_size=20))


def contents(valid: Sequence[bytes]) -> st.SearchStrategy[list[bytes]]:
    return like(
        valid,
        st.binary(max_size=8) | st.sampled_from([b"\x00", b"\xff", b"{", b"]" * 5, b'"', b"NaN", b"1e999", b"\\ud800", b"\n"]),
    )


def values() -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    return st.recursive(
        plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=6
    )


def replaced(document: Any, changes: list[tuple[int, Any]]) -> Any:
    """Return a JSON document in which some values are others."""
    document = deepcopy(document)
    for number, value in changes:
        places = []

        def visit(node: Any, places: list[tuple[Any, Any]] = places) -> None:
            for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                places.append((node, key))
                visit(node[key])

        visit(document)
        if not places:
            return value
        node, key = places[number % len(places)]
        node[key] = deepcopy(value)
    return document


def documents(valid: Any) -> st.SearchStrategy[list[bytes]]:
    """Return a strategy of lists of JSON files that are almost this document, in its values or in its bytes."""

    def inputs(changes: list[tuple[int, Any]]) -> list[bytes]:
        each = [[change] for change in changes]
        return [json.dumps(replaced(valid, some)).encode() for some in (*each, changes)]

    changed = st.lists(st.tuples(st.integers(0, 99), values()), min_size=3, max_size=3).map(inputs)
    return changed | contents([json.dumps(valid).encode()])


def written(folder: Path, name: str, content: bytes) -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


def parse_reductions(_: Path, text: str) -> None:
    intervention = Intervention.parse(text)
    assert Intervention.parse(str(intervention)) == intervention
    short_form(text)


def parse_grid(_: Path, text: str) -> None:
    grid = Grid.parse(text)
    assert Grid.parse(str(grid)) == grid


def parse_parts(_: Path, text: str) -> None:
    for parse in (Layers.parse, Size.parse):
        try:
            part: Any = parse(text)
        except LaserError:
            continue
        assert parse(str(part)) == part


def configure(_: Path, given: dict[str, Any]) -> None:
    SearchConfig.of(**given)


def read_submission(folder: Path, content: bytes) -> None:
    load_submission(written(folder, "a.json", content))


def read_weights(folder: Path, content: bytes) -> None:
    file = written(folder, "model.safetensors", content)
    for name in stored_tensors(folder):
        read_tensor(file, name)


NUMBERS = st.integers() | st.floats()
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "effort": st.text(max_size=6),
        "grid": texts(GRIDS).map(lambda grids: grids[0]),
        "strategy": st.sampled_from(["race", "exhaustive", "compose", "components"]) | st.text(max_size=5),
        "metric": st.sampled_from(["accuracy", "loss"]) | st.text(max_size=5),
        "seed": st.integers(),
        "keep": NUMBERS,
        "delta": NUMBERS,
        "random_candidates": st.integers(),
        "unknown": st.none(),
    },
).map(lambda config: [config, *({key: value} for key, value in config.items())])
PARSERS: dict[str, tuple[st.SearchStrategy[list[Any]], Callable[[Path, Any], object]]] = {
    "reductions": (texts(REDUCTIONS), parse_reductions),
    "layers and sizes": (texts(("20-27", "top4", "all", "0.01", "r40")), parse_parts),
    "grids": (texts(GRIDS), parse_grid),
    "files of reductions": (documents(FILE), lambda folder, c: Intervention.read(f"@{written(folder, 'r.json', c)}")),
    "questions": (contents(QUESTIONS), lambda folder, c: task(f"jsonl:{written(folder, 'q.jsonl', c)}")),
    "tables of questions": (contents(TABLES), lambda folder, c: task(f"jsonl:{written(folder, 'q.csv', c)}")),
    "configs": (CONFIGS, configure),
    "configuration files": (contents(CONFIGURATIONS), lambda f, c: read_configuration(written(f, "run.yaml", c), OPTIONS)),
    "submissions": (documents(SUBMISSION), read_submission),
    "laser.json": (documents(RECORD), lambda folder, c: read_record(written(folder, "laser.json", c).parent)),
    "safetensors": (contents([TENSORS]), read_weights),
}


def try_inputs(name: str, number: int, folder: Path) -> None:
    """Let a parser read at least this many inputs."""
    inputs, act = PARSERS[name]
    tried = 0

    @settings(max_examples=number // 4, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def attempt(values: list[Any]) -> None:
        nonlocal tried
        for value in values:
            tried += 1
            with suppress(LaserError):
                act(folder, value)

    attempt()
    assert tried >= number


def test_the_inputs_that_are_edited_are_valid(tmp_path: Path) -> None:
    for valid in (*REDUCTIONS, *GRIDS[:2]):
        Grid.parse(valid)
    assert find_problems(SUBMISSION) == []
    for name, content in (("q.jsonl", QUESTIONS[0]), ("q.csv", TABLES[0])):
        assert len(task(f"jsonl:{written(tmp_path, name, content)}").every) == 3
    assert Intervention.read(f"@{written(tmp_path, 'r.json', json.dumps(FILE).encode())}")
    assert read_record(written(tmp_path, "laser.json", json.dumps(RECORD).encode()).parent) == RECORD
    read_weights(tmp_path, TENSORS)


EXTREMES = {
    "empty": b"",
    "deep": b"[" * 200_000,
    "deep in an object": b'{"format": ' + b'{"a": ' * 100_000,
    "long integer": b'{"format": ' + b"9" * 10_000 + b', "prompt": ' + b"9" * 10_000 + b"}",
    "no numbers": b'{"format": NaN, "prompt": Infinity, "version": -Infinity}',
    "half a pair": b'{"format": "\\ud800", "prompt": "\\ud800", "answer": "\\udfff"}',
    "no text": bytes(range(256)) * 10,
    "a list": b"[1, 2]",
    "a header of all memory": b"\xff" * 8 + b"{}",
    "zeros": bytes(10_000),
    "aliases": b"limit: [&a [x, x]%s]" % b"".join(b", &%c [*%c, *%c, *%c, *%c]" % (i + 1, i, i, i, i) for i in range(97, 121)),
}


@pytest.mark.parametrize("content", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize(
    "name", [name for name in PARSERS if name not in ("reductions", "layers and sizes", "grids", "configs")]
)
def test_extreme_files_are_reported(name: str, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(LaserError):
        PARSERS[name][1](tmp_path, content)


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_returns_or_raises_an_error_of_laserlm(name: str, tmp_path: Path) -> None:
    try_inputs(name, QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_stands_many_inputs(name: str, tmp_path: Path) -> None:
    try_inputs(name, SLOW, tmp_path)
