from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import SCORED, build

from laserlm.edit import applied
from laserlm.errors import MatrixError, ReportError, ScoringError, SpecError, StoreError
from laserlm.models import LanguageModel
from laserlm.scoring.generation import generate
from laserlm.store import Store
from laserlm.web import batched_variants, playground
from laserlm.web.playground import Playground, Variants, answer

Make = Callable[..., LanguageModel]
PROMPT = "The capital of Italy is"
REDUCTIONS = {"t5": "decoder.1.cross_v_proj@0.3", "t5-gated": "encoder.1.fc_up@0.3+decoder.0.fc_out@r4"}
FUSED = {
    "gpt2": "1.q_proj@0.3+2.fc_out@0.2",
    "phi3": "1.v_proj@0.3+0.fc_up@0.2",
    "mixtral": "1.q_proj@0.3+2.out_proj@r4",
    "opt": "1.q_proj@0.3",
}


def reduction(family: str) -> str:
    return (REDUCTIONS | FUSED).get(family, "1.out_proj@0.3+2.fc_in@0.1")


def weights(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.data.clone() for name, p in lm.model.named_parameters()}


def same(lm: LanguageModel, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p.data, before[name]) for name, p in lm.model.named_parameters())


@pytest.mark.parametrize("family", SCORED)
def test_versions_side_by_side_answer_as_each_by_itself(family: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make(family)
    before = weights(lm)
    alone: list[Variants] = []
    texts = ["", reduction(family)]
    with monkeypatch.context() as patch:
        patch.setattr(batched_variants, "MAX_VARIANT_BYTES", -1)
        alone.append(answer(lm, PROMPT, texts[1], 6))
    ran = [0]
    lm.model.register_forward_hook(lambda *_: ran.__setitem__(0, ran[0] + 1))
    together = answer(lm, PROMPT, texts[1], 6)
    assert ran[0] <= (1 if lm.kind == "masked" else 6)  # not once for each version
    for one, other in zip(together, alone[0], strict=True):
        assert (one.intervention, one.text) == (other.intervention, other.text)
        assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-5)
    assert together[1] != together[0]
    assert same(lm, before)


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
def test_the_likeliest_tokens_and_the_text_are_those_of_the_edited_model(family: str, make: Make) -> None:
    lm = make(family)
    sides = answer(lm, PROMPT, "1.fc_in@0.2", 5)
    assert [s.intervention for s in sides] == ["", "1.fc_in@0.2", "1.fc_in@r26:bottom"]  # floor(0.2 * 32) is 6
    for side in sides:
        with applied(lm, side.intervention), torch.no_grad():
            assert side.text == generate(lm, [PROMPT], max_new_tokens=5)[0]
            logits = lm.model(**lm.require_tokenizer()(PROMPT, return_tensors="pt")).logits[0, -1]
        expected = logits.softmax(-1).topk(5)
        assert [t for t, _ in side.top] == [lm.require_tokenizer().decode([int(i)]) for i in expected.indices]
        assert [p for _, p in side.top] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_probabilities_of_a_model_in_half_precision_are_of_logits_in_float32(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make("llama")
    lm.model.bfloat16()
    monkeypatch.setattr(batched_variants, "MAX_VARIANT_BYTES", -1)  # one variant after another
    head: Any = lm.model.get_output_embeddings()
    hidden: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _module, args: hidden.append(args[0][0, -1]))
    variants = answer(lm, PROMPT, "1.fc_in@0.2", 1)
    for variant, h in zip(variants, hidden, strict=True):
        expected = (head.weight.detach().float() @ h.float()).softmax(-1).topk(5)
        assert [token for token, _ in variant.top] == [lm.require_tokenizer().decode([int(i)]) for i in expected.indices]
        # Rounded to bfloat16, logits of this size change probabilities by up to one part in a hundred.
        assert [p for _, p in variant.top] == pytest.approx(expected.values.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "text"), [("mixtral", "1.experts.0.fc_in@0.1+1.experts.1.fc_out@0.1"), ("opt", "1.fc_in@0.1")]
)
def test_what_meets_no_batch_row_by_row_is_run_one_version_after_another(family: str, text: str, make: Make) -> None:
    lm = make(family)
    before = weights(lm)
    sides = answer(lm, PROMPT, text, 4)
    for side in sides:
        with applied(lm, side.intervention):
            assert side.text == generate(lm, [PROMPT], max_new_tokens=4)[0]
    assert same(lm, before)


def test_a_weight_that_modules_share_is_reduced_in_all_of_them(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama")
    layers: Any = lm.model.model.layers
    layers[2].mlp.gate_proj.weight = layers[1].mlp.gate_proj.weight
    together = answer(lm, PROMPT, "1.fc_in@0.1", 6)
    monkeypatch.setattr(batched_variants, "MAX_VARIANT_BYTES", -1)
    alone = answer(lm, PROMPT, "1.fc_in@0.1", 6)
    for one, other in zip(together, alone, strict=True):
        assert one.text == other.text
        assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-5)


def test_a_weight_that_is_read_past_its_module_is_reduced_too(make: Make) -> None:
    lm = make("llama")
    layer: Any = lm.model.model.layers[1]
    proj = layer.mlp.gate_proj
    layer.mlp.forward = lambda x: layer.mlp.down_proj(
        torch.nn.functional.silu(torch.nn.functional.linear(x, proj.weight)) * layer.mlp.up_proj(x)
    )
    sides = answer(lm, PROMPT, "1.fc_in@0", 4)
    with applied(lm, "1.fc_in@0"):
        assert sides[1].text == generate(lm, [PROMPT], max_new_tokens=4)[0]
    assert sides[1].top != sides[0].top


