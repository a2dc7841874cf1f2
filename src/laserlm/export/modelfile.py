"""Write the Modelfile by which Ollama runs a GGUF file, with the model's chat template in Ollama's language."""

from __future__ import annotations

import json
from dataclasses import dataclass

from laserlm.errors import TokenizationError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.chat import ChatTemplate
from laserlm.scoring.tokenize import prefix_tokens
from laserlm.tasks.example import Example

CONTENTS = ("first-content", "second-content", "third-content", "fourth-content")
"""Texts of a conversation by which the template's own text is recognised."""
Messages = list[tuple[str, str]]


@dataclass(frozen=True)
class _Parts:
    """The text that a template puts around the contents of a conversation.

    Args:
        start: before the first question of a conversation without a system text; it may hold the template's own one.
        system: before the system text.
        first: between the system text and the question.
        answer: between a question and its answer.
        again: between an answer and the next question.
        end: after the last question.
    """

    start: str
    system: str
    first: str
    answer: str
    again: str
    end: str

    def prompt(self, messages: Messages) -> str:
        """Return the prompt of a conversation."""
        text, last = "", ""
        for role, content in messages:
            before = {"": self.start, "system": self.first, "assistant": self.again}
            text += {"system": self.system, "assistant": self.answer}.get(role) or before[last]
            text, last = text + content, role
        return text + self.end

    def template(self) -> str:
        """Return the same as a template of Ollama, which is one of Go's."""
        user = f'{{{{ if eq $last "" }}}}{self.start}{{{{ else if eq $last "system" }}}}{self.first}'
        user += f"{{{{ else }}}}{self.again}{{{{ end }}}}"
        return (
            '{{ $last := "" }}{{ range .Messages }}'
            f'{{{{ if eq .Role "system" }}}}{self.system}{{{{ else if eq .Role "user" }}}}{user}'
            f"{{{{ else }}}}{self.answer}{{{{ end }}}}"
            f"{{{{ .Content }}}}{{{{ $last = .Role }}}}{{{{ end }}}}{self.end}"
        )


def modelfile(lm: LanguageModel, file: str) -> str:
    """Return the text of a Modelfile for a GGUF file that lies next to it.

    A chat template that treats all conversations alike is translated. Of another one, a comment says that it is missing.
    """
    lines = [f"FROM ./{file}"]
    template = ChatTemplate(lm) if lm.tokenizer is not None else None
    if template is None or not template.exists:
        return f"{lines[0]}\n"
    tokenizer = lm.require_tokenizer()
    parts = _parts(template, str(tokenizer.decode(prefix_tokens(tokenizer))))
    if parts is None:
        lines.append("# Ollama knows no template for this model: its own one could not be translated. Add a TEMPLATE.")
    else:
        lines.append(f'TEMPLATE """{parts.template()}"""')
    stops = [str(tokenizer.decode([token])) for token in template.end_tokens]
    return "\n".join([*lines, *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops)]) + "\n"


def _parts(template: ChatTemplate, bos: str) -> _Parts | None:
    """Return the parts of a template, or None if they do not make up its prompts.

    Args:
        template: the chat template.
        bos: what the tokenizer puts before a text. It is left out, because llama.cpp puts it there too.
    """
    one, two, three, four = CONTENTS
    plain = _prompt(template, [("user", one), ("assistant", two), ("user", three)])
    with_system = _prompt(template, [("system", four), ("user", one)])
    if plain is None or with_system is None or any(text not in plain for text in (one, two, three)):
        return None
    if not 0 <= with_system.find(four) < with_system.find(one):
        return None
    start, rest = plain.removeprefix(bos).split(one, 1)
    answer, rest = rest.split(two, 1)
    again, end = rest.split(three, 1)
    system, rest = with_system.removeprefix(bos).split(four, 1)
    parts = _Parts(start, system, rest.split(one, 1)[0], answer, again, end)
    conversation = [("user", one), ("assistant", two), ("user", three), ("assistant", four), ("user", one)]
    for messages in (conversation[:1], conversation, [("system", two), *conversation]):
        prompt = _prompt(template, messages)
        if prompt is None or prompt.removeprefix(bos) != parts.prompt(messages):
            return None
    is_plain = not any(mark in text for text in vars(parts).values() for mark in ("{{", '"""'))
    return parts if is_plain else None


def _prompt(template: ChatTemplate, messages: Messages) -> str | None:
    try:
        return template.prompt(Example("chat", "", "", messages=tuple(messages), needs_template=True))
    except TokenizationError:
        return None
