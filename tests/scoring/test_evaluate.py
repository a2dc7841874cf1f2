from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CAUSAL, SCORED, SIZES, TOKENIZERS, VOCAB, bpe
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from laserlm.edit import applied
from laserlm.edit.apply import default_cache
from laserlm.errors import ModelError, ScoringError, TokenizationError
from laserlm.models import LanguageModel, load
from laserlm.scoring import forward, tokenize
from laserlm.scoring.evaluate import compare, evaluate, text_perplexity
from laserlm.scoring.generation import generate, generate_for
from laserlm.scoring.records import Evaluation
from laserlm.scoring.statistics import clustering_of, paired_difference, paired_mean, sign_flip_test, wilson
from laserlm.scoring.tokenize import encode, scorable
from laserlm.tasks import Decoding, Example, Scorer, Split, task

Make = Callable[..., LanguageModel]

PROMPTS = [
    ("The capital of France is", "Paris"),
    ("The capital of Spain, which is a country, is", "Madrid"),
    ("Rome is", "a city in Italy"),
    ("Oslo", "is"),
    ("The capital of Norway is a city and the capital of Portugal is", "Lisbon"),
    ("This statement is", "false"),
    ("Is the capital of Italy the city of Rome? The claim is", "true"),
]
CHOICES = ("true", "false", "a city in Italy")
SHORT = ("Paris", "Rome", "true")
"""One token each."""


def split(scorer: Scorer = "answer", choices: tuple[str, ...] = ()) -> Split:
    rows = tuple(
        Example(str(i), prompt, choices[i % len(choices)] if choices else answer, choices, group=str(i % 2))
        for i, (prompt, answer) in enumerate(PROMPTS)
    )
    return Split("example", "all", rows, scorer)


def by_hand(lm: LanguageModel, prompt: str, answer: str) -> tuple[list[float], list[int]]:
    """Return log-probability of each answer token and the most likely token in its place, one plain forward pass each."""
    tok = lm.tokenizer
    assert tok is not None
    before = tok(prompt, add_special_tokens=False).input_ids
    targets = tok(f"{prompt} {answer}", add_special_tokens=False).input_ids[len(before) :]
    if lm.kind == "encoder-decoder":
        targets = tok(answer, add_special_tokens=False).input_ids
    logprobs, best = [], []
    with torch.no_grad():
        for i, target in enumerate(targets):
            if lm.kind == "causal":
                logits = lm.model(torch.tensor([before + targets[:i]])).logits[0, -1]
            elif lm.kind == "masked":
                ids = [tok.bos_token_id, *before, *[tok.mask_token_id] * len(targets)]
                ids += [*tok(".", add_special_tokens=False).input_ids, tok.eos_token_id]
                logits = lm.model(torch.tensor([ids])).logits[0, 1 + len(before) + i]
            else:
                source = torch.tensor([tok(prompt).input_ids])
                logits = lm.model(input_ids=source, decoder_input_ids=torch.tensor([[0, *targets[:i]]])).logits[0, -1]
            logprobs.append(logits.log_softmax(-1)[target].item())
            best.append(int(logits.argmax()))
    assert targets
    return logprobs, [int(b == t) for b, t in zip(best, targets, strict=True)]


@pytest.mark.parametrize("family", SCORED)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batches_score_what_single_unpadded_passes_score(family: str, batch_size: int, make: Make) -> None:
    lm = make(family)
    result = evaluate(lm, split(), batch_size=batch_size)
    for score, (prompt, answer) in zip(result.scores, PROMPTS, strict=True):
        logprobs, hits = by_hand(lm, prompt, answer)
        assert score.tokens == len(logprobs)
        assert score.logprob == pytest.approx(sum(logprobs), abs=1e-4)
        assert score.correct == all(hits)
    first = evaluate(lm, split(), scorer="first_token", batch_size=batch_size)
    if lm.kind != "masked":  # a masked model sees as many masks as it is asked for
        for score, (prompt, answer) in zip(first.scores, PROMPTS, strict=True):
            logprobs, hits = by_hand(lm, prompt, answer)
            assert (score.tokens, score.correct) == (1, bool(hits[0]))
            assert score.logprob == pytest.approx(logprobs[0], abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "roberta", "t5"])
