"""Sokoban as a Gymnasium environment, by the rules of ``dynamics`` on a batch of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from laserlm.errors import MissingExtraError, TaskError
from laserlm.lab.sokoban.dynamics import State, step
from laserlm.lab.sokoban.levels import CELLS, Level
from laserlm.lab.sokoban.solver import MOVES, SIDE

try:
    import gymnasium
except ImportError as error:
    raise MissingExtraError("the Sokoban environment needs Gymnasium; run: pip install 'laserlm[rl]'") from error

PIXELS = 16
"""Side of a cell in a picture, in pixels."""

COLOURS = np.array(
    [
        (238, 232, 213),  # floor
        (203, 75, 22),  # goal
        (88, 110, 117),  # wall
        (181, 137, 0),  # box
        (133, 153, 0),  # box on goal
        (38, 139, 210),  # player
        (108, 113, 196),  # player on goal
    ],
    dtype=np.uint8,
)
"""Red, green and blue of each cell code."""


class Sokoban(gymnasium.Env[NDArray[np.uint8], np.int64]):
    """An environment of levels. An observation is the (10, 10) cell codes, an action the number of a move in ``MOVES``.

    An episode terminates when all boxes are on goals. It is truncated after ``max_steps`` steps. The info dictionary of each
    step has ``solved``, ``boxes_on_goals`` and ``steps``, the number of steps since the reset.

    Args:
        levels: the levels to choose from.
        max_steps: steps of an episode, at least 1.
        render_mode: ``ansi`` for text, ``rgb_array`` for a picture, or None.

    Raises:
        TaskError: if there is no level, no step or no such render mode.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # type: ignore[misc]

    def __init__(self, levels: Sequence[Level], *, max_steps: int = 120, render_mode: str | None = None) -> None:
        if not levels:
            raise TaskError("the environment needs at least one level, for example from levels.generate")
        if max_steps < 1:
            raise TaskError(f"max_steps must be at least 1, got {max_steps}")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise TaskError(f"no render mode {render_mode!r}; there are 'ansi' and 'rgb_array', or None")
        self.levels = tuple(levels)
        self.max_steps = max_steps
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(0, len(CELLS) - 1, (SIDE, SIDE), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(len(MOVES))
        self._state: State | None = None
        self._steps = 0
        self._ended = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Start the level with index ``options["level"]``, or else a random level; return observation and info.

        Args:
            seed: seed of all random choices from now on.
            options: may hold ``level``.

        Raises:
            TaskError: if there is no level with this index.
        """
        super().reset(seed=seed)
        index = (options or {}).get("level")
        if index is None:
            index = int(self.np_random.integers(len(self.levels)))
        elif not (0 <= index < len(self.levels)):
            raise TaskError(f"no level {index}; this environment's levels are 0 to {len(self.levels) - 1}")
        self._state = State.of(torch.tensor([self.levels[index].codes]))
        self._steps = 0
        self._ended = False
        return self._codes(self._state), self._info(self._state)

    def step(self, action: np.int64) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Make a move; an impossible move changes nothing and costs a step.

        Returns:
            The observation, the reward, whether the level is solved, whether the steps are used up, the info.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset, or after the end of the episode.
            gymnasium.error.InvalidAction: if there is no such move.
        """
        if self._state is None or self._ended:
            when = "before the first reset" if self._state is None else f"after the episode ended at step {self._steps}"
            raise gymnasium.error.ResetNeeded(f"step() was called {when}; call reset() first")
        if not self.action_space.contains(action):
            raise gymnasium.error.InvalidAction(
                f"no move {action!r}; the moves are 0 to {len(MOVES) - 1}, in the order {MOVES!r}"
            )
        self._state, rewards = step(self._state, torch.tensor([int(action)]))
        self._steps += 1
        terminated = bool(self._state.solved)
        truncated = not terminated and self._steps >= self.max_steps
        self._ended = terminated or truncated
        return self._codes(self._state), float(rewards), terminated, truncated, self._info(self._state)

    def render(self) -> str | NDArray[np.uint8] | None:
        """Return the board as ten lines of text or as a (160, 160, 3) picture, by the render mode; None without one.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self._state is None:
            raise gymnasium.error.ResetNeeded("render() was called before the first reset; call reset() first")
        codes = self._codes(self._state)
        if self.render_mode == "ansi":
            return "".join("".join(CELLS[code] for code in row) + "\n" for row in codes)
        if self.render_mode == "rgb_array":
            picture: NDArray[np.uint8] = COLOURS[codes].repeat(PIXELS, axis=0).repeat(PIXELS, axis=1)
            return picture
        return None

    def _codes(self, state: State) -> NDArray[np.uint8]:
        codes: NDArray[np.uint8] = state.codes.view(SIDE, SIDE).numpy().astype(np.uint8)
        return codes

    def _info(self, state: State) -> dict[str, Any]:
        on_goals = int((state.boxes & state.goals).sum())
        return {"solved": bool(state.solved), "boxes_on_goals": on_goals, "steps": self._steps}
