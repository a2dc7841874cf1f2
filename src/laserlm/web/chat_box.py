"""The app's chat: one conversation with the unchanged model and one with the edited model, side by side."""

from __future__ import annotations

from typing import Any

import gradio as gr

from laserlm.errors import LaserError
from laserlm.web.pages import page
from laserlm.web.playground import MAX_NEW_TOKENS, MAX_PROMPT_CHARACTERS, Playground, Turns

EMPTY: tuple[Turns, Turns] = ((), ())


def chat_box(playground: Playground, options: dict[str, Any]) -> gr.Textbox:
    """Lay out the chat, and return the box of its reductions.

    Args:
        playground: of a model with a chat template.
        options: of listeners that run the model.
    """

    def send(message: str, text: str | None, conversations: tuple[Turns, Turns]) -> list[Any]:
        asked = tuple((*turns, ("user", message or "")) for turns in conversations)
        try:
            replies = playground.chat(asked, text or "", MAX_NEW_TOKENS)
        except LaserError as error:
            return [page("app_alert", text=str(error)), *[gr.skip()] * 4]
        answered = tuple((*turns, ("assistant", reply)) for turns, reply in zip(asked, replies, strict=True))
        return ["", "", answered, *_columns(answered, text or "")]

    def clear() -> list[Any]:
        return ["", EMPTY, "", ""]

    with gr.Row():
        message = gr.Textbox(label="Message", lines=2, max_length=MAX_PROMPT_CHARACTERS, scale=3, min_width=300)
        text = gr.Textbox(label="Reductions of the edited model", placeholder="28.fc_up@0.05, or run ID", max_lines=2, scale=2)
    with gr.Row():
        button = gr.Button("Send", variant="primary")
        anew = gr.Button("New conversation")
    alert = gr.HTML("", apply_default_css=False)
    conversations = gr.State(EMPTY)
    with gr.Row():
        columns = []
        for name in ("base", "edited"):
            with gr.Column(min_width=300):
                columns.append(gr.HTML("", apply_default_css=False, elem_id=f"chat-{name}"))
    gr.on(
        [button.click, message.submit],
        send,
        [message, text, conversations],
        [alert, message, conversations, *columns],
        **options | {"trigger_mode": "once"},
    )
    gr.on([anew.click, text.input], clear, None, [alert, conversations, *columns], api_visibility="private")
    return text


def _columns(conversations: Any, intervention: str) -> list[str]:
    pairs = zip(("Base", "Edited"), ("", intervention), conversations, strict=True)
    return [page("app_chat", name=name, intervention=applied, turns=turns) for name, applied, turns in pairs]
