"""The local app for a browser on this machine: leaderboard, explorer of searches, playground, examples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from importlib.resources import files
from typing import Any

import gradio as gr

from laserlm.edit import resolve
from laserlm.errors import LaserError
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import Layers, Reduction, Size, short_form
from laserlm.scoring.chat import ChatTemplate
from laserlm.searching.guard import Harm
from laserlm.store import RunInfo, Store
from laserlm.studies.flipping import Flips
from laserlm.studies.loss_map import LossMap
from laserlm.web import explorer
from laserlm.web.board import board_html, board_rows
from laserlm.web.chat_box import chat_box
from laserlm.web.flip_rows import flip_rows
from laserlm.web.pages import page
from laserlm.web.playground import MAX_NEW_TOKENS, MAX_PROMPT_CHARACTERS, RUN, Playground

PROMPTS = (
    "The capital of Portugal is",
    "The chemical symbol for gold is",
    "The author of the play Hamlet is",
    "The largest planet of the solar system is",
    "The language spoken in Brazil is",
    "Water boils at a temperature of",
)
"""Example prompts: facts that a small model partly knows."""
VARIANT_NAMES = ("Base", "Edited", "Only the removed part")
LOWEST_SIZE = "lowest over sizes"
BY_LOSS, BY_HARM = "change of loss", "harm"
MAX_EXAMPLES_SHOWN = 100
"""Number of corrected, and of broken, examples shown."""
MAX_PROMPTS_OFFERED = 30
"""Number of corrected examples of a run offered as prompts."""
QUEUE_SIZE = 32
"""Number of waiting requests; further ones are refused."""
MAP_CACHE_SIZE = 4
"""Number of cached loss maps. Each is computed from all scores of a search."""
LISTENER_OPTIONS: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
MODEL_OPTIONS: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "always_last"}
"""Options of listeners that run the model: one call at a time, and only the last position of a slider."""


def stylesheet() -> str:
    """Return the app's own style sheet."""
    return _asset("app.css")


def build(store: Store, lm: LanguageModel) -> gr.Blocks:
    """Return the app. The choices of a user exist only in the user's page.

    Args:
        store: the results database.
        lm: the model of the playground; no other code may use it at the same time.

    Raises:
        ModelError: if the model has no head or no tokenizer.
    """
    playground = Playground(lm, store)
    with gr.Blocks(analytics_enabled=False, title="laserlm", fill_width=True) as blocks:
        _html(page("app_head", model=lm.name))
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Leaderboard", id="leaderboard"):
                words = gr.Textbox(label="Find a row", placeholder="words of a model, a task, a run")
                board = _html("", elem_id="board")
            with gr.Tab("Explorer", id="explorer"):
                run, loss_map = _explorer(store)
            with gr.Tab("Playground", id="playground"):
                form = _playground(playground)
            reductions = [form.text]
            if ChatTemplate(lm).exists:
                with gr.Tab("Chat", id="chat"):
                    reductions.append(chat_box(playground, LISTENER_OPTIONS | MODEL_OPTIONS))
            with gr.Tab("Examples", id="examples"):
                _examples(store, run, form, tabs)
        gr.on([blocks.load, words.change], lambda words: board_html(board_rows(store), words), words, board, **LISTENER_OPTIONS)
        blocks.load(lambda: _runs(store), None, [run, loss_map], **LISTENER_OPTIONS)
        for box in reductions:
            blocks.load(lambda: _latest_best(store, lm), None, box, **LISTENER_OPTIONS)
    app: gr.Blocks = blocks.queue(max_size=QUEUE_SIZE)
    return app


def _latest_best(store: Store, lm: LanguageModel) -> str:
    """Return what the latest search of the model chose, where it chose a reduction that the model has the matrices for."""
    for run in explorer.searches(store):
        best = (run.outcome or {}).get("best")
        if best and run.full_model == lm.name:
            with suppress(LaserError):
                resolve(lm.matrices, best)
                return _text_of(run)
    return ""


def _text_of(run: RunInfo) -> str:
    """Return what a search chose as text for a box, or the name of the search where that is long."""
    best = str((run.outcome or {}).get("best") or "")
    return best if best == short_form(best) else f"{RUN}{run.id}"


def _runs(store: Store) -> tuple[Any, str]:
    """Return the dropdown of searches, and the text in the place of the map until one is chosen."""
    searches = explorer.searches(store)
    alert = _alert("There is no search in this database yet; make one: laser search bundled")
    choices = [(explorer.name_of(r), r.id) for r in searches]
    return gr.Dropdown(choices=choices, value=searches[0].id if searches else None), "" if searches else alert


