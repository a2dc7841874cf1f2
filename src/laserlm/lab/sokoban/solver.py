"""Solve Sokoban levels in the fewest moves.

A search node is a board just after a push: the cells of the boxes and the player's cell. An edge is the shortest walk
to a box and the push, so its cost counts every move. The lower bound of A* is the cheapest matching of boxes to goals.
The price of a box and a goal is the number of pushes from one to the other when no other box is on the board. Other boxes
only forbid moves, and no move pushes two boxes, so the bound never exceeds the true cost. One move changes the bound by at
most one, so a node taken from the queue is never improved later.

Sets of cells are integers with one bit per cell. This module knows cell indices only, no text.

Source: A*, Hart, Nilsson and Raphael 1968; lower bound by matching, Junghanns and Schaeffer, "Sokoban: Enhancing
general single-agent search methods using domain knowledge", Artificial Intelligence 129 (2001), section 4.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Protocol

from scipy.optimize import linear_sum_assignment

SIDE = 10
"""Rows and columns of a board; the cell in row r and column c has the index 10 r + c."""

MOVES = "udlr"
"""The moves in the order of their numbers 0 to 3: up, down, left, right."""

DELTAS = (-SIDE, SIDE, -1, 1)
"""Change of the cell index by each move."""

INTERIOR = sum(1 << (SIDE * row + column) for row in range(1, SIDE - 1) for column in range(1, SIDE - 1))
"""The cells inside the border, as bits. The border counts as walls, so no index leaves the board."""

UNREACHABLE = 10**6
"""Price of a goal that a box cannot reach: more pushes than any solution has."""


class Board(Protocol):
    """The parts of a level that the solver reads, as cell indices."""

    @property
    def walls(self) -> frozenset[int]:
        """Return the cells of walls."""

    @property
    def goals(self) -> frozenset[int]:
        """Return the cells of goals."""

    @property
    def boxes(self) -> frozenset[int]:
        """Return the cells of boxes."""

    @property
    def player(self) -> int:
        """Return the player's cell."""


@dataclass(frozen=True)
class Solution:
    """The result of a search.

    Args:
        moves: the shortest solution in letters of ``MOVES``, or None if there is none or none was found.
        complete: whether the search came to its end; if not, it ran out of states and ``moves`` is None.
        states: number of states expanded.
    """

    moves: str | None
    complete: bool
    states: int


def dead_squares(walls: frozenset[int], goals: frozenset[int]) -> frozenset[int]:
    """Return the floor squares from which no pushes of one box alone bring it to any goal, wherever the player begins.

    Args:
        walls: cells of walls; the border of the board counts as walls too.
        goals: cells of goals.
    """
    free = INTERIOR & ~_bits(walls)
    live = _prices(free, tuple(sorted(goals)))[1]
    return frozenset(_cells(free & ~live))


def solve(level: Board, *, max_states: int = 200_000, max_moves: int | None = None) -> Solution:
    """Find a solution with the fewest moves (steps, not pushes); equal calls give equal solutions.

    Args:
        level: the board; its border must be walls, with as many boxes as goals.
        max_states: number of states that may be expanded.
        max_moves: longest solution of interest, in moves; a complete search without a solution then says that there is
            none of this length.
    """
    walls, goals, boxes, player = _bits(level.walls), _bits(level.goals), _bits(level.boxes), level.player
    free = INTERIOR & ~walls
    prices, live = _prices(free, tuple(sorted(level.goals)))
    limit = UNREACHABLE - 1 if max_moves is None else min(max_moves, UNREACHABLE - 1)
    matched: dict[tuple[tuple[int, ...], ...], int] = {}

    def bound(boxes: int, player: int) -> int:
        rows = tuple([prices[box][player] for box in _cells(boxes)])
        if rows not in matched:
            matched[rows] = _matching(rows)
        return matched[rows]

    # A state's key is boxes << 7 | player. The serial number makes the order of equal entries that of their discovery.
    start = boxes << 7 | player
    cost = {start: 0}
    before: dict[int, int] = {}
    rest = bound(boxes, player)
    queue = [(rest, rest, 0, start)] if rest <= limit else []
    serial = expanded = 0
    while queue:
        total, rest, _, key = heapq.heappop(queue)
        walked = total - rest
        if walked > cost[key]:
            continue
        boxes, player = key >> 7, key & 127
        if boxes == goals:
            return Solution(_moves(free, key, before), True, expanded)
        if expanded >= max_states:
            return Solution(None, False, expanded)
        expanded += 1
        for reached, pushed, steps in _pushes(free & ~boxes, live, boxes, player):
            new = reached << 7 | pushed
            walked_new = walked + steps
            if cost.get(new, UNREACHABLE) <= walked_new:
                continue
            rest = UNREACHABLE if _frozen(walls, goals, reached, reached & ~boxes) else bound(reached, pushed)
            if rest >= UNREACHABLE:
                cost[new] = -1  # lost for good, so that nothing improves on it
            elif walked_new + rest <= limit:
                cost[new] = walked_new
                before[new] = key
                serial += 1
                heapq.heappush(queue, (walked_new + rest, rest, serial, new))
    return Solution(None, True, expanded)


def _bits(cells: Iterable[int]) -> int:
    """Return the set of bits of cell indexes."""
    bits = 0
    for cell in cells:
        bits |= 1 << cell
    return bits


def _cells(bits: int) -> list[int]:
    """Return the cell indexes of a set of bits in increasing order."""
    cells = []
    while bits:
        low = bits & -bits
        cells.append(low.bit_length() - 1)
        bits ^= low
    return cells


