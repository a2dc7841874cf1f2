"""The rules of Sokoban as tensors, beside a plain simulator and results by hand."""

from __future__ import annotations

import random

import pytest
import torch

from laserlm.lab.sokoban.dynamics import REWARD_OFF_GOAL, REWARD_ON_GOAL, REWARD_SOLVED, REWARD_STEP, State, step
from laserlm.lab.sokoban.levels import Level, generate
from laserlm.lab.sokoban.solver import MOVES

WALL = "#" * 10


def board(*inner: str) -> Level:
    """Return a level of the rows from row 1 on; the rest is wall."""
    return Level((WALL, *(f"#{row:#<9}" for row in inner), *([WALL] * (9 - len(inner)))))


def state_of(*levels: Level) -> State:
    return State.of(torch.tensor([level.codes for level in levels]))


def played(level: Level, moves: str) -> tuple[State, list[float]]:
    """Return the state after the moves, and their rewards."""
    state, rewards = state_of(level), []
    for move in moves:
        state, reward = step(state, torch.tensor([MOVES.index(move)]))
        rewards.append(reward.item())
    return state, rewards


def simulated(rows: list[list[str]], move: str) -> float:
    """Make a move on a board of symbols in place by the rules as told to people, and return the reward."""
    r, c = next((r, c) for r in range(10) for c in range(10) if rows[r][c] in "@+")
    dr, dc = {"u": (-1, 0), "d": (1, 0), "l": (0, -1), "r": (0, 1)}[move]
    ahead = rows[r + dr][c + dc]
    if ahead == "#":
        return -0.1
    reward = -0.1
    if ahead in "$*":
        behind = rows[r + 2 * dr][c + 2 * dc]
        if behind not in " .":
            return -0.1
        rows[r + 2 * dr][c + 2 * dc] = {" ": "$", ".": "*"}[behind]
        reward += (behind == ".") - (ahead == "*")
    rows[r + dr][c + dc] = "@" if ahead in " $" else "+"
    rows[r][c] = " " if rows[r][c] == "@" else "."
    if ahead in "$*" and not any("$" in row for row in rows):
        reward += 10
    return reward


def test_the_rewards_are_those_of_the_publications() -> None:
    assert (REWARD_STEP, REWARD_ON_GOAL, REWARD_OFF_GOAL, REWARD_SOLVED) == (-0.1, 1, -1, 10)


@pytest.mark.parametrize(
    ("level", "moves", "rewards"),
    [
        (board("@ $."), "rr", [-0.1, 10.9]),
        (board("@$ ."), "rr", [-0.1, 10.9]),
        # Two boxes pushed up onto two goals: the first push earns 1, the last 1 and 10.
        (board("..  ", "$$  ", "@   "), "udru", [0.9, -0.1, -0.1, 10.9]),
        # From goal to goal earns nothing.
        (board("@*. $"), "r", [-0.1]),
        (board("@* $."), "r", [-1.1]),
        # Off its goal to the left, and round it by the row below to push it back.
        (board("  *@ .$ ", "       "), "ldllur", [-1.1, -0.1, -0.1, -0.1, -0.1, 0.9]),
    ],
)
def test_rewards_are_those_worked_out_by_hand(level: Level, moves: str, rewards: list[float]) -> None:
    state, got = played(level, moves)
    assert got == pytest.approx(rewards)
    assert state.solved.item() == (rewards[-1] > 10)


def test_only_the_step_that_solves_pays_for_it() -> None:
    state, rewards = played(board(" @$. "), "rl")
    assert rewards == pytest.approx([10.9, -0.1])
    assert state.solved.item()
    state, rewards = played(board(" @$. "), "rrl")
    assert rewards == pytest.approx([10.9, -1.1, -0.1])
    assert not state.solved.item()


@pytest.mark.parametrize(
    ("level", "moves"),
    [
        (board("@ $."), "u"),
        (board("@ $."), "l"),
        (board("$@ ."), "l"),
        (board("@$$..", "     "), "r"),
        (board("@$*. ", "     "), "r"),
        (board("@*$ .", "     "), "r"),
        (board("$ .", "@  "), "u"),
    ],
)
def test_an_illegal_move_changes_nothing_and_costs_a_step(level: Level, moves: str) -> None:
    before = state_of(level)
    after, rewards = played(level, moves)
    assert torch.equal(after.codes, before.codes)
    assert rewards == pytest.approx([-0.1])


