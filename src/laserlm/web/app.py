"""The local app: leaderboard, explorer of searches, playground and examples, in a browser on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from importlib.resources import files
from typing import Any

import gradio as gr

from laserlm.errors import LaserError
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import Layers, Reduction, Size
from laserlm.store import Store
from laserlm.studies.published import published
from laserlm.studies.rank_curve import LossAtRank
from laserlm.web import explorer
from laserlm.web.pages import page
from laserlm.web.playground import LONGEST_PROMPT, MOST_TOKENS, Playground

__all__ = ["build", "rows", "style"]

PROMPTS = (
    "The capital of Portugal is",
    "The chemical symbol for gold is",
    "The author of the play Hamlet is",
    "The largest planet of the solar system is",
    "The language spoken in Brazil is",
    "Water boils at a temperature of",
)
"""Prompts to begin with: facts that a small model half knows."""
COLUMNS = {
    "from": ("str", "150px"),
    "model": ("str", "170px"),
    "task": ("str", "170px"),
    "before, %": ("number", "90px"),
    "after, %": ("number", "90px"),
    "gain": ("number", "80px"),
    "95 % interval": ("str", "140px"),
    "n": ("number", "80px"),
    "intervention": ("str", "240px"),
}
"""Columns of the leaderboard with their kind and width."""
SIDES = ("Unchanged", "Reduced (LASER)", "Only what is taken away")
LOWEST = "lowest over sizes"
SHOWN = 100
"""Corrected and broken examples shown, of each."""
OFFERED = 30
"""Corrected examples of a run that fill the playground."""
WAITING = 32
"""Questions that may wait; more are turned away."""
MAPS = 4
"""Loss maps that are remembered; one is made of all scores of a search."""
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
MODEL: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "always_last"}
"""Of what runs the model: one at a time, and of a slider's places the last."""


def rows(store: Store) -> list[list[Any]]:
    """Return what a database's finished searches found on their test splits, then what is published, by ``COLUMNS``."""
    found: list[list[Any]] = []
    for run in explorer.searches(store):
        if run.outcome is None:
            continue
        test, best = run.outcome["test"], run.outcome["best"] or "none"
        shares: list[Any] = [round(100 * test[name], 1) for name in ("base", "best", "gain")]
        interval = "{:+.1f} to {:+.1f}".format(*(100 * x for x in test["interval"]))
        if run.settings.get("scorer") == "perplexity":
            shares, interval = [None] * 3, ""
        found.append([f"run {run.id}", run.model, run.task, *shares, interval, test["n"], best])
    for p in published():
        scale = 1 if p.metric.endswith("percent") else 100
        shares = [round(scale * x, 1) for x in (p.base, p.edited, p.edited - p.base)]
        found.append([p.source, p.model, p.task, *shares, "", None, p.intervention])
    return found


def style() -> str:
    """Return the app's own style sheet."""
    return _asset("app.css")


def build(store: Store, lm: LanguageModel) -> gr.Blocks:
    """Return the app; what a user chose is nowhere but in the user's page.

    Args:
        store: the results database.
        lm: the model of the playground, which nobody else may use meanwhile.

    Raises:
        ModelError: if the model has no head or no tokenizer.
    """
    playground = Playground(lm)
    with gr.Blocks(analytics_enabled=False, title="laserlm", fill_width=True) as blocks:
        _html(page("app_head", model=lm.name))
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Leaderboard", id="leaderboard"):
                board = _board()
            with gr.Tab("Explorer", id="explorer"):
                run, shown_map = _explorer(store)
            with gr.Tab("Playground", id="playground"):
                asked = _playground(playground)
            with gr.Tab("Examples", id="examples"):
                _examples(store, run, asked, tabs)
        blocks.load(lambda: rows(store), None, board, **PRIVATE)
        blocks.load(lambda: _runs(store), None, [run, shown_map], **PRIVATE)
    made: gr.Blocks = blocks.queue(max_size=WAITING)
    return made


def _board() -> gr.Dataframe:
    kinds: Any = [kind for kind, _ in COLUMNS.values()]
    return gr.Dataframe(
        headers=list(COLUMNS),
        datatype=kinds,
        column_widths=[width for _, width in COLUMNS.values()],
        label="Accuracy on test splits; gain in points",
        interactive=False,
        show_search="search",
        wrap=True,
        max_height=640,
    )


