"""Reductions and interventions: parse, print, canonical form, and files of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from laserlm.errors import SpecError
from laserlm.paths import atomic_file
from laserlm.reductions.parts import DROP, SCALE, Layers, Size

Keep = Literal["top", "bottom"]
Method = Literal["exact", "reference"]

GROUPS: dict[str, frozenset[str]] = {
    "attn": frozenset({"q_proj", "k_proj", "v_proj", "out_proj"}),
    "mlp": frozenset({"fc_in", "fc_up", "fc_out"}),
}
"""The matrix types of the named groups. The group ``all`` means every matrix."""

_GROUP_NAMES = {*GROUPS, "all"}
FORM_HINT = "write LAYERS.MATRIX@SIZE, such as 27.fc_in@0.01, 20-27.mlp@0.1, all.fc_out@r40 or top4.all@0.25"
TARGET_PATTERN = re.compile(r"(?:(?P<stack>[A-Za-z_][\w.]*?)\.)??(?P<layers>\d+-\d+|\d+|all|top\d+)\.(?P<matrix>\w+(?:\.\w+)*)")
SPLIT_PATTERN = re.compile(r"split([1-9]\d{0,5})", re.ASCII)
FILE_SCHEMA, FILE_VERSION = "laserlm.reductions", 1
SHORT = 120
"""Number of characters up to which a text is its own short form."""


@dataclass(frozen=True)
class Reduction:
    """The replacement of each selected matrix by a truncation of its decomposition.

    Args:
        layers: the blocks.
        matrix: a matrix name or a group.
        size: fraction or number of singular values to keep, or the components to drop or to scale.
        keep: ``top`` keeps the largest singular values, ``bottom`` the smallest.
        method: ``exact``, or ``reference`` for the randomised decomposition of the published code.
        stack: name of the stack of blocks; empty if the model has one stack.
        split: number of equal blocks of rows, each of which is reduced separately.
    """

    layers: Layers
    matrix: str
    size: Size
    keep: Keep = "top"
    method: Method = "exact"
    stack: str = ""
    split: int = 1

    def __post_init__(self) -> None:
        if self.split < 1:
            raise SpecError(f"cannot split {self.layers}.{self.matrix} into {self.split} blocks of rows; write 1 or more")
        if self.split > 1 and self.method == "reference":
            raise SpecError(f"{self}: the published code's decomposition cannot split the rows; leave out one of the options")
        if self.size.strengths is not None and (self.keep, self.method) != ("top", "exact"):
            raise SpecError(f"{self}: named components are changed exactly; leave out ':bottom' and ':reference'")
        if self.keep == "bottom" and self.method == "reference":
            raise SpecError(
                f"{self}: the randomised decomposition finds only the largest singular values; leave out ':reference'"
            )

    @classmethod
    def parse(cls, text: str) -> Reduction:
        """Parse one reduction, such as ``27.fc_in@0.01:bottom``.

        Raises:
            SpecError: if the text is malformed or rho is not in [0, 1].
        """
        reductions = parse_sizes(text)
        if len(reductions) != 1:
            raise SpecError(f"{text!r} has {len(reductions)} sizes; a reduction has one size, only a grid may have several")
        return reductions[0]

    @property
    def sort_key(self) -> tuple[str, int, str, str]:
        """Key that orders reductions by stack, layer, matrix and text."""
        return (self.stack, -1 if self.layers.first is None else self.layers.first, self.matrix, str(self))

    def __str__(self) -> str:
        return format_sizes((self,))


def parse_sizes(text: str) -> tuple[Reduction, ...]:
    """Parse ``27-29.mlp@0.05,0.5`` into one reduction per size."""
    text = text.strip()
    target, at, rest = text.partition("@")
    match = TARGET_PATTERN.fullmatch(target)
    if not at or not rest or match is None:
        raise SpecError(f"cannot read the reduction {text!r}; {FORM_HINT}")
    sizes, *options = rest.split(":")
    for word in (DROP, SCALE):
        if f",{word}" in sizes:
            raise SpecError(f"{text!r} mixes kept sizes with '{word}'; write each as a part of its own, joined by '+'")
    splits = [int(option[1]) for option in map(SPLIT_PATTERN.fullmatch, options) if option]
    n_known = len(splits) + options.count("bottom") + options.count("reference")
    if n_known != len(options) or len(set(options)) != len(options) or len(splits) > 1:
        known = "':bottom', ':reference' and ':splitK' (K from 1) are known"
        raise SpecError(f"cannot read the options {options} of {text!r}; {known}, each once")
    return tuple(
        Reduction(
            layers=Layers.parse(match["layers"]),
            matrix=match["matrix"],
            size=Size.parse(size),
            keep="bottom" if "bottom" in options else "top",
            method="reference" if "reference" in options else "exact",
            stack=match["stack"] or "",
            split=splits[0] if splits else 1,
        )
        for size in ([sizes] if sizes.startswith((DROP, SCALE)) else sizes.split(","))
    )


def format_sizes(reductions: tuple[Reduction, ...]) -> str:
    """Return the text of reductions that differ in size only."""
    first = reductions[0]
    stack = f"{first.stack}." if first.stack else ""
    options = (":bottom" if first.keep == "bottom" else "") + (":reference" if first.method == "reference" else "")
    options += f":split{first.split}" if first.split != 1 else ""
    return f"{stack}{first.layers}.{first.matrix}@{','.join(str(r.size) for r in reductions)}{options}"


@dataclass(frozen=True)
class Intervention:
    """A set of reductions that are applied together; the empty set is the unchanged model.

    Reductions are sorted and unique, so that equal sets print the same text. This text is the key everywhere.
    """

    reductions: tuple[Reduction, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "reductions", tuple(sorted(set(self.reductions), key=lambda r: r.sort_key)))

    @classmethod
    def parse(cls, text: str | Intervention | Reduction | Iterable[str]) -> Intervention:
        """Parse reductions joined by ``+``, or an iterable of such texts; empty text is the unchanged model."""
        if isinstance(text, Intervention):
            return text
        if isinstance(text, Reduction):
            return cls((text,))
        texts = [text] if isinstance(text, str) else list(text)
        return cls(tuple(Reduction.parse(p) for t in texts if t.strip() for p in t.split("+")))

    @classmethod
    def read(cls, text: str | Intervention | Reduction | Iterable[str]) -> Intervention:
        """Parse like ``parse``, and read the file of each text ``@FILE``. Use ``parse`` for text that strangers send.

        Raises:
            SpecError: if a text or a file cannot be read.
        """
        if isinstance(text, Intervention | Reduction):
            return cls.parse(text)
        texts = [t.strip() for t in ([text] if isinstance(text, str) else text)]
        read = [_read_file(Path(t[1:]).expanduser()) if t.startswith("@") else cls.parse(t) for t in texts]
        return cls(tuple(reduction for part in read for reduction in part.reductions))

    def write(self, file: str | Path) -> None:
        """Write the reductions to a JSON file that ``read`` reads as ``@FILE``."""
        content = {"schema": FILE_SCHEMA, "version": FILE_VERSION, "reductions": [str(r) for r in self.reductions]}
        with atomic_file(Path(file).absolute()) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @cached_property
    def _text(self) -> str:
        return "+".join(map(str, self.reductions))

    def __str__(self) -> str:
        return self._text  # the key of every score, and of thousands of strengths a long one

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return f"Intervention({short_form(self)!r})"

    def __bool__(self) -> bool:
        return bool(self.reductions)


def _read_file(file: Path) -> Intervention:
    next_step = "give a file that Intervention.write wrote, or the laser.json of a saved model"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SpecError(f"cannot read the reductions in {str(file)!r} ({reason}); {next_step}") from None
    if isinstance(content, dict) and {"format", "intervention"} <= content.keys():  # the record of a saved model
        return Intervention.parse(content["intervention"])
    if not isinstance(content, dict) or content.get("schema") != FILE_SCHEMA:
        raise SpecError(f'{str(file)!r} has no entry "schema": "{FILE_SCHEMA}"; {next_step}')
    version, entries = content.get("version"), content.get("reductions")
    if version != FILE_VERSION:
        raise SpecError(f"{str(file)!r} is of version {version!r}; this laserlm reads version {FILE_VERSION}: upgrade laserlm")
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise SpecError(f'the "reductions" of {str(file)!r} are no list of texts such as "27.fc_in@0.01"; {next_step}')
    try:
        return Intervention.parse(entries)
    except SpecError as error:
        raise SpecError(f"{str(file)!r}: {error}") from None


def short_form(text: str | Intervention) -> str:
    """Return the text of an intervention for a table: ``240 components of 101 matrices`` in place of a long text.

    Components that are scaled and not dropped are counted as ``240 strengths``.

    A text that is no intervention, or is short, is returned unchanged.
    """
    text = str(text)
    if len(text) <= SHORT:
        return text
    try:
        reductions = Intervention.parse(text).reductions
    except SpecError:
        return text
    named = [r for r in reductions if r.size.strengths is not None]
    changed = sum(len(r.size.strengths or ()) for r in named)
    single = all(r.layers.first is not None and r.layers.first == r.layers.last and r.matrix not in _GROUP_NAMES for r in named)
    noun = "components" if all(r.size.scale is None for r in named) else "strengths"
    counts = [f"{changed} {noun} of {len(named)} {'matrices' if single else 'selections'}"] if named else []
    if others := len(reductions) - len(named):
        counts.append(f"{others} {'other ' if named else ''}reductions")
    return " and ".join(counts)
