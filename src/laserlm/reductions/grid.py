"""Grids: the candidates of a search as text, and the settings of the published code."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from laserlm.errors import SpecError
from laserlm.reductions.reduction import FORM_HINT, Reduction, format_sizes, parse_sizes

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
        return cls(tuple(parse_sizes(part) for part in NAMED_GRIDS.get(text, text).split("+")))

    def __str__(self) -> str:
        return "+".join(map(format_sizes, self.parts))


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
