"""Sokoban levels of ten by ten cells: their text, Boxoban files and random small levels.

Source: Guez et al., "An investigation of model-free planning", arXiv 1901.03559, and its Boxoban levels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from laserlm.errors import TaskError
from laserlm.lab.sokoban.solver import DELTAS, SIDE, dead_squares, solve

CELLS = " .#$*@+"
"""The symbols in the order of their codes 0 to 6: floor, goal, wall, box, box on goal, player, player on goal."""

MAX_REFUSALS = 20_000
"""Number of refused boards in a row after which ``generate`` gives up."""

MAX_STATES = 20_000
"""Number of states that ``generate`` expands for one board; a board that needs more is refused."""


@dataclass(frozen=True)
class Level:
    """A board at its start; levels with equal boards are equal.

    Args:
        rows: ten texts of ten symbols of ``CELLS``.
        name: name in messages; it may be empty.
    """

    rows: tuple[str, ...]
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        label = f"level {self.name!r}" if self.name else "the level"
        if len(self.rows) != SIDE:
            raise TaskError(f"{label} has {len(self.rows)} rows; a board has {SIDE} rows of {SIDE} symbols")
        for number, row in enumerate(self.rows):
            if len(row) != SIDE:
                raise TaskError(
                    f"{label}: row {number} has {len(row)} symbols, {row!r:.40}; fill it up to {SIDE} with walls '#'"
                )
            if unknown := sorted(set(row) - set(CELLS)):
                raise TaskError(f"{label}: row {number} has the unknown symbols {unknown}; the symbols are {CELLS!r}")
        players = sum(row.count("@") + row.count("+") for row in self.rows)
        if players != 1:
            raise TaskError(f"{label} has {players} players; put exactly one '@' (or '+' on a goal)")
        if len(self.boxes) != len(self.goals) or not self.boxes:
            raise TaskError(
                f"{label} has {len(self.boxes)} boxes and {len(self.goals)} goals; a level has as many of both, at least one"
            )
        gaps = sorted(BORDER - self.walls)
        if gaps:
            row_, column = divmod(gaps[0], SIDE)
            raise TaskError(f"{label} is open at row {row_}, column {column}; close the border with walls '#'")

    @classmethod
    def parse(cls, text: str, name: str = "") -> Level:
        """Read ten lines of ten symbols.

        Raises:
            TaskError: if the text is not a valid board.
        """
        return cls(tuple(text.strip("\n").split("\n")), name)

    @property
    def text(self) -> str:
        """Return the rows as lines, each with a line end."""
        return "\n".join(self.rows) + "\n"

    @cached_property
    def walls(self) -> frozenset[int]:
        """Return the cells of walls."""
        return self._cells_with("#")

    @cached_property
    def goals(self) -> frozenset[int]:
        """Return the cells of goals, empty or not."""
        return self._cells_with(".*+")

    @cached_property
    def boxes(self) -> frozenset[int]:
        """Return the cells of boxes, on goals or not."""
        return self._cells_with("$*")

    @cached_property
    def player(self) -> int:
        """Return the player's cell."""
        return next(iter(self._cells_with("@+")))

    @cached_property
    def codes(self) -> tuple[int, ...]:
        """Return the codes of the 100 cells: the indices of their symbols in ``CELLS``."""
        return tuple(CELLS.index(symbol) for symbol in "".join(self.rows))

    def _cells_with(self, symbols: str) -> frozenset[int]:
        return frozenset(cell for cell, symbol in enumerate("".join(self.rows)) if symbol in symbols)


