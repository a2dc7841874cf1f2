"""Reductions, interventions and grids as text: parse, print, canonical form.

A reduction is ``[STACK.]LAYERS.MATRIX@SIZE[:bottom][:reference][:splitK]``:

- LAYERS: ``27``, ``20-27`` (both ends included), ``all``, ``top4`` (the last four blocks);
- MATRIX: ``q_proj k_proj v_proj out_proj fc_in fc_up fc_out``, a group ``attn mlp all``, or any name that
  ``laser matrices MODEL`` lists;
- SIZE: ``0.01`` (kept fraction rho of the singular values) or ``r40`` (rank);
- ``:bottom`` keeps the smallest singular values instead of the largest;
- ``:reference`` uses the randomised decomposition of the published code instead of the exact one;
- ``:split4`` cuts the rows into four equal blocks and reduces each block separately to SIZE;
- STACK: required only if the model has several stacks, as in ``encoder.3.fc_in@0.1``.

An intervention is a set of reductions joined by ``+``. The empty set is the unchanged model. A grid has the same form
with several sizes, ``27-29.mlp@0.05,0.5``, and stands for one candidate per matrix and size.
This module uses no model and does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from laserlm.errors import MatrixError, SpecError

__all__ = ["GROUPS", "Grid", "Intervention", "Keep", "Layers", "Method", "Reduction", "Size", "from_rate"]

Keep = Literal["top", "bottom"]
Method = Literal["exact", "reference"]

GROUPS: dict[str, frozenset[str]] = {
    "attn": frozenset({"q_proj", "k_proj", "v_proj", "out_proj"}),
    "mlp": frozenset({"fc_in", "fc_up", "fc_out"}),
}
"""The matrix types of the named groups. The group ``all`` means every matrix."""

FORM_HINT = "write LAYERS.MATRIX@SIZE, such as 27.fc_in@0.01, 20-27.mlp@0.1, all.fc_out@r40 or top4.all@0.25"
TARGET_PATTERN = re.compile(r"(?:(?P<stack>[A-Za-z_][\w.]*?)\.)??(?P<layers>\d+-\d+|\d+|all|top\d+)\.(?P<matrix>\w+(?:\.\w+)*)")
LAYER_RANGE_PATTERN = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
LAST_LAYERS_PATTERN = re.compile(r"top(\d{1,9})", re.ASCII)
RANK_PATTERN = re.compile(r"r(\d{1,9})", re.ASCII)
SPLIT_PATTERN = re.compile(r"split([1-9]\d{0,5})", re.ASCII)
MAX_DECIMALS = 18
"""Decimal places of the smallest fraction. Printing a much smaller one would take gigabytes."""


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
        match = LAYER_RANGE_PATTERN.fullmatch(text)
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
class Size:
    """The kept size of a matrix: either a fraction ``rho`` in [0, 1] or a ``rank``.

    ``rho`` is a decimal fraction, so that rank = floor(rho * max_rank) is exact.
    """

    rho: Decimal | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if (self.rho is None) == (self.rank is None):
            raise SpecError(f"a size is either a fraction or a rank; got rho={self.rho}, rank={self.rank}")
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
        """Parse ``0.01`` or ``r40``."""
        if (rank := RANK_PATTERN.fullmatch(text)) is not None:
            return cls(rank=int(rank[1]))
        try:
            return cls(rho=Decimal(text))
        except InvalidOperation:
            raise SpecError(
                f"cannot read the size {text!r}; write a kept fraction such as 0.01 or a rank such as r40"
            ) from None

    def __str__(self) -> str:
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
        size: fraction or number of singular values to keep.
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
        for size in sizes.split(",")
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

    def __str__(self) -> str:
        return "+".join(map(str, self.reductions))

    def __bool__(self) -> bool:
        return bool(self.reductions)


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