# One function, because its event listeners share the map's cache and the components that they fill.
def _explorer(store: Store) -> tuple[gr.Dropdown, gr.HTML]:  # noqa: C901
    """Lay out the explorer: a search, its loss map, and the examples that the chosen candidate changed."""

    @lru_cache(maxsize=MAP_CACHE_SIZE)
    def cached_map(run: str, _updated: datetime) -> LossMap:
        return explorer.loss_map(store, run)

    def current_map(run: str) -> LossMap:
        return cached_map(run, explorer.last_change(store, run))

    def open_run(run: str | None, by: str) -> tuple[Any, Any, Any]:
        if not run:
            return gr.skip(), gr.skip(), gr.skip()
        try:
            choices = explorer.candidates(store, run)
        except LaserError as error:
            return gr.skip(), gr.skip(), _alert(str(error))
        try:
            sizes = current_map(run).sizes
        except LaserError:  # draw_map shows the error
            sizes = []
        return (
            gr.Dropdown(choices=[LOWEST_SIZE, *sizes], value=LOWEST_SIZE),
            gr.Dropdown(choices=[(short_form(text), text) for text in choices], value=None),
            draw_map(run, LOWEST_SIZE, by),
        )

    def draw_map(run: str | None, size: str, by: str) -> str:
        if not run:
            return ""
        try:
            loss_map, by_harm = current_map(run), by == BY_HARM
            table = explorer.table(loss_map, "" if size == LOWEST_SIZE else size, by_harm=by_harm)
            return explorer.table_html(table, by_harm=by_harm, measured=explorer.measured(loss_map))
        except LaserError as error:
            return _alert(str(error))

    def show_changes(run: str | None, candidate: str | None) -> str:
        if not run or not candidate:
            return ""
        try:
            changes = explorer.changes(store, run, candidate)
        except LaserError as error:
            return _alert(str(error))
        return _changes_html(candidate, changes, store.find(run))

    def picked_value(event: gr.EventData) -> str:
        return str(event.pick)

    with gr.Row():
        run = gr.Dropdown(label="Search", choices=[], scale=3, min_width=300)
        size = gr.Dropdown(label="Size", choices=[LOWEST_SIZE], value=LOWEST_SIZE)
        by = gr.Radio([BY_LOSS, BY_HARM], value=BY_LOSS, label="Coloured by")
        candidate = gr.Dropdown(label="Candidate", choices=[], value=None, info="Or click one on the map.")
    with gr.Row():
        with gr.Column(min_width=340):
            map_html = _picks("")
        with gr.Column(min_width=340):
            changes_html = _html("", elem_id="changes")
    run.change(open_run, [run, by], [size, candidate, map_html], **LISTENER_OPTIONS)
    gr.on([size.input, by.input], draw_map, [run, size, by], map_html, **LISTENER_OPTIONS)
    map_html.click(picked_value, None, candidate, **LISTENER_OPTIONS)
    candidate.change(show_changes, [run, candidate], changes_html, **LISTENER_OPTIONS)
    return run, map_html


@dataclass(frozen=True)
class _PlaygroundForm:
    """The inputs and outputs of the playground, and its function."""

    prompt: gr.Textbox
    text: gr.Textbox
    inputs: list[Any]
    outputs: list[Any]
    ask: Callable[..., list[str]]


def _playground(playground: Playground) -> _PlaygroundForm:
    """Lay out the playground: a prompt, a reduction, and the continuations of three variants of the model."""
    lm = playground.lm
    stacks = list(dict.fromkeys(m.stack for m in lm.matrices))
    names = list(dict.fromkeys(m.name for m in lm.matrices))
    last = lm.matrices[-1]

    def ask(
        prompt: str, tokens: float, stack: str | None, layer: float, matrix: str, rho: float, text: str | None = None
    ) -> list[str]:
        try:
            intervention = (text or "").strip() or str(_reduction(stack or "", int(layer), matrix, rho))
            variants = playground.answer(prompt or "", intervention, int(tokens))
        except LaserError as error:
            return [_alert(str(error)), "", "", ""]
        named = zip(VARIANT_NAMES, variants, strict=True)
        return ["", *(page("app_variant", name=name, prompt=prompt, variant=variant) for name, variant in named)]

    with gr.Row():
        prompt = gr.Textbox(label="Prompt", value=PROMPTS[0], lines=2, max_length=MAX_PROMPT_CHARACTERS, scale=3, min_width=300)
        tokens = gr.Slider(1, MAX_NEW_TOKENS, value=8, step=1, label="New tokens")

    def ask_choice(*values: Any) -> list[str]:
        """Answer under the choice, and empty the text, which would go before it."""
        return ["", *ask(*values)]

    with gr.Row():
        stack = gr.Dropdown(stacks, value=last.stack, label="Stack", visible=len(stacks) > 1)
        layer = gr.Slider(0, max(m.layer for m in lm.matrices), value=last.layer, step=1, label="Block")
        matrix = gr.Dropdown(names, value=last.name, label="Matrix")
        rho = gr.Slider(0, 1, value=0.1, step=0.005, label="Kept fraction of the singular values")
    with gr.Row():
        text = gr.Textbox(
            label="Or reductions as text",
            placeholder="28.fc_up@0.05+top4.mlp@0.5, or run ID",
            info="Goes before the choice above, which empties it when it changes. It starts with the latest search's choice.",
            max_lines=3,
            scale=3,
        )
        button = gr.Button("Answer", variant="primary", scale=1)
    alert = _html("")
    with gr.Row():
        outputs = []
        for i in range(len(VARIANT_NAMES)):
            with gr.Column(min_width=240):
                outputs.append(_html("", elem_id=f"side-{i}"))
    form = _PlaygroundForm(prompt, text, [prompt, tokens, stack, layer, matrix, rho, text], [alert, *outputs], ask)
    options = LISTENER_OPTIONS | MODEL_OPTIONS
    gr.on([button.click, prompt.submit, text.submit, tokens.input], ask, form.inputs, form.outputs, **options)
    choice: list[Any] = [x.input for x in (stack, layer, matrix, rho)]
    gr.on(choice, ask_choice, form.inputs[:-1], [text, *form.outputs], **options)
    return form