def test_a_choice_is_right_when_its_summed_logprob_is_strictly_the_highest(family: str, make: Make) -> None:
    lm = make(family)
    result = evaluate(lm, split("choice", CHOICES), batch_size=4)
    assert len({s.predicted for s in result.scores}) > 1 or lm.kind != "causal"
    for i, (score, (prompt, _)) in enumerate(zip(result.scores, PROMPTS, strict=True)):
        totals = {c: sum(by_hand(lm, prompt, c)[0]) for c in CHOICES}
        answer = CHOICES[i % 3]
        assert score.predicted == max(totals, key=totals.__getitem__)
        assert score.correct == (score.predicted == answer)
        assert score.logprob == pytest.approx(totals[answer], abs=1e-4)
        assert score.tokens == len(by_hand(lm, prompt, answer)[0])
    assert result.classes == CHOICES


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_single_token_choices_are_read_off_one_pass_and_score_the_same(family: str, make: Make) -> None:
    lm = make(family)
    choices = SHORT
    one = split("choice", choices)
    rows = encode(lm, one.examples, "choice")
    assert len(rows) == len(PROMPTS)
    assert all(len(r.choice_tokens) == 3 for r in rows)
    for i, (score, (prompt, _)) in enumerate(zip(evaluate(lm, one).scores, PROMPTS, strict=True)):
        totals = {c: sum(by_hand(lm, prompt, c)[0]) for c in choices}
        assert score.predicted == max(totals, key=totals.__getitem__)
        assert score.logprob == pytest.approx(totals[choices[i % 3]], abs=1e-4)


def silent(lm: LanguageModel) -> LanguageModel:
    """Make every logit equal, so that every comparison is a tie."""
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.zero_()
    return lm


def test_a_tie_is_wrong(make: Make) -> None:
    lm = silent(make("gptj"))
    lm.model.lm_head.bias.data.zero_()
    for choices in (CHOICES, SHORT):
        assert evaluate(lm, split("choice", choices)).accuracy == 0


SCORERS_OF_TOKENS: list[tuple[Scorer, tuple[str, ...]]] = [
    ("choice", ("true", "false")),
    ("choice", SHORT),
    ("answer", ()),
    ("next_token", ()),
    ("first_token", ()),
    ("top5", ()),
]


@pytest.mark.parametrize(("scorer", "choices"), SCORERS_OF_TOKENS)
def test_ties_are_counted(scorer: Scorer, choices: tuple[str, ...], make: Make) -> None:
    lm = make("gptj")
    assert evaluate(lm, split(scorer, choices)).ties == 0
    silent(lm).model.lm_head.bias.data.zero_()
    result = evaluate(lm, split(scorer, choices))
    assert result.ties == result.as_dict()["ties"] == 7
    assert "7 exact ties" in str(result)


def test_a_tie_counts_where_it_decides(make: Make) -> None:
    lm = make("gptj")
    head = silent(lm).model.lm_head
    tok = lm.require_tokenizer()
    paris, rome = (tok(f" {word}", add_special_tokens=False).input_ids[0] for word in ("Paris", "Rome"))
    rows = replace(split(), examples=(Example("0", "The capital of France is", "Paris"),))
    for bias, ties in (({}, (1, 1)), ({paris: 1}, (0, 0)), ({paris: 1, rome: 1}, (1, 0)), ({rome: 1}, (0, 1))):
        head.bias.data.zero_()
        for token, value in bias.items():
            head.bias.data[token] = value
        assert (evaluate(lm, rows).ties, evaluate(lm, rows, scorer="top5").ties) == ties


def test_ties_of_generated_texts_are_not_known(llama: LanguageModel) -> None:
    assert evaluate(llama, replace(split(), decoding=Decoding(new_tokens=2)), scorer="contains").ties is None


