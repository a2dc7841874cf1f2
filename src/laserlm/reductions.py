"""Reductions, interventions and grids as text: parse, print, canonical form.

A reduction is ``[STACK.]LAYERS.MATRIX@SIZE[:bottom][:reference][:splitK]``:

- LAYERS: ``27``, ``20-27`` (both ends included), ``all``, ``top4`` (the last four blocks);
- MATRIX: ``q_proj k_proj v_proj out_proj fc_in fc_up fc_out``, a group ``attn mlp all``, or any name that
  ``laser matrices MODEL`` lists;
- SIZE: ``0.01`` (kept fraction rho of the singular values), ``r40`` (rank), or ``drop0,3,17-20``: all components except
  these. Components are numbered from 0 by falling singular value;
- ``:bottom`` keeps the smallest singular values instead of the largest;
- ``:reference`` uses the randomised decomposition of the published code instead of the exact one;
- ``:split4`` cuts the rows into four equal blocks and reduces each block separately to SIZE;
- STACK: required only if the model has several stacks, as in ``encoder.3.fc_in@0.1``.

An intervention is a set of reductions joined by ``+``. The empty set is the unchanged model. A grid has the same form
with several sizes, ``27-29.mlp@0.05,0.5``, and stands for one candidate per matrix and size. ``@FILE`` stands for the
reductions in a JSON file where ``Intervention.read`` reads the text: on the command line and in ``applied`` and ``save``.
This module uses no model and does not import torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal

from laserlm.errors import MatrixError, SpecError
from laserlm.paths import atomic_file

__all__ = [
    "GROUPS",
    "Components",
    "Grid",
    "Intervention",
    "Keep",
    "Layers",
    "Method",
    "Reduction",
    "Size",
    "from_rate",
    "short_form",
]

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
RANGE_PATTERN = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
LAST_LAYERS_PATTERN = re.compile(r"top(\d{1,9})", re.ASCII)
RANK_PATTERN = re.compile(r"r(\d{1,9})", re.ASCII)
SPLIT_PATTERN = re.compile(r"split([1-9]\d{0,5})", re.ASCII)
MAX_DECIMALS = 18
"""Decimal places of the smallest fraction. Printing a much smaller one would take gigabytes."""
DROP = "drop"
FILE_SCHEMA, FILE_VERSION = "laserlm.reductions", 1
SHORT = 120
"""Number of characters up to which a text is its own short form."""


@dataclass(frozen=True)
class Layers:
    """A selection of blocks in one stack: a range, all blocks, or the last ``top`` blocks.

    Args:
        first: lowest 0-based block; None for ``all`` and ``topN``.
        last: highest block, included.
        top: number of last blocks, or None.
    """

    first: int | None = None
    last: int | None = None
    top: int | None = None

    @classmethod
    def parse(cls, text: str) -> Layers:
        """Parse ``27``, ``20-27``, ``all`` or ``top4``."""
        if text == "all":
            return cls()
        if (top := LAST_LAYERS_PATTERN.fullmatch(text)) is not None:
            if int(top[1]) == 0:
                raise SpecError(f"{text!r} chooses no block; write top1 or more")
            return cls(top=int(top[1]))
        match = RANGE_PATTERN.fullmatch(text)
        if match is None:
            raise SpecError(f"cannot read the layers {text!r}; write 27, 20-27, all or top4")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise SpecError(f"the layers {text!r} run backwards; write {last}-{first}")
        return cls(first=first, last=last)

    def indices(self, n_blocks: int) -> range:
        """Return the selected 0-based layers of a stack with ``n_blocks`` blocks.

        Raises:
            MatrixError: if the stack lacks a selected layer.
        """
        if self.top is not None:
            if self.top > n_blocks:
                raise MatrixError(f"{self} selects more blocks than the {n_blocks} of this model; write top{n_blocks} or 'all'")
            return range(n_blocks - self.top, n_blocks)
        if self.first is None or self.last is None:
            return range(n_blocks)
        if self.last >= n_blocks:
            raise MatrixError(f"no layer {self.last}: this model's layers are 0 to {n_blocks - 1}; see 'laser matrices MODEL'")
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        if self.top is not None:
            return f"top{self.top}"
        if self.first is None:
            return "all"
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class Components:
    """Numbers of components of a matrix: 0 is the component with the largest singular value.

    Args:
        ranges: first and last number of each range, both included. They are stored sorted, and adjacent ranges as one.

    Raises:
        SpecError: if there is no range, one runs backwards, or two have a number in common.
    """

    ranges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        merged: list[tuple[int, int]] = []
        for first, last in sorted(self.ranges):
            if first < 0 or last < first:
                raise SpecError(f"no components {first}-{last}; they are numbered from 0: write the smaller number first")
            if merged and first <= merged[-1][1]:
                raise SpecError(f"component {first} is listed twice; list each component once, such as {DROP}0,3,17-20")
            if merged and first == merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], last)
            else:
                merged.append((first, last))
        if not merged:
            raise SpecError(f"no component is listed; write their numbers, such as {DROP}0,3,17-20")
        object.__setattr__(self, "ranges", tuple(merged))

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Components:
        """Return the components with these numbers, in any order."""
        return cls(tuple((i, i) for i in numbers))

    @classmethod
    def parse(cls, text: str) -> Components:
        """Parse ``0,3,17-20``."""
        ranges = []
        for part in text.split(","):
            match = RANGE_PATTERN.fullmatch(part)
            if match is None:
                raise SpecError(f"cannot read the component {part!r}; write numbers and ranges such as {DROP}0,3,17-20")
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise SpecError(f"the components {part!r} run backwards; write {last}-{first}")
            ranges.append((first, last))
        return cls(tuple(ranges))

    @property
    def numbers(self) -> list[int]:
        """All numbers, rising."""
        return [i for first, last in self.ranges for i in range(first, last + 1)]

    @property
    def last(self) -> int:
        """The highest number."""
        return self.ranges[-1][1]

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self.ranges)

    def __str__(self) -> str:
        return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in self.ranges)


@dataclass(frozen=True)
class Size:
    """What is kept of a matrix: a fraction ``rho`` in [0, 1], a ``rank``, or all but the components to ``drop``.

    ``rho`` is a decimal fraction, so that rank = floor(rho * max_rank) is exact.
    """

    rho: Decimal | None = None
    rank: int | None = None
    drop: Components | None = None

    def __post_init__(self) -> None:
        if [self.rho, self.rank, self.drop].count(None) != 2:
            raise SpecError(
                f"a size is either a fraction or a rank or the components to drop; got rho={self.rho}, rank={self.rank}, "
                f"drop={self.drop}"
            )
        if self.rho is not None and not (self.rho.is_finite() and 0 <= self.rho <= 1):
            raise SpecError(f"rho {self.rho} is out of range; it is the kept fraction, from 0 to 1")
        if self.rho is not None and self.rho != 0 and self.rho.adjusted() < -MAX_DECIMALS:
            raise SpecError(f"the size {self.rho!s:.20} is too small for a fraction; write 0, or 1e-{MAX_DECIMALS} or more")
        if self.rho == 0:
            object.__setattr__(self, "rho", Decimal(0))  # Decimal has a minus zero
        if self.rank is not None and self.rank < 0:
            raise SpecError(f"rank {self.rank} is negative; write r0 or more")

    @classmethod
    def parse(cls, text: str) -> Size:
        """Parse ``0.01``, ``r40`` or ``drop0,3,17-20``."""
        if text.startswith(DROP):
            return cls(drop=Components.parse(text.removeprefix(DROP)))
        if (rank := RANK_PATTERN.fullmatch(text)) is not None:
            return cls(rank=int(rank[1]))
        try:
            return cls(rho=Decimal(text))
        except InvalidOperation:
            raise SpecError(
                f"cannot read the size {text!r}; write a kept fraction such as 0.01 or a rank such as r40, or name the "
                f"components to drop, such as {DROP}0,3,17-20"
            ) from None

    def __str__(self) -> str:
        if self.drop is not None:
            return f"{DROP}{self.drop}"
        if self.rho is None:
            return f"r{self.rank}"
        text = format(self.rho, "f")
        return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"


@dataclass(frozen=True)
class Reduction:
    """The replacement of each selected matrix by a truncation of its decomposition.

    Args:
        layers: the blocks.
        matrix: a matrix name or a group.
        size: fraction or number of singular values to keep, or the components to drop.
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
        if self.size.drop is not None and (self.keep, self.method) != ("top", "exact"):
            raise SpecError(f"{self}: named components are dropped exactly; leave out ':bottom' and ':reference'")
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
        reductions = _parse_sizes(text)
        if len(reductions) != 1:
            raise SpecError(f"{text!r} has {len(reductions)} sizes; a reduction has one size, only a grid may have several")
        return reductions[0]

    @property
    def sort_key(self) -> tuple[str, int, str, str]:
        """Key that orders reductions by stack, layer, matrix and text."""
        return (self.stack, -1 if self.layers.first is None else self.layers.first, self.matrix, str(self))

    def __str__(self) -> str:
        return _format_sizes((self,))