def _runs(store: Store) -> tuple[Any, str]:
    """Return the searches to choose from, and what stands in the map's place until one is chosen."""
    found = explorer.searches(store)
    none = page("app_alert", text="There is no search in this database yet; make one: laser search bundled")
    choices = [(explorer.name_of(r), r.id) for r in found]
    return gr.Dropdown(choices=choices, value=found[0].id if found else None), "" if found else none


def _explorer(store: Store) -> tuple[gr.Dropdown, gr.HTML]:
    """Lay out the explorer: a search, its loss map, and what the chosen candidate changed."""

    @lru_cache(maxsize=MAPS)
    def remembered(run: str, _updated: datetime) -> tuple[LossAtRank, ...]:
        return tuple(explorer.measured(store, run))

    def measured(run: str) -> tuple[LossAtRank, ...]:
        return remembered(run, store.find(run).updated)

    def opened(run: str | None) -> tuple[Any, Any, Any]:
        if not run:
            return gr.skip(), gr.skip(), gr.skip()
        try:
            choices = explorer.candidates(store, run)
        except LaserError as error:
            return gr.skip(), gr.skip(), page("app_alert", text=str(error))
        try:
            sizes = explorer.sizes(measured(run))
        except LaserError:  # told where the map would be
            sizes = []
        return gr.Dropdown(choices=[LOWEST, *sizes], value=LOWEST), gr.Dropdown(choices=choices, value=None), drawn(run, LOWEST)

    def drawn(run: str | None, size: str) -> str:
        if not run:
            return ""
        try:
            return explorer.grid_html(explorer.grid(measured(run), "" if size == LOWEST else size))
        except LaserError as error:
            return page("app_alert", text=str(error))

    def changed(run: str | None, candidate: str | None) -> str:
        if not run or not candidate:
            return ""
        try:
            found = explorer.changes(store, run, candidate)
        except LaserError as error:
            return page("app_alert", text=str(error))
        lists = [("Corrected", found.of("corrected")), ("Broken", found.of("broken"))]
        return page("app_changes", candidate=candidate, summary=explorer.summary(found), lists=lists, shown=SHOWN)

    def picked(event: gr.EventData) -> str:
        return str(event.pick)

    with gr.Row():
        run = gr.Dropdown(label="Search", choices=[], scale=3, min_width=300)
        size = gr.Dropdown(label="Size", choices=[LOWEST], value=LOWEST)
        candidate = gr.Dropdown(label="Candidate", choices=[], value=None, info="Or click one on the map.")
    with gr.Row():
        with gr.Column(min_width=340):
            shown = _picks("")
        with gr.Column(min_width=340):
            changes = _html("", elem_id="changes")
    run.change(opened, run, [size, candidate, shown], **PRIVATE)
    size.input(drawn, [run, size], shown, **PRIVATE)
    shown.click(picked, None, candidate, **PRIVATE)
    candidate.change(changed, [run, candidate], changes, **PRIVATE)
    return run, shown


@dataclass(frozen=True)
class _Asked:
    """What the playground is asked by, and how it answers."""

    prompt: gr.Textbox
    text: gr.Textbox
    inputs: list[Any]
    outputs: list[Any]
    ask: Callable[..., list[str]]


