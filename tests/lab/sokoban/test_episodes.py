"""Solved levels: their symmetries, what a model learns from and the task that it is measured by."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from laserlm.lab.sokoban.env import Sokoban
from laserlm.lab.sokoban.episodes import Episodes, canonical_board, replay, solve_levels, symmetries, task
from laserlm.lab.sokoban.levels import CELLS, Level, generate
from laserlm.lab.sokoban.model import LEVEL_TOKENS, SokobanConfig, SokobanForCausalLM, tokenizer
from laserlm.lab.sokoban.solver import MOVES
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate

WALL = "#" * 10
MADE = [
    *generate(8, seed=1, boxes=1, room=4, steps=(1, 12)),
    *generate(8, seed=2, boxes=2, room=5),
    *generate(4, seed=3, boxes=3),
]
TOKENS = tokenizer()
FIRST = TOKENS.convert_tokens_to_ids(MOVES[0])
TURNS = {
    # How each symmetry of the square moves (row, column), and how it moves up, down, left and right.
    "same": (lambda r, c: (r, c), "udlr"),
    "right": (lambda r, c: (c, 9 - r), "rlud"),
    "half": (lambda r, c: (9 - r, 9 - c), "durl"),
    "left": (lambda r, c: (9 - c, r), "lrdu"),
    "left to right": (lambda r, c: (r, 9 - c), "udrl"),
    "upside down": (lambda r, c: (9 - r, c), "dulr"),
    "diagonal": (lambda r, c: (c, r), "lrud"),
    "other diagonal": (lambda r, c: (9 - c, 9 - r), "rldu"),
}
Turn = tuple[Callable[[int, int], tuple[int, int]], str]


def board(*inner: str, name: str = "") -> Level:
    """Return a level of the rows from row 1 on; the rest is wall."""
    return Level((WALL, *(f"#{row:#<9}" for row in inner), *([WALL] * (9 - len(inner)))), name)


def level_of(codes: list[int]) -> Level:
    text = "".join(CELLS[code] for code in codes)
    return Level(tuple(text[i : i + 10] for i in range(0, 100, 10)))


def turned(level: Level, moves: str, turn: Turn) -> tuple[Level, str]:
    """Return a level and moves under a symmetry, cell by cell and letter by letter."""
    to, letters = turn
    rows = [[""] * 10 for _ in range(10)]
    for r in range(10):
        for c in range(10):
            new_row, new_column = to(r, c)
            rows[new_row][new_column] = level.rows[r][c]
    return Level(tuple(map("".join, rows))), "".join(letters[MOVES.index(m)] for m in moves)


def shape(level: Level) -> frozenset[frozenset[tuple[int, int, str]]]:
    """Return what is not wall, in its upper left corner, of all eight turned and mirrored levels."""
    shapes = set()
    for turn in TURNS.values():
        inside = [(r, c, s) for r, row in enumerate(turned(level, "", turn)[0].rows) for c, s in enumerate(row) if s != "#"]
        top, left = min(r for r, _, _ in inside), min(c for _, c, _ in inside)
        shapes.add(frozenset((r - top, c - left, s) for r, c, s in inside))
    return frozenset(shapes)


def player(seed: int = 0) -> LanguageModel:
    """Return a model of random weights that makes all kinds of moves."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SokobanForCausalLM(
            SokobanConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, channels=4, depth=1)
        )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return LanguageModel(model=model, tokenizer=tokenizer(), name="player", kind="causal")


def test_the_symmetries_are_those_of_the_square() -> None:
    comes, images = symmetries()
    expected = set()
    for to, letters in TURNS.values():
        places = [0] * 100
        for cell in range(100):
            r, c = to(*divmod(cell, 10))
            places[10 * r + c] = cell
        expected.add((*places, *(MOVES.index(m) for m in letters)))
    assert len(expected) == 8
    assert {(*c, *i) for c, i in zip(comes.tolist(), images.tolist(), strict=True)} == expected
    group = {tuple(c) for c in comes.tolist()}
    assert all(tuple(a[b].tolist()) in group for a in comes for b in comes)


@pytest.mark.parametrize("which", range(8))
def test_a_turned_solution_solves_the_turned_level_at_the_same_return(which: int) -> None:
    comes, images = (of[which] for of in symmetries())
    for level, moves in MADE:
        new = level_of(torch.tensor(level.codes)[comes].tolist())
        letters = "".join(MOVES[images[MOVES.index(m)]] for m in moves)
        right, total, steps = replay(new, letters)
        assert (right, steps) == (True, len(moves))
        assert total == replay(level, moves)[1]


