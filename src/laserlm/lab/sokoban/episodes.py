"""Solved levels: the training examples of a model, and its task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from laserlm.lab.sokoban.dynamics import State, step
from laserlm.lab.sokoban.levels import Level
from laserlm.lab.sokoban.model import CELL_POSITIONS, FIRST_MOVE_TOKEN, LEVEL_TOKENS, LINE_END_TOKEN, MAX_STEPS, PAD_TOKEN
from laserlm.lab.sokoban.solver import DELTAS, MOVES, SIDE, solve
from laserlm.tasks import Decoding, Example, Task

SolvedLevel = tuple[Level, str]
"""A level and its solution."""


@cache
def symmetries() -> tuple[Tensor, Tensor]:
    """Return the eight symmetries of the square: the source cell of each cell, (8, 100), and the image of each move, (8, 4)."""
    square = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    turned = [torch.rot90(s, k) for s in (square, square.T) for k in range(4)]
    sources = torch.stack([t.flatten() for t in turned])  # (8, 100)
    targets = sources.argsort(1)
    middle = SIDE * SIDE // 2 + SIDE // 2
    moves = [[DELTAS.index(int(target[middle + d] - target[middle])) for d in DELTAS] for target in targets]
    return sources, torch.tensor(moves)


def canonical_board(level: Level) -> str:
    """Return a text that is equal for levels that are shifted, turned or mirrored copies of each other."""
    board = _trimmed(_trimmed(level.rows))
    variants = [rows[::vertical] for rows in (board, _transposed(board)) for vertical in (1, -1)]
    return min("\n".join(row[::horizontal] for row in rows) for rows in variants for horizontal in (1, -1))


def _trimmed(rows: Sequence[str]) -> list[str]:
    """Drop the outer rows that are all wall; return the columns of the rest as rows."""
    inner = [i for i, row in enumerate(rows) if row.strip("#")]
    return _transposed(rows[inner[0] : inner[-1] + 1])


def _transposed(rows: Sequence[str]) -> list[str]:
    return ["".join(column) for column in zip(*rows, strict=True)]


class Episodes(Dataset[dict[str, Tensor]]):
    """Solved levels as the model reads them, each in all eight symmetries."""

    def __init__(self, solved_levels: Sequence[SolvedLevel]) -> None:
        self.codes = torch.tensor([level.codes for level, _ in solved_levels])  # (n, 100)
        self.moves = [torch.tensor([MOVES.index(m) for m in moves]) for _, moves in solved_levels]
        self.max_moves = max(map(len, self.moves))

    def __len__(self) -> int:
        return len(symmetries()[0]) * len(self.moves)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        level, symmetry = divmod(index, len(symmetries()[0]))
        sources, images = (table[symmetry] for table in symmetries())
        moves = images[self.moves[level]]
        pad = self.max_moves - len(moves)
        ids = torch.full((self.max_moves + LEVEL_TOKENS,), PAD_TOKEN)
        ids[pad : pad + LEVEL_TOKENS] = LINE_END_TOKEN
        ids[pad + CELL_POSITIONS] = self.codes[level][sources]
        ids[pad + LEVEL_TOKENS :] = FIRST_MOVE_TOKEN + moves
        positions = torch.arange(len(ids))
        return {
            "input_ids": ids,
            "attention_mask": (positions >= pad).long(),
            "labels": ids.where(positions >= pad + LEVEL_TOKENS, -100),
        }


def replay(level: Level, moves: str) -> tuple[bool, float, int]:
    """Return whether moves solve a level, their return, and the number of steps until the solution or the last move."""
    state, total, steps = State.of(torch.tensor([level.codes])), 0.0, 0
    for move in moves:
        if bool(state.solved):
            break
        state, reward = step(state, torch.tensor([MOVES.index(move)]))
        total, steps = total + float(reward), steps + 1
    return bool(state.solved), total, steps


def solve_levels(levels: Sequence[Level], on_progress: Callable[[int, int], None] | None = None) -> list[SolvedLevel]:
    """Return the levels that the solver solves, each with a shortest solution.

    Levels that are solved at the start, or that need more moves than the model supports, are left out.

    Args:
        levels: the levels to solve.
        on_progress: called after each level with the number of levels done and their total.
    """
    solved = []
    for done, level in enumerate(levels, start=1):
        moves = solve(level, max_moves=MAX_STEPS).moves
        if moves:
            solved.append((level, moves))
        if on_progress is not None:
            on_progress(done, len(levels))
    return solved


def task(episodes: Iterable[SolvedLevel], *, max_steps: int = 60) -> Task:
    """Return the task of solving levels: a fifth of them for validation, the rest for test.

    The symmetric copies of a level are all in one split. The answer to a level is its solution, whose loss ranks the
    candidates of a search. The model is right if it solves the level within ``max_steps`` moves.
    """
    levels: dict[str, Level] = {}
    examples = []
    for level, moves in episodes:
        levels[level.name] = level
        examples.append(
            Example(
                id=level.name, prompt=level.text, answer=moves, group=f"boxes: {len(level.boxes)}", fact=canonical_board(level)
            )
        )

    def judge(example: Example, played: list[Any]) -> tuple[bool, dict[str, float]]:
        is_solved, total, steps = replay(levels[example.id], played[0])
        return is_solved, {"return": total, "steps": float(steps)}

    return Task.of("sokoban", examples, scorer="rollout", decoding=Decoding(new_tokens=max_steps), judge=judge)