def test_the_argument_of_a_step_stays_as_it_was() -> None:
    state = state_of(board("@$. "))
    codes = state.codes
    step(state, torch.tensor([3]))
    assert torch.equal(state.codes, codes)


def test_a_batch_moves_like_a_plain_simulator() -> None:
    rng = random.Random(0)
    levels = [level for boxes in (1, 2, 3) for level, _ in generate(30, seed=9, boxes=boxes, room=5)]
    boards = [[list(row) for row in level.rows] for level in levels]
    state = state_of(*levels)
    for _ in range(150):
        moves = [rng.randrange(4) for _ in levels]
        state, rewards = step(state, torch.tensor(moves))
        expected = [simulated(rows, MOVES[move]) for rows, move in zip(boards, moves, strict=True)]
        texts = ["".join(map("".join, rows)) for rows in boards]
        assert torch.equal(state.codes, torch.tensor([[" .#$*@+".index(symbol) for symbol in text] for text in texts]))
        assert torch.allclose(rewards, torch.tensor(expected))
        assert state.solved.tolist() == ["$" not in text for text in texts]


def test_rewards_of_random_play_include_every_kind() -> None:
    rng = random.Random(1)
    state = state_of(*(level for level, _ in generate(60, seed=9, boxes=2, room=4)))
    seen: set[float] = set()
    for _ in range(200):
        state, rewards = step(state, torch.tensor([rng.randrange(4) for _ in range(60)]))
        seen |= {round(reward, 3) for reward in rewards.tolist()}
    assert {-0.1, 0.9, -1.1, 10.9} <= seen


def test_codes_become_a_state_and_codes_again() -> None:
    levels = [*(level for level, _ in generate(20, seed=4, boxes=3)), board("+$  "), board("@* .$")]
    codes = torch.tensor([level.codes for level in levels])
    state = State.of(codes)
    assert torch.equal(state.codes, codes)
    assert state.codes.dtype == torch.long
    assert torch.equal(State.of(codes.to(torch.uint8)).codes, codes)


def test_planes_are_pictures_of_walls_goals_boxes_and_the_player() -> None:
    planes = state_of(board("@ *$."), board("+$")).planes
    assert planes.shape == (2, 4, 10, 10)
    assert planes.dtype == torch.float32
    assert planes[0].sum(dim=(1, 2)).tolist() == [95, 2, 2, 1]
    assert planes[1].sum(dim=(1, 2)).tolist() == [98, 1, 1, 1]
    assert planes[0, 1].nonzero().tolist() == [[1, 3], [1, 5]]
    assert planes[0, 2].nonzero().tolist() == [[1, 3], [1, 4]]
    assert planes[0, 3].nonzero().tolist() == [[1, 1]]


def test_rows_of_rubbish_move_without_an_error() -> None:
    torch.manual_seed(0)
    codes = torch.cat([torch.zeros(1, 100, dtype=torch.long), torch.full((1, 100), 5), torch.randint(-3, 12, (200, 100))])
    state = State.of(codes)
    boxes = state.boxes.sum(dim=1)
    for _ in range(50):
        state, rewards = step(state, torch.randint(-1, 6, (202,)))
        assert rewards.isfinite().all()
        assert (state.player >= 0).all()
        assert (state.player < 100).all()
        assert torch.equal(state.boxes.sum(dim=1), boxes)
    assert state.codes.shape == (202, 100)
    assert not state.solved[0]  # no box is not a solved level


def test_nothing_leaves_a_board_without_walls() -> None:
    codes = torch.zeros(4, 100, dtype=torch.long)
    codes[0, 5] = codes[1, 95] = codes[2, 50] = codes[3, 49] = 5
    after, _ = step(State.of(codes), torch.tensor([0, 1, 2, 3]))
    assert after.player.tolist() == [5, 95, 50, 49]
    codes[0, 15] = 5
    codes[0, 5] = 3
    after, _ = step(State.of(codes[:1]), torch.tensor([0]))
    assert after.player.tolist() == [15]


def test_a_row_of_a_batch_does_not_depend_on_the_others() -> None:
    levels = [level for level, _ in generate(10, seed=8)]
    moves = torch.arange(10) % 4
    together, rewards = step(state_of(*levels), moves)
    for i, level in enumerate(levels):
        alone, reward = step(state_of(level), moves[i : i + 1])
        assert torch.equal(alone.codes[0], together.codes[i])
        assert reward[0] == rewards[i]
