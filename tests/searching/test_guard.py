"""Guards: what has two parts that share nothing, and what a reduction costs on them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from laserlm.edit import applied
from laserlm.errors import LaserError, ScoringError
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate_rows
from laserlm.scoring.forward import run_rows
from laserlm.scoring.records import Evaluation
from laserlm.searching import guard as guards
from laserlm.searching.guard import OWN_TEXT, Guard, Harm, guards_of, measure_harm, own_text
from laserlm.searching.scorer import EncodedSplit
from laserlm.tasks import Example, Split, Task

Make = Callable[..., LanguageModel]
Ids = set[tuple[int, ...]]
WORDS = "Paris Rome Oslo Lisbon Madrid is the capital of Norway and a city in Italy France Spain true false claim".split()


def ids_of(part: EncodedSplit) -> list[tuple[int, ...]]:
    """Return the passages of a part, each with its first and its last token."""
    return [(*s.ids, s.targets[-1]) for s in part.sequences]


def text(words: int) -> str:
    """Return a text in which no run of words comes twice."""
    generator = torch.Generator().manual_seed(0)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator))


def evaluation(lm: LanguageModel, part: EncodedSplit) -> Evaluation:
    return evaluate_rows(lm, part.split, part.scorer, part.sequences, lambda: run_rows(lm, part.sequences, 32))


def test_own_text_follows_from_the_seed_and_the_model_alone(make: Make, tmp_path: Path) -> None:
    texts = {}
    for name, model, seed, drawn in (("a", 0, 0, 1), ("again", 0, 0, 2), ("seed", 0, 1, 1), ("model", 1, 0, 1)):
        lm = make("llama", seed=model)
        lm.cache = tmp_path / name
        torch.manual_seed(drawn)
        state = torch.random.get_rng_state()
        (guard,) = guards_of(lm, None, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert (guard.name, guard.kind) == (OWN_TEXT, "text")
        texts[name] = ids_of(guard.choosing) + ids_of(guard.measuring), guard.identity["hash"]
    assert texts["again"] == texts["a"]
    assert len({hash for _, hash in texts.values()}) == 3


def test_own_text_is_kept_in_the_cache(llama: LanguageModel) -> None:
    (first,) = guards_of(llama, None)

    def refuse(*_: object) -> None:
        raise AssertionError("the model was run again")

    with llama.model.register_forward_pre_hook(refuse):
        (again,) = guards_of(llama, [OWN_TEXT])
    assert again == first
    (file,) = (llama.cache / "texts").iterdir()
    file.write_text("[[1, 2", encoding="utf-8")
    assert guards_of(llama, None) == [first]
    json.loads(file.read_text(encoding="utf-8"))


def test_a_text_that_was_interrupted_goes_on_with_the_batches_that_are_left(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = own_text(llama, 6, 1, 5)
    monkeypatch.setattr("laserlm.searching.guard.BATCH", 2)
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 12:
            raise KeyboardInterrupt

    llama.cache = llama.cache / "other"
    with pytest.raises(KeyboardInterrupt):
        own_text(llama, 6, 1, 5, stop)
    assert seen[:6] == [(2, 30), (4, 30), (6, 30), (8, 30), (10, 30), (12, 30)]
    assert len(list((llama.cache / "texts").iterdir())) == 1
    seen.clear()
    rows = own_text(llama, 6, 1, 5, lambda done, total: seen.append((done, total)))
    assert (seen[0], seen[-1]) == ((12, 30), (30, 30))
    assert len(list((llama.cache / "texts").iterdir())) == 1
    assert [len(row) for row in rows] == [len(row) for row in expected]


def test_the_two_parts_of_own_text_share_no_passage_and_have_the_tokens_of_the_model(llama: LanguageModel) -> None:
    (guard,) = guards_of(llama, None)
    choosing, measuring = ids_of(guard.choosing), ids_of(guard.measuring)
    assert len({*choosing, *measuring}) == len(choosing) + len(measuring) == 2 * guards.PASSAGES
    start = llama.require_tokenizer().eos_token_id  # of a tokenizer without a token that begins a text
    for part in (guard.choosing, guard.measuring):
        assert part.scorer == part.split.scorer == "perplexity"
        assert [s.example for s in part.sequences] == list(range(len(part.split)))
        for s in part.sequences:
            assert s.ids[0] == start
            assert s.targets[:-1] == s.ids[1:]
            assert s.positions == tuple(range(guards.PASSAGE_TOKENS))
    assert not {e.id for e in guard.choosing.split} & {e.id for e in guard.measuring.split}


def test_what_the_model_writes_is_a_sample_of_it_whatever_its_own_settings_say(make: Make, tmp_path: Path) -> None:
    (expected,) = guards_of(make("llama"), None)
    lm = make("llama")
    lm.cache = tmp_path / "other"
    settings = lm.model.generation_config
    settings.do_sample, settings.temperature, settings.top_k, settings.top_p = False, 0.1, 1, 0.1
    settings.min_p, settings.typical_p, settings.epsilon_cutoff, settings.eta_cutoff = 0.9, 0.1, 0.1, 0.1
    settings.suppress_tokens, settings.bad_words_ids, settings.num_beams = list(range(300)), [[301]], 3
    settings.eos_token_id, settings.repetition_penalty, settings.max_length = list(range(200)), 3.0, 3
    assert guards_of(lm, None) == [expected]
    assert lm.model.generation_config is settings


def test_the_harm_on_own_text_is_the_divergence_of_the_reduced_model(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "PASSAGES", 64)
    monkeypatch.setattr(guards, "PASSAGE_TOKENS", 16)
    (guard,) = guards_of(llama, None)
    ids = torch.tensor([s.ids for s in guard.measuring.sequences])
    targets = torch.tensor([s.targets for s in guard.measuring.sequences])
    with torch.no_grad():
        p = llama.model(input_ids=ids).logits.log_softmax(-1)
        with applied(llama, "all.mlp@0.1"):
            q = llama.model(input_ids=ids).logits.log_softmax(-1)
    # The loss of samples is the entropy of what they are drawn from.
    surprise = -p.gather(2, targets[..., None])[..., 0] + (p.exp() * p).sum(-1)
    assert abs(float(surprise.mean())) < 4 * float(surprise.std()) / surprise.numel() ** 0.5
    divergence = (p.exp() * (p - q)).sum(-1)  # at each token, of the reduced model from the unchanged one
    of_samples = (p - q).gather(2, targets[..., None])[..., 0]
    error = float((of_samples - divergence).std() / of_samples.numel() ** 0.5)
    result = measure_harm(llama, guard, "all.mlp@0.1")
    assert result.change == pytest.approx(float(of_samples.mean()), abs=1e-5)
    assert abs(result.change - float(divergence.mean())) < 4 * error < result.change
    assert result.as_dict()["divergence"] == result.change


def test_harm_is_a_ratio_of_perplexities_and_survives_json(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "PASSAGES", 60)
    (guard,) = guards_of(llama, None)
    result = measure_harm(llama, guard, "all.mlp@0.1")
    low, high = result.interval
    assert result.ratio == pytest.approx(math.exp(result.comparison.edited_loss) / math.exp(result.comparison.base_loss))
    assert low < result.ratio < high
    before = evaluation(llama, guard.measuring)
    with applied(llama, "all.mlp@0.1"):
        after = evaluation(llama, guard.measuring)
    changes = torch.tensor([b.loss - a.loss for a, b in zip(before.scores, after.scores, strict=True)])
    assert result.error == pytest.approx(float(changes.std() / len(changes) ** 0.5), rel=0.05)
    assert Harm.from_dict(json.loads(json.dumps(result.as_dict()))) == result
    assert f"perplexity x{result.ratio:.3f} [{low:.3f}, {high:.3f}] on text that the model wrote" in str(result)


def test_the_harm_of_one_passage_has_no_bound(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "PASSAGES", 1)
    (guard,) = guards_of(llama, None)
    result = measure_harm(llama, guard, "all.mlp@0.1")
    assert math.isinf(result.error)
    assert result.interval == (0.0, math.inf)
    assert Harm.from_dict(json.loads(json.dumps(result.as_dict(), allow_nan=False))) == result


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_model_that_writes_no_text_needs_a_task(family: str, make: Make, task: Task, tmp_path: Path) -> None:
    lm = make(family)
    assert guards_of(lm, None) == []
    with pytest.raises(ScoringError, match=rf"{family} .* writes no text of its own; .*--guard TASK"):
        guards_of(lm, [OWN_TEXT])
    (tmp_path / "a.txt").write_text(text(1000))
    with pytest.raises(ScoringError, match=r"has no perplexity on a text; name a task .*--guard TASK"):
        guards_of(lm, [str(tmp_path / "a.txt")])
    (guard,) = guards_of(lm, [with_scorer(task, "answer")])
    assert guard.kind == "questions"


def with_scorer(task: Task, scorer: str) -> Task:
    return Task.of(task.name, list(task.every), scorer=scorer)  # type: ignore[arg-type]


def test_a_model_without_a_token_to_begin_with_writes_nothing(llama: LanguageModel) -> None:
    llama.require_tokenizer().eos_token = None
    assert guards_of(llama, None) == []
    with pytest.raises(ScoringError, match="writes no text of its own"):
        guards_of(llama, [OWN_TEXT])


@pytest.mark.parametrize("words", [200, 4000])
def test_the_halves_of_a_text_do_not_overlap(
    words: int, llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "PASSAGE_TOKENS", 8)
    file = tmp_path / "text.txt"
    file.write_text(text(words))
    tokenizer = llama.require_tokenizer()
    ids = tuple(tokenizer(file.read_text(), add_special_tokens=False).input_ids)
    (guard,) = guards_of(llama, [str(file)])
    assert (guard.name, guard.kind) == (str(file), "text")
    places = []
    for part in (guard.choosing, guard.measuring):
        passages = ids_of(part)
        assert 1 < len(passages) <= guards.PASSAGES
        assert {p[0] for p in passages} == {tokenizer.eos_token_id}
        assert {len(p) for p in passages} == {9}
        starts = [[i for i in range(len(ids)) if ids[i : i + 8] == p[1:]] for p in passages]
        assert {len(s) for s in starts} == {1}
        places.append([s[0] for s in starts])
    for starts in places:
        assert all(b - a >= 8 for a, b in pairwise(starts))
    assert max(places[0]) + 8 <= len(ids) // 2 <= min(places[1])
    # They are spread over all of each half.
    share = len(ids) // 2 // len(places[0])
    assert (places[0][0], places[1][0]) == (0, len(ids) // 2)
    assert places[0][-1] + 2 * share > len(ids) // 2


def test_a_text_that_is_too_short_is_refused(llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "PASSAGE_TOKENS", 64)
    file = tmp_path / "short.md"
    file.write_text(text(20))
    n = len(llama.require_tokenizer()(file.read_text(), add_special_tokens=False).input_ids)
    needed = 2 * guards.LEAST_PASSAGES * guards.PASSAGE_TOKENS
    assert n < needed
    with pytest.raises(ScoringError, match=rf"short.md has {n} tokens; it needs {needed} at least, .*: give a longer text"):
        guards_of(llama, [str(file)])
    with pytest.raises(LaserError, match=r"missing\.txt"):
        guards_of(llama, [str(tmp_path / "missing.txt")])


def test_another_text_is_another_guard(llama: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    identities = []
    for words in (2000, 2000, 2300):
        file.write_text(text(words))
        (guard,) = guards_of(llama, [str(file)])
        identities.append(guard.identity)
        json.dumps(guard.identity)
    assert identities[0] == identities[1] != identities[2]
    assert {i["name"] for i in identities} == {str(file)}


def test_a_task_guards_with_its_validation_and_its_test_split(
    llama: LanguageModel, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (guard,) = guards_of(llama, [task])
    assert (guard.name, guard.kind) == ("example", "questions")
    for part, split in ((guard.choosing, task.validation), (guard.measuring, task.test)):
        assert part.split == split
        assert part.scorer == split.scorer
        assert {s.example for s in part.sequences} == set(range(len(split)))
    monkeypatch.setattr(guards, "QUESTIONS", 5)
    (fewer,) = guards_of(llama, [task])
    assert (len(fewer.choosing.split), len(fewer.measuring.split)) == (5, 5)
    assert fewer.identity != guard.identity
    result = measure_harm(llama, guard, "all.mlp@0.1")
    assert f"on example, accuracy {result.comparison.base:.1%}" in str(result)
    assert result.as_dict()["divergence"] is None
    lines = [json.dumps({"prompt": e.prompt, "answer": e.answer}) for e in task.every]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(lines))
    for source in (str(file), f"jsonl:{file}"):
        (of_file,) = guards_of(llama, [source])
        assert of_file.kind == "questions"
        assert len(of_file.choosing.split) + len(of_file.measuring.split) <= 10


def test_a_question_of_both_splits_of_a_task_is_not_measured_on(llama: LanguageModel) -> None:
    def split(name: str, numbers: range) -> Split:
        examples = tuple(Example(id=f"{name}{i}", prompt=f"the number {i} is", answer="the") for i in numbers)
        return Split("numbers", name, examples, "answer")

    validation, test = split("validation", range(4)), split("test", range(2, 6))
    task = Task("numbers", validation, test, every=split("all", range(6)), split_by="paper")
    (guard,) = guards_of(llama, [task])
    assert [e.id for e in guard.choosing.split] == ["validation0", "validation1", "validation2", "validation3"]
    assert [e.id for e in guard.measuring.split] == ["test4", "test5"]


def test_texts_of_different_seeds_share_no_passage(llama: LanguageModel) -> None:
    texts = [{tuple(row) for row in own_text(llama, 64, seed)} for seed in (0, 32)]
    assert not texts[0] & texts[1]


def test_guards_with_other_right_answers_are_others(llama: LanguageModel) -> None:
    """Their token sequences are the same."""

    def guard(right: int) -> Guard:
        choices = ("a city in Italy", "a river in Spain")
        rows = [Example(f"{i}", f"The place {i} is", choices[right], choices) for i in range(10)]
        (of_task,) = guards_of(llama, [Task.of("places", rows, scorer="choice")])
        return of_task

    assert guard(0).identity == guard(0).identity
    assert guard(0).identity["hash"] != guard(1).identity["hash"]
