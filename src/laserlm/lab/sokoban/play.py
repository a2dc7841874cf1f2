"""Play one level in the Gymnasium environment, and show the episode."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.text import Text

from laserlm.errors import MissingExtraError
from laserlm.lab.sokoban.env import Sokoban
from laserlm.lab.sokoban.levels import CELLS, Level
from laserlm.lab.sokoban.model import FIRST_MOVE_TOKEN
from laserlm.lab.sokoban.solver import MOVES
from laserlm.models.language_model import LanguageModel
from laserlm.paths import atomic_file

FRAME_MS, LAST_FRAME_MS = 200, 1500
STYLES = {"#": "white on grey35", "@": "bold blue", "+": "bold blue", "$": "bold yellow", "*": "bold green", ".": "bold red"}


@dataclass(frozen=True)
class Episode:
    """A played level.

    Args:
        moves: letters of the moves.
        solved: whether the moves solve the level.
        total_reward: the undiscounted return.
        boards: (10, 10) cell codes at the start and after each move.
        pictures: (H, W, 3) pictures of the boards.
    """

    moves: str
    solved: bool
    total_reward: float
    boards: tuple[NDArray[np.uint8], ...]
    pictures: tuple[NDArray[np.uint8], ...]


@torch.no_grad()
def play(lm: LanguageModel, level: Level, *, max_steps: int = 60) -> Episode:
    """Play the model's likeliest moves until the environment ends the episode.

    Args:
        lm: the model, with the intervention that is applied at the moment.
        level: the level to play.
        max_steps: number of steps after which the environment truncates the episode.
    """
    env = Sokoban([level], max_steps=max_steps, render_mode="rgb_array")
    tokenizer = lm.require_tokenizer()
    board, _ = env.reset()
    moves, total_reward, solved, truncated = "", 0.0, False, False
    boards, pictures = [board], [env.render()]
    while not (solved or truncated):
        ids = tokenizer(level.text + moves, return_tensors="pt").input_ids.to(lm.device)
        action = lm.model(ids).logits[0, -1, FIRST_MOVE_TOKEN : FIRST_MOVE_TOKEN + len(MOVES)].argmax()
        board, reward, solved, truncated, _ = env.step(np.int64(action))
        moves, total_reward = moves + MOVES[int(action)], total_reward + reward
        boards, pictures = [*boards, board], [*pictures, env.render()]
    return Episode(moves, solved, total_reward, tuple(boards), tuple(np.asarray(p) for p in pictures))


def show(episode: Episode, *, delay: float) -> None:
    """Print an episode: on a terminal every move for ``delay`` seconds, elsewhere the first and the last board."""
    console = Console()
    if not console.is_terminal:
        console.print(_text(episode.boards[0]), _text(episode.boards[-1]), sep="\n")
        return
    with Live(_text(episode.boards[0]), console=console, auto_refresh=False) as live:
        for board in episode.boards[1:]:
            time.sleep(delay)
            live.update(_text(board), refresh=True)


def _text(board: NDArray[np.uint8]) -> Text:
    text = Text()
    for row in board:
        for code in row:
            text.append(CELLS[code] * 2, STYLES.get(CELLS[code], ""))  # twice, because a letter is higher than wide
        text.append("\n")
    return text


def animate(episode: Episode, file: Path) -> None:
    """Write an episode as an animated GIF.

    Raises:
        MissingExtraError: if Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("animated pictures need Pillow; run: pip install 'laserlm[rl]'") from error
    first, *later = [Image.fromarray(picture) for picture in episode.pictures]
    times = [FRAME_MS] * len(later) + [LAST_FRAME_MS]
    with atomic_file(file) as part:
        first.save(part, format="GIF", save_all=True, append_images=later, duration=times, loop=0)
