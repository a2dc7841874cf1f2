"""The exact solver, beside breadth-first search over single moves."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path

import pytest
import torch

from laserlm.lab.sokoban.dynamics import State, step
from laserlm.lab.sokoban.levels import Level, generate, read_boxoban
from laserlm.lab.sokoban.solver import MOVES, dead_squares, solve

WALL = "#" * 10


def board(*inner: str) -> Level:
    """Return a level of the rows from row 1 on; the rest is wall."""
    return Level((WALL, *(f"#{row:#<9}" for row in inner), *([WALL] * (9 - len(inner)))))


def fewest_moves(walls: frozenset[int], goals: frozenset[int], starts: list[tuple[int, frozenset[int]]]) -> int | None:
    """Return the fewest moves from any of the starts (player, boxes) to one with all boxes on goals, or None."""
    queue = deque((start, 0) for start in starts)
    seen = set(starts)
    while queue:
        (player, boxes), moves = queue.popleft()
        if boxes <= goals:
            return moves
        for delta in (-10, 10, -1, 1):
            ahead, behind = player + delta, player + 2 * delta
            if ahead in walls or (ahead in boxes and (behind in walls or behind in boxes)):
                continue
            new = (ahead, boxes - {ahead} | {behind} if ahead in boxes else boxes)
            if new not in seen:
                seen.add(new)
                queue.append((new, moves + 1))
    return None


def fewest(level: Level) -> int | None:
    return fewest_moves(level.walls, level.goals, [(level.player, level.boxes)])


def solves(level: Level, moves: str) -> bool:
    state = State.of(torch.tensor([level.codes]))
    for move in moves:
        state, _ = step(state, torch.tensor([MOVES.index(move)]))
    return bool(state.solved)


def random_board(rng: random.Random, boxes: int) -> Level:
    """Return a board with everything placed at random in 5 by 5 cells, solvable or not."""
    cells = [10 * r + c for r in range(1, 6) for c in range(1, 6)]
    floor = rng.sample(cells, rng.randint(15, 25))
    symbols = dict.fromkeys(floor, " ")
    symbols.update(dict.fromkeys(rng.sample(floor, boxes), "."))
    for cell in rng.sample(floor, boxes):
        symbols[cell] = "*" if symbols[cell] == "." else "$"
    player = rng.choice([cell for cell in floor if symbols[cell] in " ."])
    symbols[player] = "+" if symbols[player] == "." else "@"
    text = "".join(symbols.get(cell, "#") for cell in range(100))
    return Level(tuple(text[i : i + 10] for i in range(0, 100, 10)))


@pytest.mark.parametrize(
    ("level", "dead"),
    [
        # An open room with the goal in the middle: all along the walls, corners included.
        (board("     ", " @$  ", "  .  ", "     "), {11, 12, 13, 14, 15, 21, 25, 31, 35, 41, 42, 43, 44, 45}),
        # A goal at a wall: along this wall only the corners.
        (board("  .  ", " @$  ", "     ", "     "), {11, 15, 21, 25, 31, 35, 41, 42, 43, 44, 45}),
        # A corridor: the ends, from where no push is possible.
        (board("@ $ . "), {11, 16}),
        # A cross of corridors, goal below its middle: from a side arm the player cannot get round the box.
        (board("## ", "@$   ", "## ", "##.", "## "), {13, 21, 22, 24, 25, 53}),
        # A goal in a corner is no dead square, though no box ever leaves it.
        (board(".  ", " $ ", "  @"), {13, 23, 31, 32, 33}),
        # A goal that no box can be pushed to: every other square is dead.
        (board("  #.", " $##", "  @"), {11, 12, 21, 22, 31, 32, 33}),
    ],
)
def test_dead_squares_are_those_found_by_hand(level: Level, dead: set[int]) -> None:
    assert dead_squares(level.walls, level.goals) == dead


def test_a_square_is_dead_exactly_if_no_search_solves_it_from_any_place_of_the_player() -> None:
    rng = random.Random(0)
    kinds = {True: 0, False: 0}
    for number in range(30):
        level = random_board(rng, 1 + number % 2)  # one box, and one or two goals that it may end on
        dead = dead_squares(level.walls, level.goals)
        floor = set(range(100)) - level.walls
        assert dead <= floor
        for box in floor:
            starts = [(player, frozenset({box})) for player in floor - {box}]
            is_dead = fewest_moves(level.walls, level.goals, starts) is None
            assert (box in dead) == is_dead
            kinds[is_dead] += 1
    assert min(kinds.values()) > 100


@pytest.mark.parametrize(("boxes", "count"), [(1, 20), (2, 20)])
def test_solutions_of_generated_levels_have_the_fewest_moves(boxes: int, count: int) -> None:
    for level, moves in generate(count, seed=7, boxes=boxes, room=5):
        assert len(moves) == fewest(level)
        assert solves(level, moves)
        assert solve(level).moves == moves


def test_random_boards_are_solved_in_the_fewest_moves_or_not_at_all() -> None:
    rng = random.Random(1)
    lengths = []
    for number in range(400):
        level = random_board(rng, 1 + number % 3)
        expected, solution = fewest(level), solve(level)
        assert solution.complete
        if expected is None:
            assert solution.moves is None
        else:
            assert solution.moves is not None
            assert len(solution.moves) == expected
            assert solves(level, solution.moves)
        lengths.append(expected)
    assert lengths.count(None) > 30
    assert len(lengths) - lengths.count(None) > 30


@pytest.mark.parametrize(
    ("level", "moves"),
    [
        (board("@ $."), "rr"),
        (board("@*"), ""),
        (board("   ", "@$ ", "  ."), "rurd"),
        (board("@$ ", "# .", "#  "), None),
        (board("@ $# .", "######"), None),
        (board("$$..", "@   "), None),
    ],
)
def test_small_levels_are_solved_as_by_hand(level: Level, moves: str | None) -> None:
    solution = solve(level)
    assert solution.complete
    assert solution.moves == moves


def test_more_than_four_boxes_are_solved() -> None:
    # Five boxes under five goals: a push, then for each further box down, right and up.
    level = board(".....  ", "$$$$$  ", "@      ")
    solution = solve(level)
    assert solution.moves is not None
    assert len(solution.moves) == 13
    assert solves(level, solution.moves)


def test_a_search_that_runs_out_of_states_says_so() -> None:
    level, moves = next(generate(1, seed=0, boxes=2, steps=(20, 40)))
    full = solve(level)
    short = solve(level, max_states=full.states - 1)
    assert (short.moves, short.complete, short.states) == (None, False, full.states - 1)
    assert solve(level, max_states=full.states).moves == moves


def test_a_bound_on_the_moves_is_exact() -> None:
    for level, moves in generate(10, seed=3):
        assert solve(level, max_moves=len(moves)).moves == moves
        short = solve(level, max_moves=len(moves) - 1)
        assert (short.moves, short.complete) == (None, True)


@pytest.mark.realdata
@pytest.mark.parametrize(("first", "end"), [(0, 2), pytest.param(2, 5, marks=pytest.mark.slow)])
def test_published_levels_are_solved(first: int, end: int, real_data: Path) -> None:
    for level in read_boxoban(real_data / "boxoban" / "unfiltered_valid_000.txt")[first:end]:
        solution = solve(level)
        assert solution.complete
        assert solution.moves is not None
        assert solves(level, solution.moves)