def _region(open_cells: int, cell: int) -> int:
    """Return the open cells that a player at ``cell`` can walk to, as bits."""
    region, front = 0, 1 << cell
    while front:
        region |= front
        front = (front << 1 | front >> 1 | front << SIDE | front >> SIDE) & open_cells & ~region
    return region


@lru_cache(maxsize=32)
def _prices(free: int, goals: tuple[int, ...]) -> tuple[list[list[tuple[int, ...]]], int]:
    """Return the pushes to each goal by box cell and player's cell, for a single box; and the live cells.

    Only the region around the box that the player is in matters. Distances are computed backwards: a player next to the
    box pulls it.
    """
    regions: list[list[int]] = [[] for _ in range(SIDE * SIDE)]
    for box in _cells(free):
        for delta in DELTAS:
            beside = box + delta
            if free >> beside & 1 and not any(region >> beside & 1 for region in regions[box]):
                regions[box].append(_region(free & ~(1 << box), beside))
    pushes = [_count_pushes(free, regions, goal) for goal in goals]
    live = _bits(goals) | _bits(box for counts in pushes for box, _ in counts)
    prices: list[list[tuple[int, ...]]] = [[] for _ in range(SIDE * SIDE)]
    for box in _cells(free):
        # A player in no region around the box cannot move it: it is at a goal or never will be.
        prices[box] = [tuple(0 if box == goal else UNREACHABLE for goal in goals)] * (SIDE * SIDE)
        for number, region in enumerate(regions[box]):
            row = tuple([counts.get((box, number), UNREACHABLE) for counts in pushes])
            for player in _cells(region):
                prices[box][player] = row
    return prices, live


def _count_pushes(free: int, regions: list[list[int]], goal: int) -> dict[tuple[int, int], int]:
    """Return the pushes to a goal by box cell and number of the player's region, where there is a way."""
    counts = {(goal, number): 0 for number in range(len(regions[goal]))}
    queue = list(counts)
    for box, number in queue:  # grows while it is read: breadth first
        pushes = counts[box, number] + 1
        region = regions[box][number]
        for delta in DELTAS:
            origin, stand = box - delta, box - 2 * delta
            if region >> origin & 1 and free >> stand & 1:
                state = (origin, next(i for i, around in enumerate(regions[origin]) if around >> stand & 1))
                if state not in counts:
                    counts[state] = pushes
                    queue.append(state)
    return counts


def _matching(rows: tuple[tuple[int, ...], ...]) -> int:
    """Return the least sum of one entry of each row, no two in the same column."""
    if len(rows) <= 4:
        return min(
            sum(row[column] for row, column in zip(rows, order, strict=True)) for order in permutations(range(len(rows)))
        )
    chosen = linear_sum_assignment(rows)[1]
    return sum(row[int(column)] for row, column in zip(rows, chosen, strict=True))


def _pushes(open_cells: int, live: int, boxes: int, player: int) -> Iterator[tuple[int, int, int]]:
    """Yield the boxes after each possible push to a live cell, the player's cell then, and the moves spent."""
    targets = open_cells & live
    stands = (
        (boxes & targets << SIDE) << SIDE & open_cells,
        (boxes & targets >> SIDE) >> SIDE & open_cells,
        (boxes & targets << 1) << 1 & open_cells,
        (boxes & targets >> 1) >> 1 & open_cells,
    )
    unreached = stands[0] | stands[1] | stands[2] | stands[3]
    seen = front = 1 << player
    moves = 1
    while front and unreached:
        if front & unreached:
            for delta, places in zip(DELTAS, stands, strict=True):
                for stand in _cells(places & front):
                    box = stand + delta
                    yield boxes ^ 1 << box ^ 1 << box + delta, box, moves
            unreached &= ~front
        front = (front << 1 | front >> 1 | front << SIDE | front >> SIDE) & open_cells & ~seen
        seen |= front
        moves += 1


def _frozen(walls: int, goals: int, boxes: int, pushed: int) -> bool:
    """Return whether the pushed box is in a square of four walls and boxes with a box off goal.

    Nothing in such a square ever moves: each of its boxes has in each direction of the board a neighbour in the square,
    which either blocks the push or occupies the place to push from, and none can be the first to go.
    """
    full = walls | boxes
    beside = full & (pushed << 1 | pushed >> 1)
    if not beside:
        return False
    for side in (pushed << 1, pushed >> 1):
        if side & full:
            pair = pushed | side
            for square in (pair | pair << SIDE, pair | pair >> SIDE):
                if square & full == square and square & boxes & ~goals:
                    return True
    return False


def _moves(free: int, key: int, before: dict[int, int]) -> str:
    """Return the letters of the moves that lead from the start to a state."""
    parts: list[str] = []
    while key in before:
        last = before[key]
        boxes, box = last >> 7, key & 127
        delta = ((key >> 7) & ~boxes).bit_length() - 1 - box
        parts.append(_walk(free & ~boxes, last & 127, box - delta) + MOVES[DELTAS.index(delta)])
        key = last
    return "".join(reversed(parts))


def _walk(open_cells: int, start: int, end: int) -> str:
    """Return the letters of a shortest walk over open cells; ``end`` can be reached."""
    fronts = [1 << start]
    seen = fronts[0]
    while not fronts[-1] >> end & 1:
        front = fronts[-1]
        front = (front << 1 | front >> 1 | front << SIDE | front >> SIDE) & open_cells & ~seen
        seen |= front
        fronts.append(front)
    letters = ""
    for front in reversed(fronts[:-1]):
        move = next(i for i, delta in enumerate(DELTAS) if front >> (end - delta) & 1)
        letters = MOVES[move] + letters
        end -= DELTAS[move]
    return letters
