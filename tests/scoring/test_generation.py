from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import CAUSAL, SEQ2SEQ, bpe
from tokenizers import processors

import laserlm.scoring.generation as module
from laserlm.edit import applied
from laserlm.errors import ScoringError
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.generation import continuation, generate, generate_for
from laserlm.searching.guard import own_text
from laserlm.tasks import Decoding, Example, Split

Make = Callable[..., LanguageModel]
PROMPTS = ["The capital of France is", "Rome is a city in Italy and the capital of Norway is", "Oslo"]


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_logits_that_are_not_finite_end_in_an_error_with_the_way_out(temperature: float | None, llama: LanguageModel) -> None:
    """A model in half precision may overflow. Sampling would end in an error of PyTorch, and greedy decoding in any text."""
    with torch.no_grad():
        llama.model.model.norm.weight.fill_(3e4)
        llama.model.lm_head.weight.fill_(3e4)
    llama.model.half()
    expected = r"are not finite, so it writes no text: .* overflows float16.*--dtype float32"
    with pytest.raises(ScoringError, match=f"logits of llama {expected}"):
        generate(llama, ["The city"], max_new_tokens=3, temperature=temperature)
    with pytest.raises(ScoringError, match=rf"logits of llama under 1\.fc_up@0\.5 {expected}"), applied(llama, "1.fc_up@0.5"):
        generate(llama, ["The city"], max_new_tokens=3, temperature=temperature)
    with pytest.raises(ScoringError, match=expected):
        own_text(llama, 2, 0, 5)


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_a_batch_continues_as_plain_greedy_decoding_does(family: str, make: Make) -> None:
    lm = make(family)
    tok = lm.require_tokenizer()
    expected = []
    for prompt in PROMPTS:
        ids = tok(prompt).input_ids
        tokens = [0] if lm.kind == "encoder-decoder" else list(ids)
        start = len(tokens)
        with torch.no_grad():
            while len(tokens) < start + 6:
                inputs = {"input_ids": torch.tensor([tokens])}
                if lm.kind == "encoder-decoder":
                    inputs = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([tokens])}
                logits = lm.model(**inputs).logits[0, -1]
                if len(tokens) == start:
                    logits[tok.eos_token_id] = -torch.inf  # one new token at least
                tokens.append(int(logits.argmax()))
                if tokens[-1] == lm.model.generation_config.eos_token_id:
                    break
        expected.append(tok.decode(tokens[start:], skip_special_tokens=True))
    assert generate(lm, PROMPTS, max_new_tokens=6) == expected


def test_settings_of_the_checkpoint_do_not_change_greedy_decoding(make: Make) -> None:
    lm = make("llama")
    plain = generate(lm, PROMPTS)
    lm.model.generation_config.num_beams = 3
    lm.model.generation_config.repetition_penalty = 5.0
    lm.model.generation_config.no_repeat_ngram_size = 1
    assert generate(lm, PROMPTS) == plain


def test_inputs_without_a_generation_are_errors(make: Make, llama: LanguageModel) -> None:
    with pytest.raises(ScoringError, match="does not generate"):
        generate(make("bert"), PROMPTS)
    with pytest.raises(ScoringError, match="nothing to generate"):
        generate(llama, [""])
    with pytest.raises(ScoringError, match="and gpt2 takes 128"):
        generate(make("gpt2"), PROMPTS, max_new_tokens=128)


def plain(lm: LanguageModel, prompts: list[str], n: int) -> list[str]:
    """Return what each prompt alone gives."""
    return [generate(lm, [p], max_new_tokens=n)[0] for p in prompts]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "opt", "bloom", "t5"])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batches_write_token_for_token_what_single_prompts_write(family: str, batch_size: int, make: Make) -> None:
    lm = make(family)
    prompts = [*PROMPTS, "The claim is", "Is the capital of Italy the city of Rome? The claim is", "Lisbon is", "Madrid is the"]
    rows = [Example(str(i), p, "Paris") for i, p in enumerate(prompts)]
    progress: list[int] = []
    result = generate_for(lm, rows, Decoding(new_tokens=8), batch_size, lambda done, _: progress.append(done))
    assert result == [[text] for text in plain(lm, prompts, 8)]
    assert progress[-1] == len(prompts)
    assert len(set(map(tuple, result))) > 1