def test_equal_logits_cost_the_log_of_the_vocabulary_for_each_token(make: Make) -> None:
    lm = silent(make("llama"))  # its output layer is tied: the embeddings are zero too, and the logits stay equal
    result = evaluate(lm, split())
    assert result.loss == pytest.approx(6.238325, abs=1e-5)  # ln 512
    assert [s.loss for s in result.scores] == pytest.approx([6.238325] * 7, abs=1e-5)


def test_next_token_compares_text_without_case_and_outer_spaces(make: Make) -> None:
    lm = make("llama")
    predicted = [s.predicted for s in evaluate(lm, split("next_token")).scores]
    i, token = next((i, p) for i, p in enumerate(predicted) if p.isalpha())
    rows = split("next_token")
    shouted = replace(rows, examples=(replace(rows.examples[i], answer=token.swapcase()),))
    other = replace(rows, examples=(replace(rows.examples[i], answer=token + "x"),))
    assert evaluate(lm, shouted).accuracy == 1
    assert evaluate(lm, other).accuracy == 0


def test_the_prediction_stops_at_the_first_token_that_greedy_decoding_misses(make: Make) -> None:
    lm = make("llama")
    tok = lm.require_tokenizer()
    prompt = PROMPTS[0][0]
    ids = tok(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        greedy = lm.model.generate(ids, do_sample=False, max_new_tokens=3, pad_token_id=0)[0, ids.shape[1] :].tolist()
    score = evaluate(lm, replace(split(), examples=(Example("0", prompt, "Paris and Rome and Oslo"),))).scores[0]
    expected = tok(" Paris and Rome and Oslo", add_special_tokens=False).input_ids
    miss = next(i for i, (a, b) in enumerate(zip(greedy, expected, strict=False)) if a != b)
    assert score.predicted == tok.decode(greedy[: miss + 1]).strip()
    assert not score.correct


def test_a_masked_prompt_may_hold_its_own_mask(make: Make) -> None:
    lm = make("roberta")
    own = Example("0", "The capital of <mask> is Paris", "France")
    appended = Example("1", "The capital of", "France")
    rows = encode(lm, [own, appended], "answer")
    tok = lm.require_tokenizer()
    assert tok.decode(rows[0].ids).count("<mask>") == tok.decode(rows[1].ids).count("<mask>") == len(rows[0].targets)
    assert rows[0].targets == rows[1].targets
    assert tok.decode(rows[0].ids).endswith("is Paris</s>")
    assert tok.decode(rows[1].ids).endswith("<mask>.</s>")


def test_special_tokens_before_a_text_come_once_and_those_after_it_not_at_all(make: Make) -> None:
    lm = make("llama")
    lm.tokenizer = bpe({"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"})
    row = encode(lm, [Example("0", "The capital of France is", "Paris")], "answer")[0]
    decoded = lm.tokenizer.decode([*row.ids, row.targets[-1]])
    assert decoded == "<s>The capital of France is Paris"


def test_word_marks_of_sentencepiece_belong_to_the_answer(make: Make) -> None:
    lm = make("mistral")
    lm.tokenizer = bpe({"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}, metaspace=True, prefix="<s>")
    row = encode(lm, [Example("0", "The capital of France is", "Paris")], "answer")[0]
    assert lm.tokenizer.convert_ids_to_tokens(row.targets)[0].startswith("▁P")
    assert lm.tokenizer.convert_ids_to_tokens(row.ids[:1]) == ["<s>"]


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        (Example("q7", "The capital of France is ", "Paris"), TokenizationError, "'q7': the answer 'Paris' straddles"),
        (Example("q7", "", "Paris"), TokenizationError, "empty prompt"),
        (Example("q7", "The" + " capital" * 200, "Paris"), ScoringError, "takes 128. Shorten the prompt"),
    ],
)
def test_an_example_that_cannot_be_scored_is_named(example: Example, error: type[Exception], message: str, make: Make) -> None:
    with pytest.raises(error, match=message):
        evaluate(make("gpt2"), replace(split(), examples=(example,)))


def test_a_token_that_was_added_to_the_tokenizer_alone_is_named(llama: LanguageModel) -> None:
    tokenizer = llama.require_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(llama.known_tokens - len(tokenizer) + 1)])
    last = tokenizer.convert_ids_to_tokens(llama.known_tokens)
    examples = tuple(Example(str(i), prompt, "Paris") for i, prompt in enumerate(("It is", f"It {last} is")))
    with pytest.raises(TokenizationError, match=f"example '1' has the token '{last}' \\(512\\).*resize_token_embeddings"):
        evaluate(llama, replace(split(), examples=examples))
    assert scorable(llama, replace(split(), examples=examples)).examples == examples[:1]
    with pytest.raises(TokenizationError, match=f"a prompt has the token '{last}'"):
        generate(llama, [examples[1].prompt])


