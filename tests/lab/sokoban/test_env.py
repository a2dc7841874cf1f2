"""The Gymnasium environment."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from laserlm.errors import TaskError
from laserlm.lab.sokoban.env import Sokoban
from laserlm.lab.sokoban.levels import Level, generate
from laserlm.lab.sokoban.solver import MOVES

MADE = list(generate(8, seed=0))
LEVELS = [level for level, _ in MADE]


@pytest.fixture
def registered() -> Iterator[str]:
    """The name of the environment in Gymnasium's register, where the checker makes its copies."""
    name = "Sokoban-v0"
    gymnasium.register(name, entry_point=Sokoban)
    yield name
    del gymnasium.registry[name]


@pytest.mark.parametrize("mode", [None, "ansi", "rgb_array"])
def test_gymnasium_finds_no_fault(registered: str, mode: str | None) -> None:
    check_env(gymnasium.make(registered, levels=LEVELS, render_mode=mode).unwrapped)


def test_a_solution_ends_the_episode_with_everything_on_goals() -> None:
    env = Sokoban(LEVELS)
    for index, (level, moves) in enumerate(MADE):
        codes, info = env.reset(options={"level": index})
        assert tuple(codes.flatten()) == level.codes
        assert info == {"solved": False, "boxes_on_goals": 0, "steps": 0}
        total = 0.0
        for number, move in enumerate(moves, start=1):
            codes, reward, terminated, truncated, info = env.step(np.int64(MOVES.index(move)))
            total += reward
            assert terminated == info["solved"] == (number == len(moves))
            assert not truncated
        assert info == {"solved": True, "boxes_on_goals": 2, "steps": len(moves)}
        assert total == pytest.approx(12 - 0.1 * len(moves), abs=1e-4)  # two boxes onto goals, each once in the end
        assert not (codes == 3).any()


def test_equal_seeds_choose_equal_levels() -> None:
    def chosen(seed: int) -> list[bytes]:
        env = Sokoban(LEVELS)
        first = env.reset(seed=seed)[0].tobytes()
        return [first, *(env.reset()[0].tobytes() for _ in range(20))]

    assert chosen(3) == chosen(3)
    assert chosen(3) != chosen(4)
    assert len(set(chosen(3))) > 4


def test_an_episode_is_truncated_at_its_last_step() -> None:
    env = Sokoban(LEVELS, max_steps=3)
    env.reset(options={"level": 0})
    ends = [env.step(np.int64(move))[2:4] for move in (0, 1, 0)]
    assert ends == [(False, False), (False, False), (False, True)]


def test_a_level_solved_at_the_last_step_is_terminated_and_not_truncated() -> None:
    level, moves = MADE[0]
    env = Sokoban([level], max_steps=len(moves))
    env.reset()
    for move in moves:
        _, _, terminated, truncated, _ = env.step(np.int64(MOVES.index(move)))
    assert (terminated, truncated) == (True, False)


def test_a_step_needs_an_episode() -> None:
    env = Sokoban(LEVELS, max_steps=1, render_mode="ansi")
    with pytest.raises(gymnasium.error.ResetNeeded, match="before the first reset"):
        env.step(np.int64(0))
    with pytest.raises(gymnasium.error.ResetNeeded, match="before the first reset"):
        env.render()
    env.reset()
    env.step(np.int64(0))
    with pytest.raises(gymnasium.error.ResetNeeded, match="ended at step 1"):
        env.step(np.int64(0))
    env.reset()
    env.step(np.int64(0))


def test_an_unknown_move_is_refused() -> None:
    env = Sokoban(LEVELS)
    env.reset()
    with pytest.raises(gymnasium.error.InvalidAction, match="udlr"):
        env.step(np.int64(4))


def test_text_and_picture_show_the_board() -> None:
    level = LEVELS[1]
    text, picture = Sokoban(LEVELS, render_mode="ansi"), Sokoban(LEVELS, render_mode="rgb_array")
    for env in (text, picture):
        env.reset(options={"level": 1})
    assert text.render() == level.text
    image = picture.render()
    assert isinstance(image, np.ndarray)
    assert (image.shape, image.dtype) == ((160, 160, 3), np.uint8)
    colours = {tuple(image[16 * (c // 10) + 8, 16 * (c % 10) + 8]): code for c, code in enumerate(level.codes)}
    assert sorted(colours.values()) == sorted(set(level.codes))  # a colour for each code
    for c, code in enumerate(level.codes):
        cell = image[16 * (c // 10) : 16 * (c // 10) + 16, 16 * (c % 10) : 16 * (c % 10) + 16]
        assert {colours[tuple(pixel)] for pixel in cell.reshape(-1, 3)} == {code}


def test_what_the_environment_cannot_do_is_refused() -> None:
    with pytest.raises(TaskError, match="at least one level"):
        Sokoban([])
    with pytest.raises(TaskError, match="max_steps must be at least 1, got 0"):
        Sokoban(LEVELS, max_steps=0)
    with pytest.raises(TaskError, match="'human'"):
        Sokoban(LEVELS, render_mode="human")
    for wrong in (-1, 8):
        with pytest.raises(TaskError, match=f"no level {wrong}"):
            Sokoban(LEVELS).reset(options={"level": wrong})


def test_a_level_with_a_box_pushed_off_its_goal_pays_one() -> None:
    env = Sokoban([Level(("#" * 10, "#@* $.####", *["#" * 10] * 8))])
    assert env.reset()[1]["boxes_on_goals"] == 1
    _, reward, _, _, info = env.step(np.int64(3))
    assert reward == pytest.approx(-1.1)
    assert info == {"solved": False, "boxes_on_goals": 0, "steps": 1}
