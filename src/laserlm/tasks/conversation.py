"""Conversations in the rows of a user's file: lists of messages with a role and a text."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from laserlm.errors import TaskError

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Other names of the speakers of a conversation."""


def list_of(text: str) -> Any:
    """Return the list that a cell of a table writes: JSON, Python, or texts with a separator."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, list | dict):
            return value
    separator = next((s for s in ("|", "\n", ";") if s in text), None)
    return text if separator is None else [part.strip() for part in text.split(separator)]


def conversation_of(values: dict[str, Any], origin: str) -> tuple[tuple[str, str], ...]:
    """Return the conversation before the answer, and put its texts, and an answer that it ends in, among the values."""
    given = values.get("messages", values.get("prompt"))
    if isinstance(given, str) and "messages" in values:
        given = list_of(given)
    if not isinstance(given, list):
        if "messages" in values:
            raise TaskError(f"{origin}: the field 'messages' must be a list of objects with 'role' and 'content'")
        return ()
    if not (given and all(isinstance(m, dict) for m in given)):
        return ()  # the prompt is reported as no text
    messages = [message_of(m, origin) for m in given]
    if isinstance(values.get("answer"), list) and values["answer"] and isinstance(values["answer"][-1], dict):
        values["answer"] = message_of(values["answer"][-1], origin)[1]
    if values.get("answer") is None:
        last = max((i for i, (role, _) in enumerate(messages) if role == "assistant"), default=0)
        if last == 0:
            raise TaskError(f"{origin}: 'messages' must hold a question and, last, the assistant's answer")
        values["answer"], messages = messages[last][1], messages[:last]
    values["prompt"] = "\n\n".join(text for _, text in messages)
    return tuple(messages)


def message_of(message: Mapping[str, Any], origin: str) -> tuple[str, str]:
    """Return the role and the text of a message."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(role, str) or not isinstance(content, str):
        raise TaskError(f"{origin}: a message needs the texts 'role' and 'content', got {dict(message)!r:.80}")
    return ROLES.get(role, role), content