def test_an_outline_is_shared_by_shifted_turned_and_mirrored_levels() -> None:
    for level, _ in MADE:
        floor = [(c // 10, c % 10) for c in set(range(100)) - level.walls]
        rows, columns = [r for r, _ in floor], [c for _, c in floor]
        for down, right in ((1 - min(rows), 1 - min(columns)), (8 - max(rows), 8 - max(columns)), (0, 8 - max(columns))):
            cells = ["#"] * 100
            for r, c in floor:
                cells[10 * (r + down) + c + right] = level.rows[r][c]
            shifted = level_of([CELLS.index(s) for s in cells])
            outlines = {canonical_board(turned(shifted, "", turn)[0]) for turn in TURNS.values()}
            assert outlines == {canonical_board(level)}


def test_levels_share_an_outline_only_if_one_is_the_other_shifted_turned_or_mirrored() -> None:
    levels = [level for level, _ in generate(150, seed=0, boxes=1, room=3, steps=(1, 12))]
    shapes, outlines = [shape(level) for level in levels], [canonical_board(level) for level in levels]
    same = 0
    for i, j in combinations(range(len(levels)), 2):
        assert (outlines[i] == outlines[j]) == (shapes[i] == shapes[j])
        same += shapes[i] == shapes[j]
    assert same > 20


def test_an_outline_keeps_the_walls_between_parts_of_a_level() -> None:
    # Columns and rows of wall within the level count, those around it do not.

    assert canonical_board(board("@$.")) == canonical_board(board("####", "#.$@")) == canonical_board(board("#@", "#$", "#."))
    assert canonical_board(board("@$.")) != canonical_board(board("@ $.")) != canonical_board(board("@$ ."))


def test_episodes_are_the_levels_and_their_solutions_in_all_eight_symmetries() -> None:
    episodes = Episodes(MADE)
    assert len(episodes) == 8 * len(MADE)
    longest = max(len(moves) for _, moves in MADE)
    for index in range(0, len(MADE), 3):
        level, moves = MADE[index]
        seen = set()
        for way in range(8):
            item = episodes[8 * index + way]
            assert {name: tuple(of.shape) for name, of in item.items()} == dict.fromkeys(item, (LEVEL_TOKENS + longest,))
            pad = longest - len(moves)
            assert item["attention_mask"].tolist() == [0] * pad + [1] * (LEVEL_TOKENS + len(moves))
            assert item["labels"].tolist() == [-100] * (pad + LEVEL_TOKENS) + item["input_ids"][pad + LEVEL_TOKENS :].tolist()
            text = TOKENS.decode(item["input_ids"][pad:])
            assert TOKENS.decode(item["input_ids"], skip_special_tokens=True) == text
            seen.add((Level.parse(text[:LEVEL_TOKENS]), text[LEVEL_TOKENS:]))
        assert {replay(*one) for one in seen} == {replay(level, moves)}
        assert seen == {turned(level, moves, turn) for turn in TURNS.values()}


def test_a_batch_of_episodes_has_the_loss_of_their_moves() -> None:
    torch.manual_seed(0)
    lm = player()
    batch = default_collate([Episodes(MADE)[8 * i + i % 8] for i in range(len(MADE))])
    losses = []
    with torch.no_grad():
        got = lm.model(**batch).loss.item()
        for ids in batch["input_ids"].tolist():
            text = TOKENS.decode(ids, skip_special_tokens=True)
            for end in range(LEVEL_TOKENS, len(text)):
                logits = lm.model(torch.tensor([TOKENS(text[:end]).input_ids])).logits[0, -1].log_softmax(-1)
                losses.append(-logits[FIRST + MOVES.index(text[end])].item())
    assert len(losses) == sum(len(moves) for _, moves in MADE)
    assert got == pytest.approx(math.fsum(losses) / len(losses), abs=1e-4)


@pytest.mark.parametrize(
    ("level", "moves", "expected"),
    [
        (board("@$."), "r", (True, 10.9, 1)),
        (board("@$ ."), "rr", (True, 10.8, 2)),
        (board("@$ ."), "rrl", (True, 10.8, 2)),  # nothing is played after the end
        (board("@$ ."), "r", (False, -0.1, 1)),
        (board("@$ ."), "", (False, 0.0, 0)),
        (board(" @$. $."), "rrrrr", (False, -0.5, 5)),  # on the goal, off it, on as far as the other box, and not beyond
        (board("..  ", "$$  ", "@   "), "udru", (True, 11.6, 4)),
        (board("@*"), "rr", (True, 0.0, 0)),
    ],
)
def test_a_replay_is_as_worked_out_by_hand(level: Level, moves: str, expected: tuple[bool, float, int]) -> None:
    right, total, steps = replay(level, moves)
    assert (right, steps) == (expected[0], expected[2])
    assert total == pytest.approx(expected[1])


def test_levels_without_a_solution_are_left_out() -> None:
    levels = [board("@$.", name="a"), board("$@.", name="b"), board("@ $ .", name="c")]
    seen: list[tuple[int, int]] = []
    result = solve_levels(levels, lambda done, total: seen.append((done, total)))
    assert [(level.name, moves) for level, moves in result] == [("a", "r"), ("c", "rrr")]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert solve_levels([level for level, _ in MADE]) == MADE


def test_levels_that_ask_for_no_move_or_for_more_than_the_model_makes_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = [board("@*", name="a"), board("@$ .", name="b"), board("@$  .", name="c")]
    monkeypatch.setattr("laserlm.lab.sokoban.episodes.MAX_STEPS", 2)
    assert [level.name for level, _ in solve_levels(levels)] == ["b"]


def test_the_task_is_a_fifth_for_validation_and_judges_by_playing() -> None:
    questions = task(iter(MADE), max_steps=30)
    assert (len(questions.validation), len(questions.test), len(questions.every)) == (4, 16, 20)
    assert not {e.id for e in questions.validation} & {e.id for e in questions.test}
    assert [(e.prompt, e.answer) for e in questions.every] == [(level.text, moves) for level, moves in MADE]
    assert [e.group for e in questions.every] == ["boxes: 1"] * 8 + ["boxes: 2"] * 8 + ["boxes: 3"] * 4
    for split in (questions.validation, questions.test):
        assert split.scorer == "rollout"
        assert split.decoding.new_tokens == 30
        assert split.judge is not None
        for e in split:
            level = Level.parse(e.prompt)
            expected = {"return": pytest.approx(replay(level, e.answer)[1]), "steps": len(e.answer)}
            assert split.judge(e, [e.answer]) == (True, expected)
            right, figures = split.judge(e, [e.answer[:-1]])
            assert not right
            assert figures["steps"] == len(e.answer) - 1


def test_any_solution_is_right() -> None:
    questions = task([(board("@$ .", "    ", name="a"), "rr"), (board("@ $.", name="b"), "rr")])
    judge = questions.every.judge
    assert judge is not None
    assert judge(questions.every.examples[0], ["durr"]) == (True, {"return": pytest.approx(10.6), "steps": 4})


def test_evaluating_lets_the_model_play() -> None:
    lm, max_steps = player(), 10
    easy = list(generate(15, seed=3, boxes=1, room=3, steps=(1, 4)))
    questions = task(
        [*MADE, *((Level(level.rows, f"easy {level.name}"), moves) for level, moves in easy)], max_steps=max_steps
    ).every
    got = evaluate(lm, questions, batch_size=7)
    for score, e in zip(got.scores, questions, strict=True):
        env = Sokoban([Level.parse(e.prompt)], max_steps=max_steps)
        env.reset()
        moves, total, ended, right = "", 0.0, False, False
        losses = []
        with torch.no_grad():
            while not ended:
                logits = lm.model(torch.tensor([TOKENS(e.prompt + moves).input_ids])).logits[0, -1]
                action = logits[FIRST : FIRST + 4].argmax()
                _, reward, right, truncated, _ = env.step(np.int64(action))
                moves, total, ended = moves + MOVES[action], total + float(reward), right or truncated
            for turn, move in enumerate(e.answer):
                logits = lm.model(torch.tensor([TOKENS(e.prompt + e.answer[:turn]).input_ids])).logits[0, -1]
                losses.append(-logits.log_softmax(-1)[FIRST + MOVES.index(move)].item())
        assert (score.predicted, score.correct) == (moves, right)
        assert score.figures == {"return": pytest.approx(total, abs=1e-5), "steps": len(moves)}
        assert score.logprob == pytest.approx(-sum(losses), abs=1e-3)
    share = sum(s.correct for s in got.scores) / len(questions)
    assert got.accuracy == pytest.approx(share)
    assert 0 < share < 1


def test_a_perfect_player_solves_all_that_the_steps_suffice_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = player()
    known = {level.text: moves for level, moves in MADE}

    def generate(input_ids: Tensor, *, max_new_tokens: int, **_: object) -> Tensor:
        message = [known[TOKENS.decode(ids)][:max_new_tokens] for ids in input_ids]
        written = torch.tensor([TOKENS(s).input_ids + [TOKENS.pad_token_id] * (max_new_tokens - len(s)) for s in message])
        return torch.cat([input_ids, written], 1)

    monkeypatch.setattr(lm.model, "generate", generate)
    every = evaluate(lm, task(MADE).every)
    assert every.accuracy == 1
    for score, (level, moves) in zip(every.scores, MADE, strict=True):
        # No generated level has a box on a goal, and no shortest solution here pushes one off.
        assert score.figures["return"] == pytest.approx(10 + len(level.boxes) - 0.1 * len(moves))
    few = evaluate(lm, task(MADE, max_steps=8).every)
    assert few.accuracy == sum(len(moves) <= 8 for _, moves in MADE) / len(MADE)
    assert 0 < few.accuracy < 1


def test_a_copy_of_a_level_is_never_on_the_other_side_of_the_split() -> None:
    questions = task(generate(300, seed=0, boxes=1, room=3, steps=(1, 12)))
    sides = [{canonical_board(Level.parse(e.prompt)) for e in split} for split in (questions.validation, questions.test)]
    assert len(questions.every) > len(sides[0] | sides[1])  # there are copies
    assert not sides[0] & sides[1]
