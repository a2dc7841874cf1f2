"""The parts of a reduction's text: its layers, and what it keeps of a matrix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from functools import cached_property

from laserlm.errors import MatrixError, SpecError

RANGE_PATTERN = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
LAST_LAYERS_PATTERN = re.compile(r"top(\d{1,9})", re.ASCII)
RANK_PATTERN = re.compile(r"r(\d{1,9})", re.ASCII)
MAX_DECIMALS = 18
"""Decimal places of the smallest fraction. Printing a much smaller one would take gigabytes."""
DROP, SCALE = "drop", "scale"
MAX_STRENGTH = 1000
"""Largest factor of a singular value, of either sign."""


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
class Strengths:
    """Factors of the singular values of some components; all others keep the factor 1, and 0 drops a component.

    Args:
        parts: components with a factor each. They are stored sorted, and adjacent components of equal factor as one range.

    Raises:
        SpecError: if there is none, a component has two factors, or a factor is 1 or beyond 1000.
    """

    parts: tuple[tuple[Components, Decimal], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise SpecError(f"no component has a strength; write numbers and factors, such as {SCALE}3=0.4,17-20=1.25")
        for components, strength in self.parts:
            if not (strength.is_finite() and abs(strength) <= MAX_STRENGTH and strength == round(strength, MAX_DECIMALS)):
                raise SpecError(
                    f"the strength {strength!s:.20} of component {components} is out of range; write a factor from "
                    f"-{MAX_STRENGTH} to {MAX_STRENGTH}, with {MAX_DECIMALS} decimal places at most"
                )
            if strength == 1:
                raise SpecError(f"component {components} has the strength 1, which changes nothing; leave it out")
        Components(tuple(r for components, _ in self.parts for r in components.ranges))  # raises if one is listed twice
        by_strength: dict[Decimal, list[tuple[int, int]]] = {}
        for components, strength in self.parts:
            by_strength.setdefault(strength + 0, []).extend(components.ranges)  # + 0: Decimal has a minus zero
        merged = [(r, strength) for strength, ranges in by_strength.items() for r in Components(tuple(ranges)).ranges]
        object.__setattr__(self, "parts", tuple((Components((r,)), strength) for r, strength in sorted(merged)))

    @classmethod
    def of(cls, strengths: Mapping[int, float], step: Decimal = Decimal("0.01")) -> Strengths:
        """Return the strengths of components by number, rounded to multiples of ``step``; those of 1 are left out.

        Raises:
            SpecError: if none is left.
        """
        rounded = {s: (Decimal(s) / step).quantize(Decimal(1), ROUND_HALF_EVEN) * step for s in set(strengths.values())}
        numbers: dict[Decimal, list[int]] = {}
        for i, s in strengths.items():
            if rounded[s] != 1:
                numbers.setdefault(rounded[s], []).append(i)
        return cls(tuple((Components.of(of_strength), strength) for strength, of_strength in numbers.items()))

    @classmethod
    def parse(cls, text: str) -> Strengths:
        """Parse ``3=0.4,17-20=1.25``."""
        parts = []
        for part in text.split(","):
            components, _, strength = part.partition("=")
            try:
                factor = Decimal(strength)
            except InvalidOperation:
                raise SpecError(
                    f"cannot read the strength {part!r}; write a number or range, '=' and a factor, such as {SCALE}3=0.4"
                ) from None
            parts.append((Components.parse(components), factor))
        return cls(tuple(parts))

    @cached_property
    def by_number(self) -> Mapping[int, float]:
        """The factor of each component, by rising number."""
        return {i: float(strength) for components, strength in self.parts for i in components.numbers}

    @property
    def last(self) -> int:
        """The highest number."""
        return self.parts[-1][0].last

    def __len__(self) -> int:
        return sum(len(components) for components, _ in self.parts)

    def __str__(self) -> str:
        return ",".join(f"{components}={_plain(strength)}" for components, strength in self.parts)


def _plain(number: Decimal) -> str:
    """Return a number without an exponent and without zeros at its end."""
    text = format(number, "f")
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"


@dataclass(frozen=True)
class Size:
    """What is kept of a matrix: a fraction ``rho`` in [0, 1], a ``rank``, or all but what ``drop`` or ``scale`` changes.

    ``rho`` is a decimal fraction, so that rank = floor(rho * max_rank) is exact. ``scale`` are factors of single singular
    values. If all of them are 0, they are stored as ``drop``, so that equal changes have equal texts.
    """

    rho: Decimal | None = None
    rank: int | None = None
    drop: Components | None = None
    scale: Strengths | None = None

    def __post_init__(self) -> None:
        if [self.rho, self.rank, self.drop, self.scale].count(None) != 3:
            raise SpecError(
                "a size is either a fraction or a rank or the components to drop or to scale; got "
                f"rho={self.rho}, rank={self.rank}, drop={self.drop}, scale={self.scale}"
            )
        if self.scale is not None and not any(self.scale.by_number.values()):
            object.__setattr__(self, "drop", Components.of(self.scale.by_number))
            object.__setattr__(self, "scale", None)
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
        """Parse ``0.01``, ``r40``, ``drop0,3,17-20`` or ``scale3=0.4,17-20=1.25``."""
        if text.startswith(DROP):
            return cls(drop=Components.parse(text.removeprefix(DROP)))
        if text.startswith(SCALE):
            return cls(scale=Strengths.parse(text.removeprefix(SCALE)))
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
        if self.scale is not None:
            return f"{SCALE}{self.scale}"
        return f"r{self.rank}" if self.rho is None else _plain(self.rho)

    @property
    def strengths(self) -> Mapping[int, float] | None:
        """The factors of the components that ``drop`` or ``scale`` names, by number; None for a fraction or a rank."""
        if self.drop is not None:
            return dict.fromkeys(self.drop.numbers, 0.0)
        return None if self.scale is None else self.scale.by_number
