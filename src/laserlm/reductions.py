"""Reductions, interventions and grids as text: parse, print, canonical form.

A reduction is ``[STACK.]LAYERS.MATRIX@SIZE[:bottom][:reference][:splitK]``:

- LAYERS: ``27``, ``20-27`` (both ends belong to it), ``all``, ``top4`` (the last four blocks);
- MATRIX: ``q_proj k_proj v_proj out_proj fc_in fc_up fc_out``, a group ``attn mlp all``, or any name that
  ``laser matrices MODEL`` lists;
- SIZE: ``0.01`` (kept fraction rho of the singular values) or ``r40`` (rank);
- ``:bottom`` keeps the smallest singular values instead of the largest;
- ``:reference`` uses the randomised decomposition of the published code instead of the exact one;
- ``:split4`` cuts the rows into four equal blocks and reduces each by itself, to SIZE of its own singular values;
- STACK: only where a model has several, ``encoder.3.fc_in@0.1``.

An intervention is a set of reductions joined by ``+``; the empty one is the unchanged model. A grid is written in the
same way with several sizes, ``27-29.mlp@0.05,0.5``, and means one candidate for each single matrix and size.
This module knows no model and imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from laserlm.errors import MatrixError, SpecError

__all__ = ["GROUPS", "Grid", "GridPart", "Intervention", "Keep", "Layers", "Method", "Reduction", "Size", "from_rate"]

Keep = Literal["top", "bottom"]
Method = Literal["exact", "reference"]

GROUPS: dict[str, frozenset[str]] = {
    "attn": frozenset({"q_proj", "k_proj", "v_proj", "out_proj"}),
    "mlp": frozenset({"fc_in", "fc_up", "fc_out"}),
}
"""The matrix types of the named groups; the group ``all`` means every matrix, whatever its name."""

FORM = "write LAYERS.MATRIX@SIZE, such as 27.fc_in@0.01, 20-27.mlp@0.1, all.fc_out@r40 or top4.all@0.25"
RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
LAST = re.compile(r"top(\d{1,9})", re.ASCII)
RANK = re.compile(r"r(\d{1,9})", re.ASCII)
SPLIT = re.compile(r"split([1-9]\d{0,5})", re.ASCII)
FINEST = 18
"""Decimal places of the smallest fraction; what is far smaller would take gigabytes to print."""
TARGET = re.compile(r"(?:(?P<stack>[A-Za-z_][\w.]*?)\.)??(?P<layers>\d+-\d+|\d+|all|top\d+)\.(?P<matrix>\w+(?:\.\w+)*)")


@dataclass(frozen=True)
class Layers:
    """Choose blocks of one stack: a range, ``all`` of them, or the last ``top`` ones.

    Args:
        first: lowest 0-based block, or None with ``all`` and ``topN``.
        last: highest block, itself included.
        top: number of last blocks, or None.
    """

    first: int | None = None
    last: int | None = None
    top: int | None = None

    @classmethod
    def parse(cls, text: str) -> Layers:
        """Read ``27``, ``20-27``, ``all`` or ``top4``."""
        if text == "all":
            return cls()
        if (top := LAST.fullmatch(text)) is not None:
            if int(top[1]) == 0:
                raise SpecError(f"{text!r} chooses no block; write top1 or more")
            return cls(top=int(top[1]))
        match = RANGE.fullmatch(text)
        if match is None:
            raise SpecError(f"cannot read the layers {text!r}; write 27, 20-27, all or top4")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise SpecError(f"the layers {text!r} run backwards; write {last}-{first}")
        return cls(first=first, last=last)

    def within(self, blocks: int) -> range:
        """Return the 0-based layers this means in a stack of ``blocks`` blocks.

        Raises:
            MatrixError: if a layer named here does not exist there.
        """
        if self.top is not None:
            if self.top > blocks:
                raise MatrixError(f"{self} asks for more blocks than the {blocks} there are; write top{blocks} or 'all'")
            return range(blocks - self.top, blocks)
        if self.first is None or self.last is None:
            return range(blocks)
        if self.last >= blocks:
            raise MatrixError(f"no layer {self.last}: this model's layers are 0 to {blocks - 1}; see 'laser matrices MODEL'")
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        if self.top is not None:
            return f"top{self.top}"
        if self.first is None:
            return "all"
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class Size:
    """State how much of a matrix is kept: a fraction ``rho`` in [0, 1] or a ``rank``; exactly one of them.

    ``rho`` is a decimal fraction, so that rank = floor(rho * max_rank) is exact.
    """

    rho: Decimal | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        if (self.rho is None) == (self.rank is None):
            raise SpecError(f"a size is either a fraction or a rank; got rho={self.rho}, rank={self.rank}")
        if self.rho is not None and not (self.rho.is_finite() and 0 <= self.rho <= 1):
            raise SpecError(f"rho {self.rho} is out of range; it is the kept fraction, from 0 to 1")
        if self.rho is not None and self.rho != 0 and self.rho.adjusted() < -FINEST:
            raise SpecError(
                f"the size {self.rho!s:.20} is too small for a fraction of a matrix; write 0, or 1e-{FINEST} and more"
            )
        if self.rho == 0:
            object.__setattr__(self, "rho", Decimal(0))  # there is a minus zero too
        if self.rank is not None and self.rank < 0:
            raise SpecError(f"rank {self.rank} is negative; write r0 or more")

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read ``0.01`` or ``r40``."""
        if (rank := RANK.fullmatch(text)) is not None:
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
    """Replace the chosen matrices, each by itself, by a truncated decomposition.

    Args:
        layers: the blocks.
        matrix: a matrix name or a group.
        size: how many singular values are kept.
        keep: ``top`` keeps the largest singular values, ``bottom`` the smallest.
        method: ``exact``, or ``reference`` for the randomised decomposition of the published code.
        stack: name of the stack of blocks, empty where the model has one.
        split: number of equal blocks of rows that are reduced each by itself; 1 takes the matrix whole.
    """

    layers: Layers
    matrix: str
    size: Size
    keep: Keep = "top"
    method: Method = "exact"
    stack: str = ""
    split: int = 1

    def __post_init__(self) -> None:
        _check_options(self, self.keep, self.method, self.split)

    @classmethod
    def parse(cls, text: str) -> Reduction:
        """Read one reduction, such as ``27.fc_in@0.01:bottom``.

        Raises:
            SpecError: if the text is malformed or rho is not in [0, 1].
        """
        part = GridPart.parse(text)
        if len(part.sizes) != 1:
            raise SpecError(f"{text!r} has {len(part.sizes)} sizes; a reduction has one (a grid may have several)")
        return cls(part.layers, part.matrix, part.sizes[0], part.keep, part.method, part.stack, part.split)

    @property
    def sort_key(self) -> tuple[str, int, str, str]:
        """Order reductions by stack, layer, matrix and text."""
        return (self.stack, -1 if self.layers.first is None else self.layers.first, self.matrix, str(self))

    def __str__(self) -> str:
        return str(GridPart(self.layers, self.matrix, (self.size,), self.keep, self.method, self.stack, self.split))