def test_inputs_that_cannot_be_scored_are_errors(make: Make, llama: LanguageModel) -> None:
    with pytest.raises(ScoringError, match="cannot be scored by choice"):
        evaluate(llama, split(), scorer="choice")
    with pytest.raises(ScoringError, match="empty"):
        evaluate(llama, replace(split(), examples=()))
    with pytest.raises(ScoringError, match="batch size of 0"):
        evaluate(llama, split(), batch_size=0)
    with pytest.raises(ModelError, match="no head that predicts tokens"):
        evaluate(make("decision_transformer"), split())
    llama.tokenizer = None
    with pytest.raises(ModelError, match="without a tokenizer"):
        evaluate(llama, split())


def test_a_model_without_mask_token_says_so(make: Make) -> None:
    lm = make("bert")
    lm.tokenizer = bpe({"pad_token": "<pad>", "eos_token": "</s>"})
    with pytest.raises(TokenizationError, match="no mask token"):
        evaluate(lm, split())


def test_a_logprob_that_is_no_number_is_an_error_and_names_the_intervention(llama: LanguageModel) -> None:
    with torch.no_grad():
        llama.model.model.norm.weight.fill_(float("nan"))
    with applied(llama, "1.fc_in@0.5"), pytest.raises(ScoringError, match=r"1\.fc_in@0\.5 gives example '0'"):
        evaluate(llama, split())


