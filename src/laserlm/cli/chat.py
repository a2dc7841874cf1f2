"""The command ``laser chat``: a conversation with the base model and the edited model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from laserlm.cli.options import STORE_DEFAULT, Store, UpdatedModelOptions, with_options
from laserlm.cli.progress import print_stderr
from laserlm.cli.search_result import search_result

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from laserlm.models import LanguageModel
    from laserlm.reductions import Intervention
    from laserlm.scoring.conversation import Conversation

SIDE_BY_SIDE_WIDTH = 100
"""Width of a terminal from which the replies get a column each."""
RESET, QUIT = "/reset", "/quit"


@with_options(model_options=UpdatedModelOptions)
def chat(
    model_options: UpdatedModelOptions,
    reduce: Annotated[list[str] | None, typer.Option(help="Reduction such as 27.fc_in@0.01; may be repeated.")] = None,
    run: Annotated[str | None, typer.Option(help="Search whose result replies: id, its start, or 'last'.")] = None,
    system: Annotated[str | None, typer.Option(help="System text of the conversation.", show_default="the template's")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of a reply.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature.", show_default="greedy")] = None,
    store: Store = STORE_DEFAULT,
) -> None:
    """Chat with the base model and the edited model side by side, each with its own history.

    In a terminal, /reset forgets the conversation, and /quit, Ctrl-D or Ctrl-C ends it. Without one, each line is a question.

    Example: laser chat bundled --run last
    """
    from laserlm.reductions import Intervention
    from laserlm.scoring.conversation import Conversation

    if run is not None and reduce:
        raise typer.BadParameter("--run and --reduce exclude each other; give one of them")
    if temperature is not None and temperature <= 0:
        raise typer.BadParameter(f"a temperature is above 0, got {temperature:g}; leave it out for greedy replies")
    result = None if run is None else search_result(run, store)
    intervention = Intervention.read(reduce or [])
    lm = model_options.load()
    seed = 0
    if result is not None:
        from laserlm.export.saving import chosen_intervention

        intervention, seed = chosen_intervention(lm, result, None), int(result.settings.get("seed", 0))
    start = partial(Conversation, lm, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    sides = {"base": start()} | ({"edited": start(intervention)} if intervention else {})
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        _introduce(lm, intervention)
    with suppress(KeyboardInterrupt):
        _converse(sides, _terminal_replies if is_terminal else _plain_replies, "> " if is_terminal else "")


def _introduce(lm: LanguageModel, intervention: Intervention) -> None:
    from laserlm.reductions import short_form

    edited = f", base and edited by {short_form(str(intervention))}" if intervention else ""
    print_stderr(f"{lm.name}{edited}. {RESET} forgets the conversation; {QUIT} or Ctrl-D ends it.")


Sides = Mapping[str, "Conversation"]
Reply = Callable[[Sides, str], dict[str, str]]


def _converse(sides: Sides, reply: Reply, prompt: str) -> None:
    """Read questions until the end of the input, and let both sides reply."""
    from laserlm.errors import ScoringError, TokenizationError

    if prompt:
        with suppress(ImportError):
            import readline  # noqa: F401  # lets input() edit the line and remember the last ones
    while True:
        try:
            question = input(prompt).strip()
        except EOFError:
            return
        if question == QUIT:
            return
        if question == RESET:
            for side in sides.values():
                side.reset()
            print_stderr("The conversation is forgotten.")
        elif question:
            try:
                replies = reply(sides, question)
            except (ScoringError, TokenizationError) as error:
                print_stderr(f"Error: {error}")
                print_stderr(f"The question is left out. {RESET} starts again.")
                continue
            for name, text in replies.items():
                sides[name].add(question, text)


def _plain_replies(sides: Sides, question: str) -> dict[str, str]:
    """Print the name of each side and its reply, and return the replies."""
    replies = {name: side.reply(question) for name, side in sides.items()}
    for name, text in replies.items():
        print(f"{name}: {text}", flush=True)
    return replies


def _terminal_replies(sides: Sides, question: str) -> dict[str, str]:
    """Show the replies as they grow, and return them."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    texts = dict.fromkeys(sides, "")
    replies = {}

    def grow(name: str, piece: str) -> None:
        texts[name] += piece

    # rich would put streams of its own before those that escape control characters.
    with Live(
        get_renderable=lambda: _layout(texts, console), console=console, redirect_stdout=False, redirect_stderr=False
    ) as live:
        for name, side in sides.items():
            replies[name] = side.reply(question, partial(grow, name))
        texts |= replies
        live.refresh()
    return replies


def _layout(texts: Mapping[str, str], console: Console) -> RenderableType:
    """Return the replies in columns where the terminal is wide enough, else one below the other."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    heads = [Text(name, style="bold") for name in texts]
    bodies = [Text(text) for text in texts.values()]
    if len(texts) == 1:
        return bodies[0]
    if console.width < SIDE_BY_SIDE_WIDTH:
        return Group(*(part for pair in zip(heads, bodies, strict=True) for part in pair))
    columns = Table.grid(padding=(0, 3), expand=True)
    for _ in texts:
        columns.add_column(ratio=1, overflow="fold")
    columns.add_row(*heads)
    columns.add_row(*bodies)
    return columns