def _reduction(stack: str, layer: int, matrix: str, rho: float) -> Reduction:
    size = Size(rho=Decimal(str(round(rho, 4))))
    return Reduction(Layers(first=layer, last=layer), matrix, size, stack=stack)


def _examples(store: Store, run: gr.Dropdown, form: _PlaygroundForm, tabs: gr.Tabs) -> None:
    """Lay out prompts for the playground: some facts, and the test examples that the explorer's search corrected."""

    def fill(event: gr.EventData) -> tuple[str, Any]:
        return str(event.pick), gr.Tabs(selected="playground")

    def fill_with_best(run: str | None, event: gr.EventData) -> tuple[str, Any, Any]:
        best = _text_of(store.find(run)) if run else ""
        return str(event.pick), best or gr.skip(), gr.Tabs(selected="playground")

    def list_corrected(run: str | None) -> str:
        if not run:
            return ""
        try:
            info = store.find(run)
            flips = explorer.corrected(store, info)
        except LaserError as error:
            return _alert(str(error))
        first = f", the first {MAX_PROMPTS_OFFERED}" if len(flips) > MAX_PROMPTS_OFFERED else ""
        about = f"Run {info.id} of {info.model}: {len(flips)} test examples that its best corrects{first}"
        picks = [(f.prompt, f"{f.prompt} → {f.edited}, before {f.base}") for f in flips[:MAX_PROMPTS_OFFERED]]
        return page("app_picks", about=about, picks=picks)

    facts = _picks(page("app_picks", about="Facts", picks=[(p, p) for p in PROMPTS]))
    corrected = _picks("")
    run.change(list_corrected, run, corrected, **LISTENER_OPTIONS)
    options: dict[str, Any] = {
        "fn": form.ask,
        "inputs": form.inputs,
        "outputs": form.outputs,
        **LISTENER_OPTIONS,
        **MODEL_OPTIONS,
    }
    facts.click(fill, None, [form.prompt, tabs], **LISTENER_OPTIONS).then(**options)
    corrected.click(fill_with_best, run, [form.prompt, form.text, tabs], **LISTENER_OPTIONS).then(**options)


def _changes_html(candidate: str, changes: Flips, run: RunInfo) -> str:
    flips = {"corrected": changes.of("corrected"), "broken": changes.of("broken")}
    return page(
        "app_changes",
        candidate=short_form(candidate),
        summary={**explorer.summary(changes, run.settings.get("scorer", "")), "harm": _harm_of(run, candidate)},
        changes=flip_rows({change: of[:MAX_EXAMPLES_SHOWN] for change, of in flips.items()}),
        counts={change: len(of) for change, of in flips.items()},
    )


def _harm_of(run: RunInfo, candidate: str) -> str:
    """Return the harm of a candidate as text: of the best as it was measured, of others as the search looked at it."""
    outcome = run.outcome or {}
    point: dict[str, Any] = next((p for p in outcome.get("points", ()) if p["intervention"] == candidate), {})
    harms = (outcome if outcome.get("best") == candidate else point).get("harms", ())
    return "; ".join(str(Harm.from_dict(harm)) for harm in harms) or "not measured"


def _picks(value: str) -> gr.HTML:
    """Return an element whose buttons trigger a click event with the value of the button."""
    return _html(value, js_on_load=_asset("app.js"))


def _html(value: str, **options: Any) -> gr.HTML:
    """Return an element with HTML from ``page``, which escapes all data."""
    return gr.HTML(value, apply_default_css=False, **options)


def _alert(text: str) -> str:
    return page("app_alert", text=text)


def _asset(name: str) -> str:
    return (files("laserlm.web") / "templates" / name).read_text(encoding="utf-8")