BORDER = frozenset(c for c in range(SIDE * SIDE) if c // SIDE in (0, SIDE - 1) or c % SIDE in (0, SIDE - 1))
"""The cells along the edge of the board."""


def read_boxoban(path: str | Path) -> list[Level]:
    """Read a file of Boxoban levels. Each has a line ``; number`` and ten rows; empty lines separate levels.

    Args:
        path: the file; the name of a level is ``FILE/NUMBER``, without the file's extension.

    Raises:
        TaskError: if the file cannot be read or a level is malformed.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read levels from {path}: {error}; give a text file of Boxoban levels") from error
    sections: list[tuple[str, list[str]]] = []
    for number, line in enumerate(lines, start=1):
        if line.startswith(";"):
            sections.append((line[1:].strip(), []))
        elif line and not sections:
            raise TaskError(f"{path}, line {number}: a row before the first level, {line!r:.40}; begin a level with '; number'")
        elif line:
            sections[-1][1].append(line)
    if not sections:
        raise TaskError(f"{path} holds no level; a Boxoban file has a line '; number' and ten rows for each")
    levels = []
    for label, rows in sections:
        try:
            levels.append(Level(tuple(rows), f"{path.stem}/{label}"))
        except TaskError as error:
            raise TaskError(f"{path}, level {label}: {error}") from error
    return levels


def generate(
    count: int, *, seed: int, boxes: int = 2, room: int = 6, steps: tuple[int, int] = (4, 40)
) -> Iterator[tuple[Level, str]]:
    """Yield different random small levels, each with a shortest solution; equal seeds give equal levels.

    A random walk carves floor into a square area of the board. The amount of floor and the straightness of the walk vary,
    so there are corridors and open rooms. Goals, boxes and the player get random floor cells; boxes are never on goals or
    dead squares.

    Args:
        count: number of levels.
        seed: seed of the random choices; the name of a level is ``SEED/NUMBER``.
        boxes: number of boxes, and of goals.
        room: side of the area in cells, 3 to 8.
        steps: smallest and largest length of the shortest solution in moves.

    Raises:
        TaskError: if a number is out of range, or such levels are too rare.
    """
    smallest, largest = 2 * boxes + 2, room * room * 9 // 10
    if not (3 <= room <= SIDE - 2) or boxes < 1 or smallest > largest:
        raise TaskError(
            f"cannot place {boxes} boxes in a room of side {room}; take 3 to {SIDE - 2} and fewer boxes, at least one"
        )
    if count < 0 or not (1 <= steps[0] <= steps[1]):
        raise TaskError(f"cannot make {count} levels of {steps} moves; give a number from 0, and the fewest and most moves")
    return _generate(count, seed, boxes, room, steps, (max(smallest, room * room // 4), largest))


def _generate(
    count: int, seed: int, boxes: int, room: int, steps: tuple[int, int], sizes: tuple[int, int]
) -> Iterator[tuple[Level, str]]:
    """Yield the levels of ``generate``; ``sizes`` are the smallest and largest number of floor cells."""
    rng = random.Random(seed)
    seen: set[Level] = set()
    refused = 0
    while len(seen) < count:
        if refused >= MAX_REFUSALS:
            raise TaskError(
                f"found {len(seen)} of {count} levels with {boxes} boxes in a room of side {room} and {steps[0]} to {steps[1]} "
                f"moves, then none in {MAX_REFUSALS} boards; ask for fewer levels or a wider range of moves"
            )
        refused += 1
        level = _random_board(rng, boxes, room, rng.randint(*sizes), f"{seed}/{len(seen)}")
        if level is None or level in seen:
            continue
        moves = solve(level, max_states=MAX_STATES, max_moves=steps[1]).moves
        if moves is not None and len(moves) >= steps[0]:
            refused = 0
            seen.add(level)
            yield level, moves


def _random_board(rng: random.Random, boxes: int, room: int, size: int, name: str) -> Level | None:
    """Return a random board with ``size`` floor cells, or None if too few of them can hold a box."""
    floor = _carve_floor(rng, room, size)
    goals = rng.sample(floor, boxes)
    dead = dead_squares(frozenset(range(SIDE * SIDE)) - frozenset(floor), frozenset(goals))
    alive = [cell for cell in floor if cell not in dead and cell not in goals]
    if len(alive) < boxes:
        return None
    symbols = ["#"] * (SIDE * SIDE)
    for cell in floor:
        symbols[cell] = "." if cell in goals else " "
    for cell in rng.sample(alive, boxes):
        symbols[cell] = "$"
    player = rng.choice([cell for cell in floor if symbols[cell] != "$"])
    symbols[player] = "+" if player in goals else "@"
    text = "".join(symbols)
    return Level(tuple(text[start : start + SIDE] for start in range(0, SIDE * SIDE, SIDE)), name)


def _carve_floor(rng: random.Random, room: int, size: int) -> list[int]:
    """Return ``size`` connected floor cells that a random walk visits in an area of ``room`` by ``room``, in order."""
    top, left = rng.randint(1, SIDE - 1 - room), rng.randint(1, SIDE - 1 - room)
    inside = {SIDE * row + column for row in range(top, top + room) for column in range(left, left + room)}
    straightness = 0.9 * rng.random()  # probability of keeping the direction
    cell = SIDE * rng.randrange(top, top + room) + rng.randrange(left, left + room)
    delta = rng.choice(DELTAS)
    floor = {cell}
    while len(floor) < size:
        if rng.random() >= straightness or cell + delta not in inside:
            delta = rng.choice(DELTAS)
        if cell + delta in inside:
            cell += delta
            floor.add(cell)
    return sorted(floor)