@dataclass(frozen=True)
class Intervention:
    """A set of reductions applied together; empty is the unchanged model.

    Reductions are kept sorted and without repeats, so equal sets print the same text, which is the key everywhere.
    """

    reductions: tuple[Reduction, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "reductions", tuple(sorted(set(self.reductions), key=lambda r: r.sort_key)))

    @classmethod
    def parse(cls, text: str | Intervention | Reduction | Iterable[str]) -> Intervention:
        """Read reductions joined by ``+`` (or an iterable of such texts); empty text is the unchanged model."""
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


@dataclass(frozen=True)
class GridPart:
    """One selector of a grid with its sizes: a candidate for each single matrix and each size."""

    layers: Layers
    matrix: str
    sizes: tuple[Size, ...]
    keep: Keep = "top"
    method: Method = "exact"
    stack: str = ""
    split: int = 1

    def __post_init__(self) -> None:
        _check_options(self, self.keep, self.method, self.split)

    @classmethod
    def parse(cls, text: str) -> GridPart:
        """Read ``27-29.mlp@0.05,0.5``.

        Raises:
            SpecError: if the text is malformed.
        """
        target, at, rest = text.strip().partition("@")
        match = TARGET.fullmatch(target)
        if not at or not rest or match is None:
            raise SpecError(f"cannot read the reduction {text.strip()!r}; {FORM}")
        sizes, *options = rest.split(":")
        splits = [int(found[1]) for o in options if (found := SPLIT.fullmatch(o))]
        unknown = [o for o in options if o not in ("bottom", "reference") and not SPLIT.fullmatch(o)]
        if unknown or len(set(options)) != len(options) or len(splits) > 1:
            known = "':bottom', ':reference' and ':splitK' (K from 1) are known"
            raise SpecError(f"cannot read the options {options} of {text.strip()!r}; {known}, each once")
        return cls(
            layers=Layers.parse(match["layers"]),
            matrix=match["matrix"],
            sizes=tuple(Size.parse(s) for s in sizes.split(",")),
            keep="bottom" if "bottom" in options else "top",
            method="reference" if "reference" in options else "exact",
            stack=match["stack"] or "",
            split=splits[0] if splits else 1,
        )

    def __str__(self) -> str:
        stack = f"{self.stack}." if self.stack else ""
        options = (":bottom" if self.keep == "bottom" else "") + (":reference" if self.method == "reference" else "")
        options += f":split{self.split}" if self.split != 1 else ""
        return f"{stack}{self.layers}.{self.matrix}@{','.join(map(str, self.sizes))}{options}"


