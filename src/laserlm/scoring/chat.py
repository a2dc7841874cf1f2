"""Questions as a model's chat template puts them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from laserlm.errors import TokenizationError
from laserlm.models.language_model import LanguageModel
from laserlm.tasks.example import Example

THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thought>", "</thought>"), ("<reasoning>", "</reasoning>"))
"""Tags between which models think."""
NO_THINKING = {"enable_thinking": False, "thinking": False}
"""Variables that make templates close the thinking; other templates do not read them."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a model's tokenizer, if it has one."""

    lm: LanguageModel

    @cached_property
    def exists(self) -> bool:
        """Whether the model is a causal or reward model with a chat template."""
        if self.lm.kind not in ("causal", "reward"):
            return False
        try:
            return bool(self.lm.require_tokenizer().get_chat_template())
        except ValueError:  # no template, or several without a default one
            return False

    @cached_property
    def separator(self) -> str:
        """The white space that the template puts between the start of the assistant's turn and its text."""
        return self._around_answer[0]

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """The token that the template puts after the assistant's text, if it is a special one."""
        tokenizer = self.lm.require_tokenizer()
        ids = tokenizer(self._around_answer[1], add_special_tokens=False).input_ids
        return tuple(ids[:1]) if ids and ids[0] in tokenizer.all_special_ids else ()

    @cached_property
    def _around_answer(self) -> tuple[str, str]:
        """The texts before and after the assistant's text in its turn."""
        question = [("user", "Question")]
        try:
            start = self._render(question)
            full = self._apply([*question, ("assistant", "Answer")], add_generation_prompt=False)
        except TemplateError:
            return "", ""
        before, _, after = full.rpartition("Answer")
        between = before[len(start) :] if before.startswith(start) else ""
        return between if between.isspace() else "", after.strip()

    def prompt(self, e: Example) -> str | None:
        """Return the text of a conversation up to where the assistant answers; None if the example is asked plainly.

        Raises:
            TokenizationError: if the example needs a template and the model has none, or the template refuses it.
        """
        if not e.messages:
            return None
        if not self.exists:
            if e.needs_template:
                raise TokenizationError(
                    f"{self.lm.name} has no chat template to ask the questions through. Leave out --chat and --system (chat, "
                    "system), or put the template's text into the prompts."
                )
            return None
        if not e.needs_template and self._is_templated(e):
            return None
        try:
            return self._render(list(e.messages))
        except TemplateError as error:
            raise TokenizationError(
                f"example {e.id!r}: the chat template of {self.lm.name} refuses its conversation: {error}. Use --no-chat."
            ) from None

    def answered(self, e: Example, answer: str) -> str | None:
        """Return the text of a conversation with an answer at its end; None if the example is asked plainly.

        Raises:
            TokenizationError: as ``prompt``.
        """
        if self.prompt(e) is None:
            return None
        try:
            return self._apply([*e.messages, ("assistant", answer)], add_generation_prompt=False)
        except TemplateError as error:
            raise TokenizationError(
                f"example {e.id!r}: the chat template of {self.lm.name} refuses its conversation: {error}. Use --no-chat."
            ) from None

    def _is_templated(self, e: Example) -> bool:
        """Return whether a prompt has the template's text already: special tokens are in it."""
        return any(token in e.prompt for token in self.lm.require_tokenizer().all_special_tokens)

    def _render(self, messages: list[tuple[str, str]]) -> str:
        try:
            text = self._apply(messages, add_generation_prompt=True)
        except TemplateError:
            if messages[0][0] != "system" or len(messages) < 2:
                raise
            # Some templates, such as Gemma's, know no system text; it then begins the first question.
            (_, system), (role, first), *rest = messages
            text = self._apply([(role, f"{system}\n\n{first}"), *rest], add_generation_prompt=True)
        for start, end in THOUGHTS:
            if text.rfind(start) > text.rfind(end):  # a template that begins to think in spite of them
                text = f"{text.rstrip()}\n{end}\n\n"
        return text

    def _apply(self, messages: list[tuple[str, str]], *, add_generation_prompt: bool) -> str:
        conversation = [{"role": role, "content": text} for role, text in messages]
        tokenizer: Any = self.lm.require_tokenizer()
        return str(
            tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **NO_THINKING
            )
        )


def asked_in_chat(lm: LanguageModel, examples: tuple[Example, ...]) -> bool:
    """Return whether the examples are put to the model through its chat template.

    Raises:
        TokenizationError: if they need a template and the model has none.
    """
    template = ChatTemplate(lm)
    return any(template.prompt(e) is not None for e in examples[:1])


def without_thoughts(text: str) -> str:
    """Return a generated text without what the model thought before it answered; empty if it was still thinking."""
    for start, end in THOUGHTS:
        text = re.sub(rf"^\s*{re.escape(start)}.*?(?:{re.escape(end)}\s*|\Z)", "", text, flags=re.DOTALL)
    return text