def test_what_cannot_be_answered_is_reported_and_leaves_the_model_as_it_was(make: Make) -> None:
    lm = make("llama")
    before = weights(lm)
    shared_playground = Playground(lm)
    for options, error, message in [
        (("", "1.fc_in@0.5", 4), ReportError, "must have 1 to 4000 characters, got 0"),
        (("a" * 4001, "1.fc_in@0.5", 4), ReportError, "must have 1 to 4000 characters, got 4001"),
        ((PROMPT, "1.fc_in@0.5", 0), ReportError, "must be 1 to 64"),
        ((PROMPT, "1.fc_in@0.5", 65), ReportError, "must be 1 to 64"),
        ((PROMPT, "", 4), ReportError, "no reduction"),
        ((PROMPT, "fc_in", 4), SpecError, "cannot read the reduction"),
        ((PROMPT, "9.fc_in@0.5", 4), MatrixError, "no layer 9"),
        (("word " * 300, "1.fc_in@0.5", 4), ScoringError, "takes 128"),
    ]:
        with pytest.raises(error, match=message):
            shared_playground.answer(*options)
    assert same(lm, before)
    assert not lm.active
    assert not any(module._forward_hooks for module in lm.model.modules())
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.fill_(float("nan"))  # type: ignore[operator]
    with pytest.raises(ScoringError, match=r"the weights are not finite: model\.embed_tokens\.weight"):
        shared_playground.answer(PROMPT, "1.fc_in@0.5", 4)


def test_a_conversation_is_answered_by_the_unchanged_and_by_the_edited_model(make: Make) -> None:
    lm = make("llama")
    lm.require_tokenizer().chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    talk = Playground(lm)
    before = weights(lm)
    turns = (("user", "The capital of Italy"), ("assistant", "is Rome"), ("user", "and of Spain"))
    prompts = ("The capital of Italy is Rome and of Spain ", "and of Spain ")
    replies = talk.chat([turns, turns[-1:]], "1.fc_in@0.2", 5)
    for text, prompt, reply in zip(("", "1.fc_in@0.2"), prompts, replies, strict=True):
        with applied(lm, text):
            assert reply == generate(lm, [prompt], max_new_tokens=5)[0].strip()
    assert same(lm, before)
    for conversation, message in (((("user", " "),), "must end with a message"), ((("user", "a" * 4001),), "got 4001")):
        with pytest.raises(ReportError, match=message):
            talk.chat([conversation] * 2, "1.fc_in@0.2", 5)
    with pytest.raises(ReportError, match="no reduction"):
        talk.chat([turns] * 2, "", 5)


def test_a_search_may_be_named_in_place_of_what_it_chose(llama: LanguageModel, store: Store) -> None:
    with store.run(kind="search", key="a", settings={"model": "m", "task": "t"}, provenance={}) as run:
        run.finish({"best": "1.fc_in@0.5"})
    with store.run(kind="search", key="b", settings={"model": "m", "task": "t"}, provenance={}) as unchanged:
        unchanged.finish({"best": ""})
    shared_playground = Playground(llama, store)
    assert shared_playground.answer(PROMPT, f"run {run.id}", 4) is shared_playground.answer(PROMPT, "1.fc_in@0.5", 4)
    with pytest.raises(ReportError, match="no reduction"):
        shared_playground.answer(PROMPT, f"run {unchanged.id}", 4)
    with pytest.raises(StoreError, match="no run"):
        shared_playground.answer(PROMPT, "run 123", 4)


def test_an_answer_is_remembered(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shared_playground = Playground(llama)
    first = shared_playground.answer(PROMPT, "1.fc_in@0.50", 4)
    monkeypatch.setattr(playground, "answer", None)
    assert shared_playground.answer(PROMPT, "1.fc_in@0.5", 4) is first


def test_the_number_of_threads_is_as_before(llama: LanguageModel) -> None:
    before = torch.get_num_threads()
    answer(llama, PROMPT, "1.fc_in@0.5", 2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("apart", [False, True])
def test_users_at_once_get_what_each_would_get_alone(apart: bool, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playground, "ANSWER_CACHE_SIZE", 1)  # every question is computed anew
    if apart:
        monkeypatch.setattr(batched_variants, "MAX_VARIANT_BYTES", -1)  # edited in place all the while
    questions = [
        (prompt, f"{layer}.{matrix}@{rho}", 4)
        for prompt in (PROMPT, "Oslo is")
        for layer in (0, 2)
        for matrix in ("fc_in", "v_proj")
        for rho in ("0", "0.2")
    ]
    alone = {q: answer(build("llama"), *q) for q in questions}
    lm = make("llama")
    before = weights(lm)
    shared_playground = Playground(lm)
    gate = threading.Barrier(6)

    def user(start: int) -> list[bool]:
        gate.wait()
        mine = [questions[(start * 5 + i * 7) % len(questions)] for i in range(len(questions))]
        return [shared_playground.answer(*q) == alone[q] for q in mine]

    with ThreadPoolExecutor(6) as pool:
        results = [ok for of in pool.map(user, range(6)) for ok in of]
    assert len(results) == 6 * len(questions)
    assert all(results)
    assert len({sides[1] for sides in alone.values()}) > len(questions) // 2
    assert same(lm, before)


@pytest.mark.bundled
def test_the_bundled_model_knows_a_capital(bundled: LanguageModel) -> None:
    sides = Playground(bundled).answer("The capital of France is", "28.fc_up@0.05", 2)
    assert [s.top[0][0] for s in sides[:2]] == [" Paris", " Paris"]
    assert sides[0].text == generate(bundled, ["The capital of France is"], max_new_tokens=2)[0]
