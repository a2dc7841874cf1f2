"""The example that needs no laserlm makes laserlm's choices, with laserlm's numbers."""

from __future__ import annotations

import ast
import json
import random
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TOKENIZERS, bpe, build
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import AutoTokenizer

import laserlm
from laserlm.edit.apply import Edit
from laserlm.reductions import FINE_RHO
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.tokenize import encode
from laserlm.searching import SearchConfig
from laserlm.searching.candidates import expand
from laserlm.searching.driver import encode_splits
from laserlm.store import Store

SCRIPT = Path(__file__).parents[1] / "examples" / "laser_in_150_lines.py"
SMALL = {
    "0.075, 0.05, 0.025, 0.02, 0.015, 0.01, 0.005, 0.0025)": "0.075)",
    "WIDTH, SIZES = 48, 3": "WIDTH, SIZES = 16, 2",
    "FIRST, KEEP = 32, 0.34": "FIRST, KEEP = 8, 0.34",
}
GRID = "all.all@0.9,0.75,0.6,0.5,0.4,0.25,0.1,0.075"
"""No rank 0: to first order, a block loses the same without either of two matrices that multiply each other."""
OPTIONS = SearchConfig(candidates=16, sizes_per_matrix=2, first_rung=8, random_candidates=0, delta=0)
"""What ``SMALL`` makes of the script, which has no controls and no bound."""
ANSWERS = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Norway": "Oslo", "Portugal": "a city or Lisbon"}
STARTED = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}


def questions(n: int) -> list[dict[str, Any]]:
    """Make questions whose answer goes by the country in two of three, and by chance in the others."""
    chance = random.Random(0)
    parts = (["The", "claim", "this", "Rome"], ANSWERS, ["a", "true", "of", "in"], ["city", "claim", "statement", "capital"])
    return [
        {
            "prompt": f"{first} {country} is {second} and the {third} is",
            "answer": ANSWERS[country] if chance.random() < 2 / 3 else chance.choice(list(ANSWERS.values())),
        }
        for first, country, second, third in chance.sample(list(product(*parts)), n)
    ]


def save_model(folder: Path, tokenizer: Any, learn: list[dict[str, Any]] | None = None) -> Path:
    """Save a tiny model, one that has begun to learn the answers of some questions and was disturbed then."""
    lm = build("llama")
    lm.tokenizer = tokenizer
    if learn:
        rows = encode(lm, [laserlm.Example(id=str(i), **q) for i, q in enumerate(learn)], "answer")
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)  # (B, T)
        rows_of, places = zip(*[(i, place) for i, row in enumerate(rows) for place in row.positions], strict=True)
        targets = torch.tensor([token for row in rows for token in row.targets])  # (N,)
        optimizer = torch.optim.Adam(lm.model.parameters(), lr=3e-3)
        for _ in range(12):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(lm.model(ids).logits[rows_of, places], targets).backward()
            optimizer.step()
        with torch.no_grad():  # a low-rank copy of what is noisy may well answer better
            noisy = lm.model.get_parameter("model.layers.1.mlp.down_proj.weight")
            noisy += 0.25 * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))
    lm.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return file


def execute(model: Path, file: Path, out: Path, changed: dict[str, str]) -> dict[str, Any]:
    """Run the script with some of its lines changed, and return all its names."""
    source = SCRIPT.read_text(encoding="utf-8")
    for line, other in changed.items():
        assert source.count(line) == 1
        source = source.replace(line, other)
    names: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), str(model), str(file), str(out)])
        patch.setattr(torch.cuda, "is_available", lambda: False)
        exec(compile(source, SCRIPT, "exec"), names)
    return names