def test_memory_that_runs_out_halves_the_batch(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(llama, split())
    forward = type(llama.model).forward
    sizes: list[int] = []

    def small(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        sizes.append(len(kwargs["input_ids"]))  # type: ignore[arg-type]
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no room")
        return forward(self, *args, **kwargs)

    small.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(llama.model), "forward", small)
    result = evaluate(llama, split(), batch_size=7)
    assert max(sizes) == 7
    assert [s.correct for s in result.scores] == [s.correct for s in expected.scores]
    assert [s.logprob for s in result.scores] == pytest.approx([s.logprob for s in expected.scores], abs=1e-4)


def test_a_batch_size_that_fitted_is_kept(llama: LanguageModel) -> None:
    rows = replace(split(), examples=tuple(replace(e, id=f"{e.id} {i}") for i in range(12) for e in split().examples))
    sizes: list[int] = []

    def tight(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with llama.model.register_forward_pre_hook(tight, with_kwargs=True):
        evaluate(llama, rows, batch_size=32)
    assert len([size for size in sizes if size > 4]) <= 3  # 32, 16 and 8 at most


def test_decompositions_are_freed_before_a_batch_is_halved(llama: LanguageModel) -> None:
    sizes: list[int] = []

    def tight(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2 and sizes.count(sizes[-1]) == 1:
            raise torch.OutOfMemoryError("no room")

    with applied(llama, "1.fc_in@0.5"), llama.model.register_forward_pre_hook(tight, with_kwargs=True):
        evaluate(llama, replace(split(), examples=split().examples[:1] * 7), batch_size=7)
    assert sizes[-2:] == [7, 7]
    assert not default_cache(llama.cache).clear()


@pytest.mark.parametrize("family", list(CAUSAL))
def test_padding_is_exact_in_these_families(family: str, make: Make) -> None:
    lm = make(family)
    assert lm.pads_exactly is None
    evaluate(lm, split())
    assert lm.pads_exactly is True


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("roberta", SIZES | {"is_decoder": True, "pad_token_id": 1, "max_position_embeddings": 130}),
        ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "context_length": 64}),
    ],
)
def test_models_that_padding_would_change_are_scored_without_it(model_type: str, settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    lm = LanguageModel(model=model, tokenizer=TOKENIZERS["causal"](), name=model_type, kind="causal")
    result = evaluate(lm, split())
    assert lm.pads_exactly is False
    for score, (prompt, answer) in zip(result.scores, PROMPTS, strict=True):
        assert score.logprob == pytest.approx(sum(by_hand(lm, prompt, answer)[0]), abs=1e-4)


def test_a_decoder_that_begins_with_two_tokens_is_scored_after_both(make: Make) -> None:
    lm = make("t5")
    lm.model.generation_config.forced_bos_token_id = 7
    result = evaluate(lm, split())
    tok = lm.require_tokenizer()
    prompt, answer = PROMPTS[0]
    targets = tok(answer, add_special_tokens=False).input_ids
    source = torch.tensor([tok(prompt).input_ids])
    with torch.no_grad():
        logits = lm.model(input_ids=source, decoder_input_ids=torch.tensor([[0, 7, *targets[:-1]]])).logits[0, 1:]
    expected = sum(logits.log_softmax(-1)[i, t].item() for i, t in enumerate(targets))
    assert result.scores[0].logprob == pytest.approx(expected, abs=1e-4)


def test_a_masked_model_has_one_mask_for_the_next_token(make: Make) -> None:
    lm = make("bert")
    example = Example("0", "Rome is", "a city in Italy")
    [row] = encode(lm, [example], "next_token")
    [full] = encode(lm, [example], "answer")
    mask = lm.require_tokenizer().mask_token_id
    assert row.ids.count(mask) == len(row.targets) == 1
    assert full.ids.count(mask) == len(full.targets) > 1


def test_progress_is_reported_to_the_end(llama: LanguageModel) -> None:
    progress: list[tuple[int, int]] = []
    evaluate(llama, split(), batch_size=3, on_progress=lambda done, total: progress.append((done, total)))
    assert [total for _, total in progress] == [7] * len(progress)
    steps = [b - a for a, b in pairwise([0, *(done for done, _ in progress)])]
    assert sum(steps) == 7
    assert all(1 <= step <= 3 for step in steps)


def test_figures_agree_with_a_count_by_hand(llama: LanguageModel) -> None:
    result = evaluate(llama, split("choice", ("true", "false")))
    right = [s.correct for s in result.scores]
    assert result.accuracy == sum(right) / 7
    assert result.majority_rate == pytest.approx(4 / 7)  # the choices alternate over seven examples
    assert result.balanced_accuracy == pytest.approx((sum(right[::2]) / 4 + sum(right[1::2]) / 3) / 2)
    assert evaluate(llama, split()).balanced_accuracy is None


def test_compare_counts_pairs(llama: LanguageModel) -> None:
    base = evaluate(llama, split("choice", ("true", "false")))
    flips = (0, 2, 5)
    edited = replace(
        base,
        intervention="1.fc_in@0.5",
        scores=tuple(replace(s, correct=s.correct ^ (i in flips), logprob=s.logprob - 1) for i, s in enumerate(base.scores)),
    )
    result = compare(base, edited)
    broken = sum(base.scores[i].correct for i in flips)
    assert (result.corrected, result.broken, result.n) == (3 - broken, broken, 7)
    assert result.gain == pytest.approx(edited.accuracy - base.accuracy)
    assert result.edited_loss - result.base_loss == pytest.approx(1 / 1)
    assert result.loss_interval == pytest.approx((1, 1))
    with pytest.raises(ScoringError, match="same examples"):
        compare(base, replace(edited, scores=edited.scores[::-1]))
    with pytest.raises(ScoringError, match="same examples"):
        compare(base, replace(edited, scorer="answer"))


def test_an_evaluation_names_its_intervention(llama: LanguageModel) -> None:
    with applied(llama, "0-1.mlp@.50"):
        result: Evaluation = evaluate(llama, split())
    assert result.intervention == "0-1.mlp@0.5"


@pytest.mark.bundled
@pytest.mark.realdata
@pytest.mark.slow
def test_four_hundred_counterfact_records_score_as_measured_by_brute_force(bundled: LanguageModel, real_data: Path) -> None:
    rows = task("counterfact", data=real_data / "counterfact" / "counterfact_500.json", phrasings="rewrite").every.limit(400)
    base = evaluate(bundled, rows, scorer="first_token")
    with applied(bundled, "28.fc_up@0.05"):
        edited = evaluate(bundled, rows, scorer="first_token")
    assert (base.accuracy, edited.accuracy) == (0.03, 0.09)
    assert (base.loss, edited.loss) == pytest.approx((7.35, 6.59), abs=0.005)


def logprobs_of(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Return the log-probability of each token after the first, from one plain pass."""
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_a_text_has_the_perplexity_of_its_file(llama: LanguageModel, tmp_path: Path) -> None:
    text = "The capital of France is Paris and the capital of Spain is Madrid, says Rome.\n" * 80
    file = tmp_path / "book.txt"
    file.write_text(text)
    of_file = evaluate(llama, task(f"perplexity:{file}").every)
    of_text = text_perplexity(llama, text)
    assert (of_text.perplexity, of_text.tokens) == (of_file.perplexity, of_file.tokens)
    assert of_text.n == 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_text_is_read_in_windows_that_score_each_token_once(family: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "WINDOW_TOKENS", 16)
    monkeypatch.setattr(tokenize, "STRIDE_TOKENS", 6)
    lm = make(family)
    tok = lm.require_tokenizer()
    texts = ["The capital of France is Paris and the capital of Spain is Madrid, says Rome.\n"] * 3 + ["Oslo is the capital.\n"]
    rows = [Example(str(i), "".join(texts[:i]), t) for i, t in enumerate(texts)]
    result = evaluate(lm, Split("text", "all", tuple(rows), "perplexity"), batch_size=3)
    ids = [list(tok(t).input_ids) for t in texts]
    total = 0.0
    for i, of in enumerate(ids):
        before = [t for earlier in ids[:i] for t in earlier]
        full = before + of
        expected = 0.0
        for at in range(len(before), len(full), 6):
            context = full[max(0, at - 10) : at] or [tok.eos_token_id]
            scored = full[at : at + 6]
            expected += logprobs_of(lm, context + scored)[-len(scored) :].sum().item()
        assert result.scores[i].tokens == len(of)
        assert result.scores[i].logprob == pytest.approx(expected, abs=1e-3)
        total += expected
    assert result.tokens == sum(map(len, ids))
    assert result.words == sum(len(t.split()) for t in texts)
    assert result.perplexity == pytest.approx(math.exp(-total / result.tokens), rel=1e-4)
    assert result.as_dict()["perplexity"] == result.perplexity
    assert "perplexity" in str(result)


def test_perplexity_needs_a_causal_model(make: Make) -> None:
    for family in ("bert", "t5"):
        with pytest.raises(ScoringError, match="perplexity needs a causal model"):
            evaluate(make(family), Split("text", "all", (Example("a", "", "Rome is"),), "perplexity"))


def test_passes_score_no_more_places_than_memory_is_meant_for(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Example(str(i), "Rome is", "a city in Italy and the capital of Italy") for i in range(12)]
    one = Split("text", "all", tuple(rows), "answer")
    expected = evaluate(llama, one)
    places = len(encode(llama, rows, "answer")[0].positions)
    monkeypatch.setattr(forward, "MAX_SCORED_POSITIONS", 3 * places)
    split_ = forward.batches(llama, encode(llama, rows, "answer"), 32)
    assert max(b.positions.shape[1] for b in split_) <= 3 * places
    again = evaluate(llama, one)
    assert [s.logprob for s in again.scores] == pytest.approx([s.logprob for s in expected.scores], abs=1e-5)
    monkeypatch.setattr(forward, "MAX_SCORED_POSITIONS", 1)
    assert all(len(b.rows) == 1 for b in forward.batches(llama, encode(llama, rows, "answer"), 32))


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_top_k_counts_the_tokens_before_the_answers_first(family: str, make: Make) -> None:
    lm = make(family)
    ranks = []
    for score, row in zip(evaluate(lm, split("first_token")).scores, encode(lm, split().examples, "first_token"), strict=True):
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor([row.ids])}
            if row.decoder:
                inputs["decoder_input_ids"] = torch.tensor([row.decoder])
            logits = lm.model(**inputs).logits[0, row.positions[0]]
        ranks.append(int((logits > logits[row.targets[0]]).sum()))
        assert score.correct == (ranks[-1] == 0)
    for scorer, k in (("top5", 5), ("top10", 10)):
        result = evaluate(lm, split(), scorer=scorer)  # type: ignore[arg-type]
        assert [s.correct for s in result.scores] == [r < k for r in ranks]
    assert any(r >= 10 for r in ranks)
    assert [outcome.ranks[0] for outcome in forward.run_rows(lm, encode(lm, split().examples, "top5"), 3)] == ranks


def test_the_separator_may_be_empty(llama: LanguageModel) -> None:
    tok = llama.require_tokenizer()
    (row,) = encode(llama, [Example("a", "The capital of France is:", "Paris", joint="")], "answer")
    assert tok.decode([*row.ids, row.targets[-1]]) == "The capital of France is:Paris"
    (row,) = encode(llama, [Example("a", "The capital of France is:", "Paris")], "answer")
    assert tok.decode([*row.ids, row.targets[-1]]) == "The capital of France is: Paris"


def test_a_masked_model_reads_the_end_of_a_passage_in_its_own_text(make: Make) -> None:
    lm = make("roberta")
    tok = lm.require_tokenizer()
    passage = " ".join(["Rome is a city in Italy and"] * 20) + " Oslo."
    e = Example("a", "never seen", "Paris", masked="Text: {passage} It is {mask}.", passage=passage)
    (row,) = encode(lm, [e], "answer")
    remaining = tok.decode(tok(passage, add_special_tokens=False).input_ids[-50:]).strip()
    assert passage.endswith(remaining)
    assert len(remaining) < len(passage)
    masks = " ".join(["<mask>"] * len(row.targets))
    assert list(row.ids) == tok(f"Text: {remaining} It is {masks}.").input_ids
    assert tok.decode(row.targets).strip() == "Paris"
    (row,) = encode(lm, [Example("b", "Rome is", "Paris", masked="Rome is {mask}")], "next_token")
    assert list(row.ids) == tok("Rome is <mask>").input_ids


def test_generated_text_is_graded_and_the_loss_is_that_of_the_answer(llama: LanguageModel) -> None:
    texts = generate_for(llama, split().examples, Decoding(new_tokens=6))
    rows = [replace(e, answer=t.split()[0]) if i % 2 else e for i, (e, [t]) in enumerate(zip(split(), texts, strict=True))]
    split_ = Split("example", "all", tuple(rows), "contains", Decoding(new_tokens=6))
    progress: list[tuple[int, int]] = []
    result = evaluate(llama, split_, batch_size=3, on_progress=lambda a, b: progress.append((a, b)))
    for i, (e, score, [text]) in enumerate(zip(rows, result.scores, texts, strict=True)):
        assert score.predicted == text.strip()
        assert score.correct == (e.answer.lower() in text.lower())
        assert score.correct or not i % 2
        logprobs, _ = by_hand(llama, e.prompt, e.answer)
        assert score.logprob == pytest.approx(sum(logprobs), abs=1e-4)
    assert set(result.figures) == {"accuracy_reference", "exact_match", "f1", "f1_reference"}
    assert result.as_dict()["accuracy_reference"] == result.figures["accuracy_reference"] >= result.accuracy
    assert progress[-1] == (len(rows), len(rows))


def test_programs_are_not_written_where_they_may_not_be_run(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laserlm.scoring.evaluate.generate_for", lambda *_: pytest.fail("the model has written"))
    e = Example("p", "def one():\n", "    return 1\n", program="assert one() == 1\n")
    with pytest.raises(ScoringError, match="--allow-code-execution"):
        evaluate(llama, Split("example", "all", (e,), "program"))


def test_the_tokens_of_a_program_are_its_own(llama: LanguageModel) -> None:
    tok = llama.require_tokenizer()
    e = Example("p", "def one():\n", "    return 1\n", program="assert one() == 1\n")
    (row,) = encode(llama, [e], "program")
    assert list(row.targets) == tok("    return 1\n").input_ids
    assert list(row.ids) == [*tok("def one():\n").input_ids, *row.targets[:-1]]
    with pytest.raises(ScoringError, match="cannot be scored by program: it has no tests"):
        encode(llama, [replace(e, program="")], "program")


def test_a_model_without_pad_token_is_scored_in_batches(make: Make, tmp_path: Path) -> None:
    lm = make("llama")
    tok = bpe({"eos_token": "</s>", "bos_token": "<pad>"})  # the same tokens, none of them for padding
    assert tok.pad_token is None
    lm.model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    together, alone = (evaluate(loaded, split(), batch_size=size) for size in (4, 1))
    assert [s.logprob for s in together.scores] == pytest.approx([s.logprob for s in alone.scores], abs=1e-4)
    assert {len(b.rows) for b in forward.batches(loaded, encode(loaded, split().examples, "answer"), 4)} != {1}


@pytest.mark.parametrize("metaspace", [False, True])
def test_answer_tokens_of_a_published_prompt_hold_the_space_or_the_word_mark(metaspace: bool, make: Make) -> None:
    lm = make("llama")
    lm.tokenizer = bpe({"pad_token": "<pad>", "eos_token": "</s>"}, metaspace=metaspace)
    prompt = "Consider the following claim: Rome is a city. Is this claim true or false. The claim is"
    (row,) = encode(lm, [Example("a", prompt, "true", ("true", "false"))], "choice")
    marks = lm.tokenizer.convert_ids_to_tokens(list(row.choice_tokens))
    assert marks == (["▁true", "▁false"] if metaspace else ["Ġtrue", "Ġfalse"])
    assert row.targets == row.choice_tokens[:1]


def test_a_comparison_takes_the_variance_between_facts(llama: LanguageModel) -> None:
    examples = [Example(f"{i}", f"The river {i % 4} is", "long", fact=f"f{i % 4}" if i < 8 else "") for i in range(10)]
    base = evaluate(llama, Split("t", "test", tuple(examples), "answer"))
    assert base.facts == (*("f0", "f1", "f2", "f3") * 2, "8", "9")
    flipped = [replace(s, correct=not s.correct, logprob=s.logprob + 1) if s.fact == "f1" else s for s in base.scores]
    edited = replace(base, scores=tuple(flipped))
    c = compare(base, edited)
    assert (c.n, c.facts, c.size, c.as_dict()["facts"]) == (10, 6, "10 of 6 facts", 6)
    assert "n 10 of 6 facts" in str(c)
    differences = [b.correct - a.correct for a, b in zip(base.scores, edited.scores, strict=True)]
    assert sum(map(abs, differences)) == 2
    clustering = clustering_of(differences, base.facts)
    assert c.interval == paired_difference(c.corrected, c.broken, 10, clustering=clustering)
    assert c.mcnemar_p == sign_flip_test(differences, base.facts) == 1  # one fact changed
    changes = [b.loss - a.loss for a, b in zip(base.scores, edited.scores, strict=True)]
    assert c.loss_interval == paired_mean(changes, facts=base.facts)
    alone = [replace(e, scores=tuple(replace(s, fact="") for s in e.scores)) for e in (base, edited)]
    independent = compare(*alone)
    assert (independent.facts, independent.size) == (10, "10")
    assert c.interval.low < independent.interval.low < independent.interval.high < c.interval.high
    correct = [s.correct for s in base.scores]
    assert base.accuracy_interval == wilson(sum(correct), 10, clustering=clustering_of(correct, base.facts))