def _check_options(what: Reduction | GridPart, keep: Keep, method: Method, split: int) -> None:
    if split < 1:
        raise SpecError(f"{what.layers}.{what.matrix} cannot be split into {split} blocks of rows; write 1 or more")
    if split > 1 and method == "reference":
        raise SpecError(f"{what} asks for blocks of rows in the published code's decomposition, which has none; leave out one")
    if keep == "bottom" and method == "reference":
        raise SpecError(
            f"{what} asks for the smallest singular values of the randomised decomposition, which finds only the largest; "
            "leave out ':reference'"
        )


PAPER_RHO = "0.9,0.8,0.6,0.4,0.2,0.1,0.05,0.01"
FINE_RHO = "0.9,0.75,0.6,0.5,0.4,0.25,0.1,0.075,0.05,0.025,0.02,0.015,0.01,0.005,0.0025"
NAMED_GRIDS = {
    "paper": f"all.fc_in@{PAPER_RHO}+all.fc_out@{PAPER_RHO}",
    "mlp": f"all.mlp@{PAPER_RHO}",
    "fine": f"all.all@{FINE_RHO}",
}


@dataclass(frozen=True)
class Grid:
    """The candidates of a search as text; see ``searching.candidates`` for what it means on a model.

    Source: the named grids are arXiv 2312.13558, table 5 (``paper``; ``mlp`` adds the gated up-projection) and the
    finer sets of later work (``fine``).
    """

    parts: tuple[GridPart, ...]

    @classmethod
    def parse(cls, text: str | Grid) -> Grid:
        """Read a named grid (``paper``, ``mlp``, ``fine``) or parts joined by ``+``.

        Raises:
            SpecError: if there is no grid of this name, or the text is malformed.
        """
        if isinstance(text, Grid):
            return text
        if "@" not in text and text not in NAMED_GRIDS:
            raise SpecError(f"no grid {text!r}; there are {', '.join(NAMED_GRIDS)}; otherwise {FORM}")
        return cls(tuple(GridPart.parse(p) for p in NAMED_GRIDS.get(text, text).split("+")))

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


def from_rate(lname: str, lnum: int, rate: float | str) -> Reduction:
    """Convert the flags of the published code: ``rate`` in [0, 10] removes a share rate/10, so rho = 1 - rate/10.

    Source: arXiv 2312.13558, released code, flags ``--lname --lnum --rate``.
    """
    try:
        removed = Decimal(str(rate))
    except InvalidOperation:
        raise SpecError(f"cannot read the rate {rate!r}; the published code takes a number from 0 to 10") from None
    if not (removed.is_finite() and 0 <= removed <= 10):
        raise SpecError(f"rate {rate} is out of range; the published code takes 0 (keep all) to 10 (keep nothing)")
    return Reduction.parse(f"{lnum}.{lname}@{1 - removed / 10:f}")