@dataclass
class Both:
    """One search, by the script and by laserlm."""

    names: dict[str, Any]
    printed: str
    out: Path
    lm: laserlm.LanguageModel
    result: laserlm.SearchResult
    predictions: dict[str, Any]
    scores: dict[str, Any]

    @cached_property
    def candidates(self) -> dict[str, tuple[str, int] | None]:
        """The script's names of laserlm's candidates."""
        every = [(c.intervention, Edit.of(c.matrix, *c.intervention.reductions)) for c in expand(GRID, self.lm.matrices)]
        return {"": None} | {str(intervention): (edit.matrix.path, edit.rank) for intervention, edit in every}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("both")
    examples = questions(200)
    model = save_model(folder / "model", bpe(STARTED, prefix="<s>"), examples[::2])
    file = write(folder / "questions.jsonl", examples)
    with redirect_stdout(StringIO()) as printed:
        names = execute(model, file, folder / "out", SMALL)
    lm = laserlm.load(model, device="cpu", cache=folder / "cache")
    result = laserlm.search(lm, laserlm.task(f"jsonl:{file}"), grid=GRID, store=folder / "runs.db", config=OPTIONS)
    with Store.open(folder / "runs.db") as store:
        predictions = store.notes(result.run)["screen"]["predictions"]
        scores = store.evaluations(result.run, "validation")
    return Both(names, printed.getvalue(), folder / "out", lm, result, predictions, scores)


def test_it_is_150_lines_of_torch_and_transformers() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    tree = ast.parse(text)
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_without_its_three_arguments_it_says_how_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    with pytest.raises(SystemExit, match=r"laser_in_150_lines.py .* questions.jsonl out/"):
        exec(compile(SCRIPT.read_text(encoding="utf-8"), SCRIPT, "exec"), {"__name__": "__main__"})


def test_its_settings_are_those_of_a_search() -> None:
    text, usual = SCRIPT.read_text(encoding="utf-8"), SearchConfig()
    assert f"KEPT = ({FINE_RHO.replace(',', ', ')}) " in text
    assert f"SCREENED = {usual.screen_examples} " in text
    assert f"WIDTH, SIZES = {usual.candidates}, {usual.sizes_per_matrix} " in text
    assert f"FIRST, KEEP = {usual.first_rung}, {usual.keep} " in text


def test_the_screen_expects_the_same_of_every_candidate(both: Both) -> None:
    expected = {both.candidates[text]: c + (d or 0) ** 2 / 2 for text, (c, d, _) in both.predictions.items()}
    assert len(expected) > 100
    assert both.names["expected"] == pytest.approx(expected, abs=1e-4)


def test_the_same_candidates_enter_the_race_in_the_same_order(both: Both) -> None:
    assert both.result.screened is not None
    assert both.names["chosen"] == [both.candidates[text] for text in both.result.screened.expected]


def test_every_candidate_meets_as_many_questions_with_the_same_scores(both: Both) -> None:
    scores = {both.candidates[text]: evaluation.scores for text, evaluation in both.scores.items()}
    assert {c: len(of) for c, of in both.names["scores"].items()} == {c: len(of) for c, of in scores.items()}
    assert {len(of) for of in scores.values()} == {8, 16, 40}  # less than a doubling is left after 16
    for candidate, of in scores.items():
        assert [right for right, _ in both.names["scores"][candidate]] == [s.correct for s in of]
        assert [-logprob for _, logprob in both.names["scores"][candidate]] == pytest.approx([s.loss for s in of], abs=1e-4)


def test_the_rungs_have_the_same_leaders(both: Both) -> None:
    assert both.result.best
    assert both.names["leader"] == both.candidates[str(both.result.best)]
    printed = re.findall(
        r"(\d+) questions, (\d+) candidates: .* under (?:rank (\d+) of (\S+)|the unchanged model)", both.printed
    )
    leaders = [(int(n), int(alive), (path, int(rank)) if path else None) for n, alive, rank, path in printed]
    assert leaders == [(rung.examples, rung.entered, both.candidates[rung.leader]) for rung in both.result.rungs]
    assert any(rung.added for rung in both.result.rungs)


def test_the_proof_has_the_same_figures(both: Both) -> None:
    test, names = both.result.test, both.names
    assert test.corrected
    assert test.broken
    assert (names["corrected"], names["broken"], len(names["test"])) == (test.corrected, test.broken, test.n)
    assert (names["p"], names["base"], names["gained"]) == pytest.approx((test.mcnemar_p, test.base, test.edited))
    assert (-names["base_logprob"], -names["logprob"]) == pytest.approx((test.base_loss, test.edited_loss), abs=1e-5)
    assert (
        f"on {test.n} other questions: {test.base:.1%} -> {test.edited:.1%} right, {test.corrected} corrected" in both.printed
    )
    assert f"exact p {test.mcnemar_p:.2g}; loss {test.base_loss:.3f} -> {test.edited_loss:.3f} nats" in both.printed


