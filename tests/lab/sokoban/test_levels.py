"""Sokoban levels: text, Boxoban files, random small levels."""

from __future__ import annotations

from collections import deque
from itertools import islice
from pathlib import Path

import pytest

from laserlm.errors import TaskError
from laserlm.lab.sokoban.levels import CELLS, Level, generate, read_boxoban
from laserlm.lab.sokoban.solver import DELTAS, MOVES, SIDE, dead_squares

WALL = "#" * 10

ROWS = (WALL, "#@ $.    #", "# *      #", *(["#        #"] * 6), WALL)

BOXOBAN = f"""; 0
{WALL}
#####  ..#
##### $  #
####    .#
###  $   #
###     .#
#     ####
# $ $ @###
##       #
{WALL}

; 1
{WALL}
# .     ##
# .    ###
## $  $  #
##    $  #
#######  #
#####    #
#####@$ .#
######  .#
{WALL}
"""


def rows(**changed: str) -> tuple[str, ...]:
    """Return the rows of a sound level, with ``r3="..."`` in the place of row 3."""
    return tuple(changed.get(f"r{number}", row) for number, row in enumerate(ROWS))


def write_levels(folder: Path, text: str) -> Path:
    """Write a file of levels."""
    file = folder / "some_levels_007.txt"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_cells_of_a_level_have_the_index_ten_times_row_plus_column() -> None:
    level = Level(ROWS)
    assert level.player == 11
    assert level.boxes == {13, 22}
    assert level.goals == {14, 22}
    assert {0, 9, 90, 99, 10, 19} <= level.walls
    assert len(level.walls) == 36


def test_a_player_on_a_goal_is_on_a_goal() -> None:
    level = Level(rows(r1="#+  $    #", r2="#        #"))
    assert (level.player, level.goals, level.boxes) == (11, {11}, {14})


def test_the_moves_are_up_down_left_right() -> None:
    assert dict(zip(MOVES, DELTAS, strict=True)) == {"u": -SIDE, "d": SIDE, "l": -1, "r": 1}


def test_codes_are_the_symbols_places() -> None:
    level = Level(ROWS)
    assert level.codes[:15] == (2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 5, 0, 3, 1)
    assert "".join(CELLS[code] for code in level.codes) == "".join(ROWS)


def test_text_is_read_as_it_is_printed() -> None:
    level = Level(ROWS, "here")
    assert level.text.count("\n") == 10
    assert Level.parse(level.text) == level
    assert Level.parse(level.text, "there").name == "there"


def test_levels_are_equal_if_their_boards_are() -> None:
    assert Level(ROWS, "one") == Level(ROWS, "two")
    assert len({Level(ROWS, "one"), Level(ROWS, "two"), Level(rows(r5="#    #   #"))}) == 2


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ROWS[:9], "9 rows"),
        ((*ROWS, WALL), "11 rows"),
        (rows(r4="#       #"), "row 4 has 9 symbols"),
        (rows(r4="#    x   #"), "unknown symbols ['x']"),
        (rows(r1="#  $.    #"), "0 players"),
        (rows(r4="#    @   #"), "2 players"),
        (rows(r4="#    +   #"), "2 players"),
        (rows(r4="#    $   #"), "3 boxes and 2 goals"),
        (rows(r4="#    .   #"), "2 boxes and 3 goals"),
        (rows(r1="#@       #", r2="#        #"), "0 boxes and 0 goals"),
        (rows(r4="#         "), "open at row 4, column 9"),
        (rows(r0="##### ####"), "open at row 0, column 5"),
    ],
)
def test_a_malformed_level_is_refused_with_what_is_wrong(broken: tuple[str, ...], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        Level(broken, "mine")
    assert message in str(caught.value)
    assert "'mine'" in str(caught.value)


def test_a_boxoban_file_is_its_levels_in_order(tmp_path: Path) -> None:
    first, second = read_boxoban(write_levels(tmp_path, BOXOBAN))
    assert (first.name, second.name) == ("some_levels_007/0", "some_levels_007/1")
    assert first.player == 76
    assert first.boxes == {26, 45, 72, 74}
    assert first.goals == {17, 18, 38, 58}
    assert f"; 0\n{first.text}\n; 1\n{second.text}" == BOXOBAN


def test_line_ends_of_other_systems_are_read(tmp_path: Path) -> None:
    file = tmp_path / "levels.txt"
    file.write_bytes(BOXOBAN.replace("\n", "\r\n").encode())
    assert len(read_boxoban(str(file))) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no level"),
        (BOXOBAN.replace("# .    ###\n", ""), "level 1: level 'some_levels_007/1' has 9 rows"),
        (BOXOBAN.replace("#####@$ .#", "##### $ .#"), "level 1: level 'some_levels_007/1' has 0 players"),
        (BOXOBAN.replace("# $ $ @###", "# $ $ @##"), "level 0: level 'some_levels_007/0': row 7"),
        (BOXOBAN.removeprefix("; 0\n"), "line 1: a row before the first level"),
    ],
)
def test_a_malformed_file_is_refused_with_its_level(tmp_path: Path, text: str, message: str) -> None:
    file = write_levels(tmp_path, text)
    with pytest.raises(TaskError) as caught:
        read_boxoban(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="absent"):
        read_boxoban(tmp_path / "absent.txt")
    file = tmp_path / "bytes.txt"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match=r"bytes\.txt"):
        read_boxoban(file)


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["unfiltered_train_000", "unfiltered_valid_000"])
def test_the_published_files_hold_a_thousand_levels_of_four_boxes(real_data: Path, name: str) -> None:
    levels = read_boxoban(real_data / "boxoban" / f"{name}.txt")
    assert len(levels) == 1000
    assert {len(level.boxes) for level in levels} == {4}
    assert levels[999].name == f"{name}/999"
    assert len(set(levels)) > 990


