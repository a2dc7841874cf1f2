"""Questions that are put through a model's chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import bpe
from tokenizers import processors

from laserlm.errors import ScoringError, TaskError, TokenizationError
from laserlm.models import LanguageModel
from laserlm.scoring.chat import ChatTemplate, without_thoughts
from laserlm.scoring.conversation import Conversation
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.generation import generate, generate_for
from laserlm.scoring.tokenize import encode, scorable
from laserlm.tasks import Decoding, Example, Split, Task, task

Make = Callable[..., LanguageModel]
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
NO_SYSTEM = "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
THINKS = CHATML.replace("assistant\n{% endif", "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif")
ALWAYS_THINKS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
QUESTION = Example(id="q", prompt="The capital of Norway?", answer="Oslo", messages=(("user", "The capital of Norway?"),))


def with_template(lm: LanguageModel, template: str | None, *, bos: bool = True) -> LanguageModel:
    """Return the model with a tokenizer that has a chat template, and puts a token before a text."""
    tokenizer = bpe({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    if bos:
        pair = [("<s>", tokenizer.bos_token_id)]
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=pair)
    tokenizer.chat_template = template
    lm.tokenizer = tokenizer
    return lm


@pytest.fixture
def lm(make: Make) -> LanguageModel:
    return with_template(make("llama"), CHATML)


def text_of(lm: LanguageModel, e: Example) -> str:
    """Return all that the model reads for an example, the answer included."""
    (row,) = encode(lm, [e], "answer")
    return str(lm.require_tokenizer().decode([*row.ids[: row.positions[0] + 1], *row.targets]))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<s>user\nThe capital of Norway?</s>\n<s>assistant\nOslo"),
        ("{{ bos_token }}" + LLAMA_2, "<s>[The capital of Norway?] Oslo"),
        (LLAMA_2, "<s>[The capital of Norway?] Oslo"),
        (THINKS, "<s>user\nThe capital of Norway?</s>\n<s>assistant\n<think></think>Oslo"),
        (ALWAYS_THINKS, "<s>user\nThe capital of Norway?</s>\n<s>assistant\n<think>\n</think>\n\nOslo"),
    ],
)
def test_the_answer_is_where_the_template_has_it_and_the_text_begins_once(make: Make, template: str, expected: str) -> None:
    assert text_of(with_template(make("llama"), template), QUESTION) == expected


def test_a_system_text_that_a_template_refuses_begins_the_question(make: Make) -> None:
    asked = replace(QUESTION, messages=(("system", "Be short."), *QUESTION.messages))
    lm = with_template(make("llama"), NO_SYSTEM.replace("{{ bos_token }}", ""))
    assert text_of(lm, asked) == "<s>user\nBe short.\n\nThe capital of Norway?</s>\n<s>assistant\nOslo"


def test_a_model_without_a_template_reads_the_prompt_unless_one_is_asked_for(make: Make) -> None:
    lm = with_template(make("llama"), None)
    assert text_of(lm, QUESTION) == "<s>The capital of Norway? Oslo"
    with pytest.raises(TokenizationError, match="has no chat template to ask the questions through"):
        text_of(lm, replace(QUESTION, needs_template=True))


def test_a_prompt_that_has_the_template_s_text_is_not_put_through_it_again(lm: LanguageModel) -> None:
    prompt = "<s>user\nThe capital of Norway?</s>\n<s>assistant\n"
    assert text_of(lm, replace(QUESTION, prompt=prompt, messages=(("user", prompt),))) == prompt + "Oslo"


def test_a_prompt_that_begins_a_text_itself_is_scored_as_one_that_does_not(lm: LanguageModel) -> None:
    plain = Example(id="q", prompt="The capital of Norway is", answer="Oslo")
    begun = replace(plain, prompt="<s>" + plain.prompt)
    assert encode(lm, [begun], "answer") == encode(lm, [plain], "answer")
    assert generate(lm, [begun.prompt]) == generate(lm, [plain.prompt])
    (row,) = encode(lm, [plain], "answer")
    assert row.ids.count(lm.require_tokenizer().bos_token_id) == 1
    with pytest.raises(TokenizationError, match="begins with '<s>' twice"):
        encode(lm, [replace(plain, prompt="<s><s>The capital")], "answer")


def test_a_text_that_begins_itself_is_measured_with_one_start(lm: LanguageModel) -> None:
    text = "The capital of France is Paris and the capital of Spain is Madrid"
    rows = [encode(lm, [Example("t", "", start + text, joint="")], "perplexity") for start in ("", "<s>")]
    assert rows[0] == rows[1]


def test_generated_text_is_what_plain_transformers_writes_in_the_conversation(lm: LanguageModel) -> None:
    tokenizer: Any = lm.require_tokenizer()
    conversation = [{"role": "user", "content": QUESTION.prompt}]
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    end = [lm.model.generation_config.eos_token_id, tokenizer.eos_token_id]
    with torch.no_grad():
        out = lm.model.generate(  # type: ignore[operator]
            **ids, max_new_tokens=6, min_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=[e for e in end if e]
        )
    expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    ((text,),) = generate_for(lm, [QUESTION], Decoding(new_tokens=6))
    assert text == expected
    assert ChatTemplate(lm).end_tokens == (tokenizer.eos_token_id,)


def test_a_reply_is_passed_on_as_it_grows_and_is_a_scored_generation(lm: LanguageModel) -> None:
    pieces: list[str] = []
    reply = Conversation(lm, max_new_tokens=6).reply(QUESTION.prompt, pieces.append)
    ((text,),) = generate_for(lm, [QUESTION], Decoding(new_tokens=6))
    assert "".join(pieces) == text
    assert reply == text.strip()
    assert len(pieces) > 1


def test_a_reply_is_as_long_as_the_model_has_room_for(lm: LanguageModel) -> None:
    talk = Conversation(lm, max_new_tokens=10_000)
    assert talk.reply(QUESTION.prompt)
    talk.add("a " * 100, "b " * 100)
    with pytest.raises(ScoringError, match="Ask for fewer new tokens"):
        talk.reply(QUESTION.prompt)


def test_sampled_replies_differ_and_leave_the_greedy_ones_as_they_are(lm: LanguageModel) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampled = {Conversation(lm, max_new_tokens=8, temperature=5.0).reply(QUESTION.prompt) for _ in range(3)}
    assert len(sampled) > 1
    assert len({Conversation(lm, max_new_tokens=8).reply(QUESTION.prompt) for _ in range(2)}) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nOslo? Bergen?\n</think>\n\nOslo", "Oslo"),
        ("[THINK]Bergen[/THINK]Oslo", "Oslo"),
        ("<think>\nBergen, no", ""),
        ("Oslo <think>", "Oslo <think>"),
    ],
)
def test_thoughts_are_no_answer(text: str, answer: str) -> None:
    assert without_thoughts(text) == answer


def test_all_examples_that_cannot_be_scored_are_reported_and_can_be_left_out(lm: LanguageModel) -> None:
    good = [Example(f"g{i}", f"The capital of {c} is", "Rome") for i, c in enumerate(("Italy", "France", "Spain"))]
    bad = [Example(f"b{i}", "The cap", "ital", joint="") for i in range(7)]
    split = Split("t", "all", (good[0], *bad, *good[1:]), "answer")
    with pytest.raises(TokenizationError) as caught:
        evaluate(lm, split)
    lines = str(caught.value).splitlines()
    assert lines[0] == "7 of 10 examples cannot be scored:"
    assert [line.strip().partition(":")[0] for line in lines[1:6]] == [f"example 'b{i}'" for i in range(5)]
    assert lines[6].strip() == "and 2 more"
    kept = scorable(lm, split)
    assert (kept.examples, kept.skipped) == (tuple(good), 7)
    assert evaluate(lm, kept).as_dict()["skipped"] == 7


def test_another_system_text_is_another_task_and_a_text_that_is_measured_takes_none(tmp_path: Path) -> None:
    examples = [Example(str(i), f"Question {i}?", "yes") for i in range(5)]
    hashes = {Task.of("t", examples, system=system).every.hash for system in (None, "Be short.", "Be kind.")}
    assert len(hashes) == 3
    file = tmp_path / "text.txt"
    file.write_text("A text.\n")
    with pytest.raises(TaskError, match="scored by perplexity, which reads no conversation"):
        task(f"perplexity:{file}", chat=True)


def test_built_in_tasks_keep_their_prompts_unless_a_conversation_is_asked_for() -> None:
    plain, chat = task("worldfacts").every, task("worldfacts", chat=True).every
    assert {e.messages for e in plain} == {()}
    assert chat.examples[0].messages == (("user", plain.examples[0].prompt),)
    assert (plain.scorer, chat.scorer, chat.decoding.new_tokens) == ("answer", "contains", 32)
    assert plain.hash != chat.hash
