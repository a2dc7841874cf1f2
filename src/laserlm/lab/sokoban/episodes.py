"""Solved levels: what a model learns from, and the task that it is measured by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from laserlm.lab.sokoban.dynamics import State, step
from laserlm.lab.sokoban.levels import DELTAS, MOVES, SIDE, Level
from laserlm.lab.sokoban.model import CELL_PLACES, FIRST_MOVE, LEVEL, LINE_END, MAX_STEPS, PAD
from laserlm.lab.sokoban.solver import solve
from laserlm.tasks import Decoding, Example, Task

__all__ = ["Episodes", "Solved", "outline", "replay", "solved", "symmetries", "task"]

Solved = tuple[Level, str]
"""A level and a solution of it."""


@cache
def symmetries() -> tuple[Tensor, Tensor]:
    """Return, of each symmetry of the square, the cell that comes to each place, (8, 100), and each move's image, (8, 4)."""
    square = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    turned = [torch.rot90(s, k) for s in (square, square.T) for k in range(4)]
    comes = torch.stack([t.flatten() for t in turned])  # (8, 100)
    goes = comes.argsort(1)  # the place that each cell goes to
    middle = SIDE * SIDE // 2 + SIDE // 2
    images = [[DELTAS.index(int(to[middle + d] - to[middle])) for d in DELTAS] for to in goes]
    return comes, torch.tensor(images)


def outline(level: Level) -> str:
    """Return a text that levels share if one is the other shifted, turned or mirrored."""
    board = _trimmed(_trimmed(level.rows))
    ways = [rows[::up] for rows in (board, _transposed(board)) for up in (1, -1)]
    return min("\n".join(row[::left] for row in rows) for rows in ways for left in (1, -1))


def _trimmed(rows: Sequence[str]) -> list[str]:
    """Return the columns from the first to the last that is not all wall, as rows."""
    inside = [i for i, row in enumerate(rows) if row.strip("#")]
    return _transposed(rows[inside[0] : inside[-1] + 1])


def _transposed(rows: Sequence[str]) -> list[str]:
    return ["".join(column) for column in zip(*rows, strict=True)]


class Episodes(Dataset[dict[str, Tensor]]):
    """Solved levels as the model reads them, each turned and mirrored in all eight ways.

    Args:
        solved: levels with solutions.
    """

    def __init__(self, solved: Sequence[Solved]) -> None:
        self.codes = torch.tensor([level.codes for level, _ in solved])  # (n, 100)
        self.moves = [torch.tensor([MOVES.index(m) for m in moves]) for _, moves in solved]
        self.longest = max(map(len, self.moves))

    def __len__(self) -> int:
        return len(symmetries()[0]) * len(self.moves)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        level, way = divmod(index, len(symmetries()[0]))
        comes, images = (of[way] for of in symmetries())
        moves = images[self.moves[level]]
        pad = self.longest - len(moves)
        ids = torch.full((self.longest + LEVEL,), PAD)
        ids[pad : pad + LEVEL] = LINE_END
        ids[pad + CELL_PLACES] = self.codes[level][comes]
        ids[pad + LEVEL :] = FIRST_MOVE + moves
        where = torch.arange(len(ids))
        return {
            "input_ids": ids,
            "attention_mask": (where >= pad).long(),
            "labels": ids.where(where >= pad + LEVEL, -100),
        }


def replay(level: Level, moves: str) -> tuple[bool, float, int]:
    """Return whether moves solve a level, their return, and the steps until it is solved or the moves end."""
    state, total, steps = State.of(torch.tensor([level.codes])), 0.0, 0
    for move in moves:
        if bool(state.solved):
            break
        state, reward = step(state, torch.tensor([MOVES.index(move)]))
        total, steps = total + float(reward), steps + 1
    return bool(state.solved), total, steps


def solved(levels: Sequence[Level], on_progress: Callable[[int, int], None] | None = None) -> list[Solved]:
    """Return the levels that the solver solves, each with a solution of fewest moves.

    Others are left out, and so are those that are solved as they are or take more moves than the model can make.

    Args:
        levels: to be solved.
        on_progress: called after each with the number of levels done and their total.
    """
    found = []
    for done, level in enumerate(levels, start=1):
        moves = solve(level, max_moves=MAX_STEPS).moves
        if moves:
            found.append((level, moves))
        if on_progress is not None:
            on_progress(done, len(levels))
    return found


def task(episodes: Iterable[Solved], *, max_steps: int = 60) -> Task:
    """Return the task of solving levels: a fifth of them for validation, the others for test, copies never on both sides.

    The answer to a level is its solution, whose loss ranks candidates; the model then plays, and is right where it solves
    the level within ``max_steps``.
    """
    levels: dict[str, Level] = {}
    examples = []
    for level, moves in episodes:
        levels[level.name] = level
        examples.append(
            Example(id=level.name, prompt=level.text, answer=moves, group=f"boxes: {len(level.boxes)}", fact=outline(level))
        )

    def judge(example: Example, played: list[Any]) -> tuple[bool, dict[str, float]]:
        right, total, steps = replay(levels[example.id], played[0])
        return right, {"return": total, "steps": float(steps)}

    return Task.of("sokoban", examples, scorer="rollout", decoding=Decoding(new_tokens=max_steps), judge=judge)
