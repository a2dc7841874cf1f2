"""Conversations in the rows of a user's file: lists of messages with a role and a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from laserlm.errors import TaskError
from laserlm.tasks.cells import list_of

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Other names of the speakers of a conversation."""


def conversation_of(values: dict[str, Any], origin: str) -> tuple[tuple[tuple[str, str], ...], int]:
    """Return the conversation before the answer, and the number of messages after it.

    Its texts, and an answer that it ends in, are put among the values.
    """
    turns = values.get("messages", values.get("prompt"))
    if isinstance(turns, str) and "messages" in values:
        turns = list_of(turns)
    if not isinstance(turns, list):
        if "messages" in values:
            raise TaskError(f"{origin}: the field 'messages' must be a list of objects with 'role' and 'content'")
        return (), 0
    if not (turns and all(isinstance(m, dict) for m in turns)):
        return (), 0  # the prompt is reported as no text
    messages = [message_of(m, origin) for m in turns]
    if isinstance(values.get("answer"), list) and values["answer"] and isinstance(values["answer"][-1], dict):
        values["answer"] = message_of(values["answer"][-1], origin)[1]
    unread = 0
    if values.get("answer") in (None, ""):
        last = max((i for i, (role, _) in enumerate(messages) if role == "assistant"), default=0)
        if last == 0:
            raise TaskError(f"{origin}: 'messages' must hold a question and, last, the assistant's answer")
        unread = len(messages) - 1 - last
        values["answer"], messages = messages[last][1], messages[:last]
    values["prompt"] = "\n\n".join(text for _, text in messages)
    return tuple(messages), unread


def message_of(message: Mapping[str, Any], origin: str) -> tuple[str, str]:
    """Return the role and the text of a message."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if message.get("tool_calls") or message.get("function_call"):
        raise TaskError(f"{origin}: a message calls a tool, which cannot be asked. Take the row out, or write it as a text.")
    if isinstance(content, list):
        if others := [part for part in content if not (isinstance(part, dict) and isinstance(part.get("text"), str))]:
            raise TaskError(f"{origin}: a message holds a part that is no text, {others[0]!r:.60}. Take the row out.")
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise TaskError(f"{origin}: a message needs the texts 'role' and 'content', got {dict(message)!r:.80}")
    return ROLES.get(role, role), content