def test_what_it_saves_is_what_laserlm_saves_and_loads_by_itself(both: Both, tmp_path: Path) -> None:
    laserlm.save(both.lm, both.result, tmp_path / "saved")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", both.out))
    assert ours.keys() == theirs.keys()
    assert "lm_head.weight" not in theirs  # tied to the embeddings
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-6, rtol=0)
    ids = torch.tensor([AutoTokenizer.from_pretrained(both.out)("The capital of Italy is").input_ids])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(both.out)(ids).logits
        with laserlm.applied(both.lm, both.result.best):
            torch.testing.assert_close(plain, both.lm.model(ids).logits, atol=1e-4, rtol=0)


def tokens(rows: list[TokenSequence]) -> list[tuple[list[int], int]]:
    return [([*row.ids, row.targets[-1]], row.positions[0] + 1) for row in rows]


@pytest.mark.parametrize(
    "make",
    [TOKENIZERS["causal"], lambda: bpe(STARTED, prefix="<s>"), TOKENIZERS["masked"], TOKENIZERS["encoder-decoder"]],
    ids=["no special tokens", "one at the start", "one at both ends", "word marks"],
)
def test_questions_are_split_and_tokenized_alike(tmp_path: Path, make: Any) -> None:
    model = save_model(tmp_path / "model", make())
    rows = questions(24)
    for i, row in enumerate(rows[:15]):
        row["fact"] = i // 3  # a number is a fact too
    rows[1] |= {"id": "named", "fact": None}
    rows[2] |= {"id": 7, "fact": ""}
    rows[3]["answer"] = " " + rows[3]["answer"]
    rows[4] |= {"joint": ", "}
    rows[5] |= {"prompt": "Oslo\u2028is", "joint": None}
    file = write(tmp_path / "questions.jsonl", rows)
    file.write_text(
        "\ufeff" + file.read_text(encoding="utf-8").replace("\n", "\n\n", 3).replace("\\u2028", "\u2028"), encoding="utf-8"
    )
    names = execute(model, file, tmp_path / "out", {"WIDTH, SIZES = 48, 3": "WIDTH, SIZES = 1, 1"})
    lm = laserlm.load(model, device="cpu", cache=tmp_path)
    encoded = encode_splits(lm, laserlm.task(f"jsonl:{file}"), SearchConfig(scorer="answer"))
    validation, test = ([(ids[0].tolist(), place) for ids, place in names[split]] for split in ("validation", "test"))
    assert validation == tokens(encoded["validation"].sequences)
    assert sorted(test) == sorted(tokens(encoded["test"].sequences))


def test_where_no_copy_is_better_the_unchanged_model_stays_and_nothing_is_saved(tmp_path: Path) -> None:
    lm = build("llama")
    with torch.no_grad():
        for weight in lm.model.model.layers.parameters():
            weight.zero_()  # every low-rank copy is the matrix itself
    lm.model.save_pretrained(tmp_path / "model")
    TOKENIZERS["causal"]().save_pretrained(tmp_path / "model")
    file = write(tmp_path / "questions.jsonl", questions(10))
    with pytest.raises(SystemExit, match="No candidate beat the unchanged model"):
        execute(tmp_path / "model", file, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "The capital of Fr", "answer": "ance", "joint": ""}, "line 2: a token spans the end of the prompt"),
        ({"prompt": "Oslo is", "answer": "a city", "id": "line 1"}, "line 2: the id line 1 is there already"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    model = save_model(tmp_path / "model", TOKENIZERS["causal"]())
    file = write(tmp_path / "questions.jsonl", [*questions(1), row])
    with pytest.raises(AssertionError, match=reason):
        execute(model, file, tmp_path / "out", {})