def _playground(playground: Playground) -> _Asked:
    """Lay out the playground: a prompt, a reduction, and what three versions of the model make of it."""
    lm = playground.lm
    stacks = list(dict.fromkeys(m.stack for m in lm.matrices))
    names = list(dict.fromkeys(m.name for m in lm.matrices))
    last = lm.matrices[-1]

    def ask(
        prompt: str, tokens: float, stack: str | None, layer: float, matrix: str, rho: float, text: str | None
    ) -> list[str]:
        try:
            given = (text or "").strip() or str(_reduction(stack or "", int(layer), matrix, rho))
            sides = playground.answer(prompt or "", given, int(tokens))
        except LaserError as error:
            return [page("app_alert", text=str(error)), "", "", ""]
        answers = zip(SIDES, sides, strict=True)
        return ["", *(page("app_side", name=name, prompt=prompt, side=side) for name, side in answers)]

    with gr.Row():
        prompt = gr.Textbox(label="Prompt", value=PROMPTS[0], lines=2, max_length=LONGEST_PROMPT, scale=3, min_width=300)
        tokens = gr.Slider(1, MOST_TOKENS, value=8, step=1, label="New tokens")
    with gr.Row():
        stack = gr.Dropdown(stacks, value=last.stack, label="Stack", visible=len(stacks) > 1)
        layer = gr.Slider(0, max(m.layer for m in lm.matrices), value=last.layer, step=1, label="Block")
        matrix = gr.Dropdown(names, value=last.name, label="Matrix")
        rho = gr.Slider(0, 1, value=0.1, step=0.005, label="Kept fraction of the singular values")
    with gr.Row():
        text = gr.Textbox(
            label="Or reductions as text",
            placeholder="28.fc_up@0.05+top4.mlp@0.5",
            info="Goes before the choice above. Several are joined by +.",
            scale=3,
        )
        button = gr.Button("Answer", variant="primary", scale=1)
    alert = _html("")
    with gr.Row():
        sides = []
        for i in range(len(SIDES)):
            with gr.Column(min_width=240):
                sides.append(_html("", elem_id=f"side-{i}"))
    asked = _Asked(prompt, text, [prompt, tokens, stack, layer, matrix, rho, text], [alert, *sides], ask)
    listeners: list[Any] = [button.click, prompt.submit, text.submit]
    listeners += [x.input for x in (tokens, stack, layer, matrix, rho)]
    gr.on(listeners, ask, asked.inputs, asked.outputs, **PRIVATE, **MODEL)
    return asked


def _reduction(stack: str, layer: int, matrix: str, rho: float) -> Reduction:
    kept = Size(rho=Decimal(str(round(rho, 4))))
    return Reduction(Layers(first=layer, last=layer), matrix, kept, stack=stack)


def _examples(store: Store, run: gr.Dropdown, asked: _Asked, tabs: gr.Tabs) -> None:
    """Lay out prompts that fill the playground: some facts, and what the explorer's search corrected on its test split."""

    def fill(event: gr.EventData) -> tuple[str, Any]:
        return str(event.pick), gr.Tabs(selected="playground")

    def fill_with_best(run: str | None, event: gr.EventData) -> tuple[str, Any, Any]:
        best = (store.find(run).outcome or {}).get("best") if run else None
        return str(event.pick), best or gr.skip(), gr.Tabs(selected="playground")

    def listed(run: str | None) -> str:
        if not run:
            return ""
        try:
            info = store.find(run)
            found = explorer.corrected(store, info)
        except LaserError as error:
            return page("app_alert", text=str(error))
        first = f", the first {OFFERED}" if len(found) > OFFERED else ""
        about = f"Run {info.id} of {info.model}: {len(found)} test examples that its best corrects{first}"
        picks = [(f.prompt, f"{f.prompt} → {f.after}, before {f.before}") for f in found[:OFFERED]]
        return page("app_picks", about=about, picks=picks)

    facts = _picks(page("app_picks", about="Facts", picks=[(p, p) for p in PROMPTS]))
    corrected = _picks("")
    run.change(listed, run, corrected, **PRIVATE)
    how: dict[str, Any] = {"fn": asked.ask, "inputs": asked.inputs, "outputs": asked.outputs, **PRIVATE, **MODEL}
    facts.click(fill, None, [asked.prompt, tabs], **PRIVATE).then(**how)
    corrected.click(fill_with_best, run, [asked.prompt, asked.text, tabs], **PRIVATE).then(**how)


def _picks(value: str) -> gr.HTML:
    """Return an element whose buttons trigger a click that says which one was pressed."""
    return _html(value, js_on_load=_asset("app.js"))


def _html(value: str, **given: Any) -> gr.HTML:
    """Return an element that holds what ``page`` made: all that is data in it is escaped."""
    return gr.HTML(value, apply_default_css=False, **given)


def _asset(name: str) -> str:
    return (files("laserlm.web") / "templates" / name).read_text(encoding="utf-8")