def test_a_model_that_takes_no_padding_writes_for_prompts_of_one_length_at_a_time(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make("llama")
    lm.pads_exactly = False
    lengths: list[int] = []
    plainly = module.generate

    def seen(lm: LanguageModel, prompts: list[str], **inputs: Any) -> list[str]:
        lengths.append(len({len(ids) for ids in lm.require_tokenizer()(prompts).input_ids}))
        return plainly(lm, prompts, **inputs)

    monkeypatch.setattr(module, "generate", seen)
    rows = [Example(str(i), p, "Paris") for i, p in enumerate([*PROMPTS, *PROMPTS])]
    assert generate_for(lm, rows, Decoding(new_tokens=4)) == [[t] for t in plain(lm, [*PROMPTS, *PROMPTS], 4)]
    assert set(lengths) == {1}


def test_a_text_ends_before_its_stop_string(llama: LanguageModel) -> None:
    (full,) = generate(llama, PROMPTS[:1], max_new_tokens=20)
    for stop in (full[5:8], full[12:13]):
        (text,) = generate(llama, PROMPTS[:1], max_new_tokens=20, stops=[stop, "not there"])
        assert text == full[: full.index(stop)]
    together = generate(llama, PROMPTS, max_new_tokens=20, stops=[full[5:8]])
    assert together == [t.partition(full[5:8])[0] for t in generate(llama, PROMPTS, max_new_tokens=20)]


def test_new_tokens_are_as_many_as_there_is_room_for(make: Make) -> None:
    lm = make("gpt2")
    tokenizer = lm.require_tokenizer()
    long = " ".join(["Rome"] * 120)
    n = len(tokenizer(long).input_ids)
    assert n < 128
    ((text,),) = generate_for(lm, [Example("long", long, "Paris")], Decoding(new_tokens=50))
    assert text == plain(lm, [long], 128 - n)[0]
    with pytest.raises(ScoringError, match=r"example 'longer' has \d+ tokens, and gpt2 takes 128\. Shorten the prompt"):
        generate_for(lm, [Example("longer", " ".join(["Rome"] * 200), "Paris")], Decoding())


def test_samples_differ_and_come_again_with_their_seed(llama: LanguageModel) -> None:
    rows = [Example(str(i), p, "Paris") for i, p in enumerate(PROMPTS)]
    state = torch.random.get_rng_state()
    result = generate_for(llama, rows, Decoding(new_tokens=6, samples=4))
    assert all(len(of) == 4 and len(set(of)) > 1 for of in result)
    assert generate_for(llama, rows, Decoding(new_tokens=6, samples=4)) == result
    assert generate_for(llama, rows, Decoding(new_tokens=6, samples=4, seed=1)) != result
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_masked_model_fills_all_masks_at_once(make: Make) -> None:
    lm = make("roberta")
    tok = lm.require_tokenizer()
    rows = [Example("a", "Rome is", "x", masked="Rome is {mask}"), Example("b", "The capital of France is", "x")]
    result = generate_for(lm, rows, Decoding(masks=3))
    texts = ["Rome is <mask> <mask> <mask>", "The capital of France is <mask> <mask> <mask>."]
    for text, [inputs] in zip(texts, result, strict=True):
        ids = torch.tensor([tok(text).input_ids])
        with torch.no_grad():
            best = lm.model(ids).logits[0].argmax(-1)
        assert (ids == tok.mask_token_id).sum() == 3
        assert inputs == tok.decode(best[ids[0] == tok.mask_token_id], skip_special_tokens=True)


def test_memory_that_runs_out_halves_the_batch_of_prompts(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly = module.generate
    sizes: list[int] = []

    def small(lm: LanguageModel, prompts: list[str], **inputs: Any) -> list[str]:
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError
        return plainly(lm, prompts, **inputs)

    monkeypatch.setattr(module, "generate", small)
    rows = [Example(str(i), p, "Paris") for i, p in enumerate(PROMPTS)]
    assert generate_for(llama, rows, Decoding(new_tokens=4)) == [[t] for t in plain(llama, PROMPTS, 4)]
    assert sizes[0] == 3
    monkeypatch.setattr(module, "generate", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        generate_for(llama, rows, Decoding())
    with pytest.raises(ScoringError, match="a single row does not fit"):
        evaluate(llama, Split("example", "all", tuple(rows), "contains"))


def test_a_space_at_the_start_of_a_generation_is_kept(make: Make) -> None:
    lm = make("llama")
    lm.tokenizer = bpe({"pad_token": "<pad>", "eos_token": "</s>"}, metaspace=True)
    tok = lm.tokenizer
    prompts = ["The capital of France is", "Rome"]
    for prompt, text in zip(prompts, generate(lm, prompts, max_new_tokens=5), strict=True):
        ids = tok(prompt).input_ids
        with torch.no_grad():
            tokens = list(ids)
            for step in range(5):
                logits = lm.model(torch.tensor([tokens])).logits[0, -1]
                if not step:
                    logits[tok.eos_token_id] = -torch.inf
                tokens.append(int(logits.argmax()))
        assert prompt + text == tok.decode(tokens, skip_special_tokens=True)
    # Decoded by itself, a word at the start has no space before it.
    assert continuation(tok, tok("Rome").input_ids, tok("Rome is").input_ids) == " is"
    assert tok.decode(tok("Rome is").input_ids[1:]) == "is"


def test_no_end_token_is_between_a_prompt_and_its_generation(make: Make) -> None:
    lm = make("llama")
    expected = generate(lm, PROMPTS)
    ends = bpe({"pad_token": "<pad>", "eos_token": "</s>"})
    ends._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ends.eos_token_id)]
    )
    assert ends("Rome").input_ids[-1] == ends.eos_token_id
    lm.tokenizer = ends
    assert generate(lm, PROMPTS) == expected


def test_a_prompt_with_little_room_takes_none_from_the_others(make: Make) -> None:
    lm = make("gpt2")
    rows = [Example("long", " ".join(["Rome"] * 120), "Paris"), *(Example(p, p, "Paris") for p in PROMPTS)]
    n = len(lm.require_tokenizer()(rows[0].prompt).input_ids)
    result = generate_for(lm, rows, Decoding(new_tokens=20))
    assert n + 20 > 128
    assert result[1:] == [[t] for t in plain(lm, PROMPTS, 20)]