def _parse_sizes(text: str) -> tuple[Reduction, ...]:
    """Parse ``27-29.mlp@0.05,0.5`` into one reduction per size."""
    text = text.strip()
    target, at, rest = text.partition("@")
    match = TARGET_PATTERN.fullmatch(target)
    if not at or not rest or match is None:
        raise SpecError(f"cannot read the reduction {text!r}; {FORM_HINT}")
    sizes, *options = rest.split(":")
    if f",{DROP}" in sizes:
        raise SpecError(f"{text!r} mixes kept sizes with '{DROP}'; write each as a part of its own, joined by '+'")
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
        for size in ([sizes] if sizes.startswith(DROP) else sizes.split(","))
    )


def _format_sizes(reductions: tuple[Reduction, ...]) -> str:
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

    def __str__(self) -> str:
        return "+".join(map(str, self.reductions))

    def __bool__(self) -> bool:
        return bool(self.reductions)


def _read_file(file: Path) -> Intervention:
    next_step = "give a file that Intervention.write wrote"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SpecError(f"cannot read the reductions in {str(file)!r} ({reason}); {next_step}") from None
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

    A text that is no intervention, or is short, is returned unchanged.
    """
    text = str(text)
    if len(text) <= SHORT:
        return text
    try:
        reductions = Intervention.parse(text).reductions
    except SpecError:
        return text
    drops = [r for r in reductions if r.size.drop is not None]
    components = sum(len(r.size.drop) for r in drops if r.size.drop is not None)
    single = all(r.layers.first is not None and r.layers.first == r.layers.last and r.matrix not in _GROUP_NAMES for r in drops)
    counts = [f"{components} components of {len(drops)} {'matrices' if single else 'selections'}"] if drops else []
    if others := len(reductions) - len(drops):
        counts.append(f"{others} {'other ' if drops else ''}reductions")
    return " and ".join(counts)


PAPER_RHO = "0.9,0.8,0.6,0.4,0.2,0.1,0.05,0.01"
FINE_RHO = "0.9,0.75,0.6,0.5,0.4,0.25,0.1,0.075,0.05,0.025,0.02,0.015,0.01,0.005,0.0025"
NAMED_GRIDS = {
    "paper": f"all.fc_in@{PAPER_RHO}+all.fc_out@{PAPER_RHO}",
    "mlp": f"all.mlp@{PAPER_RHO}",
    "fine": f"all.all@{FINE_RHO}",
}


@dataclass(frozen=True)
class Grid:
    """The candidates of a search as text; ``searching.candidates.expand`` lists them for a model.

    Args:
        parts: reductions that differ in size only, part by part.

    Source: the named grids are arXiv 2312.13558, table 5 (``paper``; ``mlp`` adds the gated up-projection) and the
    finer sets of later work (``fine``).
    """

    parts: tuple[tuple[Reduction, ...], ...]

    @classmethod
    def parse(cls, text: str | Grid) -> Grid:
        """Parse a named grid (``paper``, ``mlp``, ``fine``) or parts joined by ``+``.

        Raises:
            SpecError: if there is no grid of this name, or the text is malformed.
        """
        if isinstance(text, Grid):
            return text
        if "@" not in text and text not in NAMED_GRIDS:
            raise SpecError(f"no grid {text!r}; there are {', '.join(NAMED_GRIDS)}; otherwise {FORM_HINT}")
        return cls(tuple(_parse_sizes(part) for part in NAMED_GRIDS.get(text, text).split("+")))

    def __str__(self) -> str:
        return "+".join(map(_format_sizes, self.parts))


def from_rate(lname: str, lnum: int, rate: float | str) -> Reduction:
    """Convert the flags of the published code: ``rate`` in [0, 10] removes the share rate/10, so rho = 1 - rate/10.

    Source: arXiv 2312.13558, released code, flags ``--lname --lnum --rate``.
    """
    try:
        removed = Decimal(str(rate))
    except InvalidOperation:
        raise SpecError(f"cannot read the rate {rate!r}; the published code takes a number from 0 to 10") from None
    if not (removed.is_finite() and 0 <= removed <= 10):
        raise SpecError(f"rate {rate} is out of range; the published code takes 0 (keep all) to 10 (keep nothing)")
    return Reduction.parse(f"{lnum}.{lname}@{1 - removed / 10:f}")