def test_equal_seeds_give_equal_levels_and_other_seeds_other_ones() -> None:
    first, again, other = (list(generate(20, seed=seed)) for seed in (5, 5, 6))
    assert first == again
    assert not {level for level, _ in first} & {level for level, _ in other}
    assert first[3][0].name == "5/3"


def test_fewer_levels_are_the_first_of_more() -> None:
    assert list(generate(5, seed=1)) == list(islice(generate(30, seed=1), 5))
    assert list(generate(0, seed=1)) == []


@pytest.mark.parametrize(("boxes", "room", "steps"), [(1, 6, (4, 40)), (2, 6, (4, 40)), (2, 4, (6, 12)), (3, 8, (10, 30))])
def test_generated_levels_are_what_was_asked_for(boxes: int, room: int, steps: tuple[int, int]) -> None:
    generated = list(generate(30, seed=2, boxes=boxes, room=room, steps=steps))
    assert len({level for level, _ in generated}) == 30
    for level, moves in generated:
        assert steps[0] <= len(moves) <= steps[1]
        assert len(level.boxes) == len(level.goals) == boxes
        assert level.player not in level.boxes | level.walls
        assert not level.boxes & (level.goals | dead_squares(level.walls, level.goals))
        floor = sorted(set(range(SIDE * SIDE)) - level.walls)
        assert floor[-1] // SIDE - floor[0] // SIDE < room
        assert max(c % SIDE for c in floor) - min(c % SIDE for c in floor) < room
        assert connected(frozenset(floor))


def test_generated_levels_have_open_rooms_and_corridors_all_over_the_board() -> None:
    floors = [frozenset(range(SIDE * SIDE)) - level.walls for level, _ in generate(200, seed=3)]
    assert min(map(len, floors)) < 12
    assert max(map(len, floors)) > 28
    widths = [sum({c, c + 1, c + SIDE, c + SIDE + 1} <= floor for c in floor) / len(floor) for floor in floors]
    assert min(widths) < 0.1  # hardly a square of two by two cells: a corridor
    assert max(widths) > 0.6
    assert {min(floor) // SIDE for floor in floors} >= {1, 2, 3}
    assert frozenset.union(*floors) == frozenset(SIDE * r + c for r in range(1, 9) for c in range(1, 9))


@pytest.mark.parametrize(
    "asked",
    [
        {"boxes": 0},
        {"boxes": 4, "room": 3},
        {"room": 2},
        {"room": 9},
        {"steps": (0, 5)},
        {"steps": (6, 5)},
        {"count": -1},
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(asked: dict[str, object]) -> None:
    with pytest.raises(TaskError):
        generate(**{"count": 1, "seed": 0, **asked})  # type: ignore[arg-type]


def test_levels_that_are_too_rare_are_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laserlm.lab.sokoban.levels.MAX_REFUSALS", 50)
    with pytest.raises(TaskError, match="found 0 of 1 levels"):
        list(generate(1, seed=0, boxes=1, room=3, steps=(200, 300)))


def connected(cells: frozenset[int]) -> bool:
    """Tell whether one can walk from any of the cells to any other."""
    start = min(cells)
    reached, queue = {start}, deque([start])
    while queue:
        cell = queue.popleft()
        for delta in (-10, 10, -1, 1):
            if cell + delta in cells - reached:
                reached.add(cell + delta)
                queue.append(cell + delta)
    return reached == cells
