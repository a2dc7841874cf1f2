"""The rules of Sokoban on batches of boards, as tensors.

Source of the rewards: Weber et al., "Imagination-augmented agents", arXiv 1707.06203, as in gym-sokoban and Boxoban.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laserlm.lab.sokoban.levels import CELLS
from laserlm.lab.sokoban.solver import DELTAS, SIDE

REWARD_STEP = -0.1
"""Reward of every step, also of a step that moves nothing."""

REWARD_ON_GOAL = 1.0
"""Reward of pushing a box onto a goal."""

REWARD_OFF_GOAL = -1.0
"""Reward of pushing a box off a goal. A push from goal to goal gets both."""

REWARD_SOLVED = 10.0
"""Reward of the step that solves the level, in addition to the reward of its push."""

FLOOR, GOAL, WALL, BOX, BOX_ON_GOAL, PLAYER, PLAYER_ON_GOAL = range(len(CELLS))


def _next_cells() -> Tensor:
    """Return the cell that each move leads to from each cell, (4, 100); a move off the board leads to the cell itself."""
    cells = torch.arange(SIDE * SIDE)
    row, column = cells // SIDE, cells % SIDE
    off = torch.stack([row == 0, row == SIDE - 1, column == 0, column == SIDE - 1])
    return torch.where(off, cells, cells + torch.tensor(DELTAS)[:, None])


NEXT = _next_cells()


@dataclass(frozen=True, eq=False)
class State:
    """Boards of a batch.

    Args:
        walls: (B, 100), bool.
        goals: (B, 100), bool.
        boxes: (B, 100), bool.
        player: (B,), long, the player's cell.
    """

    walls: Tensor
    goals: Tensor
    boxes: Tensor
    player: Tensor

    @classmethod
    def of(cls, codes: Tensor) -> State:
        """Read boards of cell codes, (B, 100), integers.

        All codes are accepted, so rows that pad a batch may hold anything. An unknown code is floor, the first of several
        players counts, and a board without a player gets one in cell 0.
        """
        player = (codes == PLAYER) | (codes == PLAYER_ON_GOAL)  # (B, 100)
        return cls(
            walls=codes == WALL,
            goals=(codes == GOAL) | (codes == BOX_ON_GOAL) | (codes == PLAYER_ON_GOAL),
            boxes=(codes == BOX) | (codes == BOX_ON_GOAL),
            player=player.long().argmax(dim=1),  # the first of equal values
        )

    @property
    def codes(self) -> Tensor:
        """Return the cell codes, (B, 100), long."""
        codes = torch.where(self.walls, WALL, self.goals.long())  # (B, 100)
        codes = torch.where(self.boxes, BOX + self.goals.long(), codes)
        on_goal = self.goals.gather(1, self.player[:, None]).long()  # (B, 1)
        return codes.scatter(1, self.player[:, None], PLAYER + on_goal)

    @property
    def solved(self) -> Tensor:
        """Return whether there are boxes and all are on goals, (B,), bool."""
        return self.boxes.any(dim=1) & ~(self.boxes & ~self.goals).any(dim=1)

    @property
    def planes(self) -> Tensor:
        """Return walls, goals, boxes and player as binary planes, (B, 4, 10, 10), float32."""
        player = torch.zeros_like(self.walls).scatter(1, self.player[:, None], True)
        planes = torch.stack([self.walls, self.goals, self.boxes, player], dim=1)  # (B, 4, 100)
        return planes.float().view(-1, 4, SIDE, SIDE)


def step(state: State, moves: Tensor) -> tuple[State, Tensor]:
    """Move each player; a player pushes one box if the cell behind the box is free.

    A move against a wall, or against a box with a wall or a box behind it, changes nothing and costs a step.

    Args:
        state: boards of B levels; nothing leaves the board, even without walls at the border.
        moves: (B,), long, 0 to 3 as in ``MOVES``; other values are clamped.

    Returns:
        The new boards, and the rewards, (B,), float32.
    """
    table = NEXT.to(state.player.device)
    moves = moves.clamp(0, len(DELTAS) - 1)
    ahead = table[moves, state.player]  # (B,)
    behind = table[moves, ahead]
    pushes = _at(state.boxes, ahead)
    blocked = _at(state.walls, ahead) | (pushes & (_at(state.walls, behind) | _at(state.boxes, behind)))
    pushes &= ~blocked
    player = torch.where(blocked, state.player, ahead)
    boxes = state.boxes.scatter(1, ahead[:, None], (_at(state.boxes, ahead) & ~pushes)[:, None])
    boxes = boxes.scatter(1, behind[:, None], (_at(boxes, behind) | pushes)[:, None])
    new = State(state.walls, state.goals, boxes, player)
    rewards = (
        REWARD_STEP
        + REWARD_ON_GOAL * (pushes & _at(state.goals, behind))
        + REWARD_OFF_GOAL * (pushes & _at(state.goals, ahead))
        + REWARD_SOLVED * (new.solved & ~state.solved)
    )
    return new, rewards.float()


def _at(cells: Tensor, index: Tensor) -> Tensor:
    """Return each board's value at its own cell: (B, 100) and (B,) to (B,)."""
    return cells.gather(1, index[:, None]).squeeze(1)
