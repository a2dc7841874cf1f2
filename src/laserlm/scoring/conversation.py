"""A conversation with a model through its chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from laserlm.edit.apply import InterventionLike, applied
from laserlm.errors import TokenizationError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.chat import ChatTemplate, without_thoughts
from laserlm.scoring.generation import generate, room_for_new_tokens
from laserlm.tasks.example import Example


@dataclass
class Conversation:
    """A conversation with a model under an intervention, and its history.

    Args:
        lm: a causal model with a chat template; its weights do not change.
        intervention: applied while the model replies.
        system: system text; None leaves it to the template.
        max_new_tokens: largest number of tokens of a reply.
        temperature: sampling temperature. None decodes greedily.
        seed: seed of ``:reference`` decompositions.

    Raises:
        TokenizationError: if the model has no chat template.
    """

    lm: LanguageModel
    intervention: InterventionLike = ""
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float | None = None
    seed: int = 0
    messages: list[tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self._template = ChatTemplate(self.lm)
        if not self._template.exists:
            raise TokenizationError(
                f"{self.lm.name} has no chat template, so it cannot hold a conversation. Let it continue a text: "
                f"laser generate {self.lm.name} PROMPT"
            )
        self.reset()

    def reset(self) -> None:
        """Forget the history."""
        self.messages = [] if self.system is None else [("system", self.system)]

    def reply(self, question: str, on_text: Callable[[str], None] | None = None) -> str:
        """Return the reply to a question, without what the model thought. The history stays as it is.

        A reply has fewer tokens than ``max_new_tokens`` where the model has no room for more.

        Args:
            question: the user's text.
            on_text: is called with each piece of the reply as it is generated.

        Raises:
            ScoringError: if the conversation grows longer than the model allows.
            TokenizationError: if the template refuses the conversation.
        """
        messages = (*self.messages, ("user", question))
        prompt = self._template.prompt(Example("chat", question, "", messages=messages, needs_template=True))
        with applied(self.lm, self.intervention, seed=self.seed):
            (text,) = generate(
                self.lm,
                [str(prompt)],
                max_new_tokens=max(1, min(self.max_new_tokens, room_for_new_tokens(self.lm, str(prompt)))),
                temperature=self.temperature,
                end_tokens=self._template.end_tokens,
                on_text=on_text,
            )
        return without_thoughts(text).strip()

    def add(self, question: str, reply: str) -> None:
        """Add a question and its reply to the history."""
        self.messages += [("user", question), ("assistant", reply)]
