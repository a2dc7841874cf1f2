from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from laserlm.edit import applied
from laserlm.errors import AnalysisError, ScoringError
from laserlm.jsonable import to_json
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import compare, evaluate
from laserlm.studies.side_effects import divergence, neutral_prompts, on_text, transfer
from laserlm.tasks import Example, Task, task

Make = Callable[..., LanguageModel]
TEXTS = ["The capital of France is Paris.", "Rome", "It rained all night, so the grass was wet."]


def log_probabilities(lm: LanguageModel, text: str) -> torch.Tensor:
    """Return (T, V) of one text by a plain pass, in double precision."""
    inputs = lm.require_tokenizer()(text, return_tensors="pt")
    if lm.kind == "encoder-decoder":
        forced = lm.model.generation_config.forced_bos_token_id
        starts = [lm.model.config.decoder_start_token_id, *([] if forced is None else [forced])]
        inputs["decoder_input_ids"] = torch.tensor([starts])
    with torch.no_grad():
        logits: torch.Tensor = lm.model(**inputs).logits[0]
    if lm.kind == "encoder-decoder":
        logits = logits[-1:]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize(("family", "forced"), [("llama", None), ("gpt2", None), ("bert", None), ("t5", None), ("t5", 7)])
def test_the_divergence_is_that_of_texts_passed_one_by_one(family: str, forced: int | None, make: Make) -> None:
    lm = make(family)
    if forced is not None:  # as BART has it
        lm.model.generation_config.forced_bos_token_id = forced
    reduction = next(f"{m.id}@0.1" for m in lm.matrices if m.layer == 1 and m.type == "fc_out")
    divergences = divergence(lm, TEXTS, reduction, batch_size=2)
    for text, value in zip(TEXTS, divergences, strict=True):
        p = log_probabilities(lm, text)
        with applied(lm, reduction):
            q = log_probabilities(lm, text)
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert value > 0
    assert divergence(lm, TEXTS, "") == pytest.approx([0, 0, 0], abs=1e-6)
    with pytest.raises(AnalysisError, match="no prompts"):
        divergence(lm, [], reduction)
    with pytest.raises(AnalysisError, match="shorten it"):
        divergence(lm, ["word " * 2000], reduction)


def test_the_divergence_of_a_model_in_half_precision_is_of_logits_in_float32(llama: LanguageModel) -> None:
    llama.model.bfloat16()
    head: Any = llama.model.get_output_embeddings()
    hidden: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _module, args: hidden.append(args[0][0]))
    (value,) = divergence(llama, TEXTS[:1], "1.fc_out@0.1")
    weight = head.weight.detach()
    exact, rounded = [], []
    for h in hidden:
        exact.append((h.double() @ weight.double().T).log_softmax(-1))
        rounded.append((h @ weight.T).double().log_softmax(-1))
    expected, other = (float((p.exp() * (p - q)).sum(-1).mean()) for p, q in (exact, rounded))
    assert value == pytest.approx(expected, rel=1e-3)
    assert abs(value - expected) < 0.2 * abs(other - expected)


def test_neutral_prompts_are_forty_sentences() -> None:
    prompts = neutral_prompts()
    assert len(prompts) == len(set(prompts)) == 40
    assert all(line.endswith(".") for line in prompts)


def test_a_text_is_compared_passage_by_passage(llama: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"{s} {i}" for i in range(6) for s in neutral_prompts()))
    passages = task(f"perplexity:{file}").every
    base = evaluate(llama, passages)
    with applied(llama, "1.fc_in@0.1"):
        reduced = evaluate(llama, passages)
    result = on_text(base, reduced)
    assert (result.base, result.edited) == (base.perplexity, reduced.perplexity)
    c = compare(base, reduced)
    assert result.ratio.value == pytest.approx(math.exp(c.edited_loss - c.base_loss))
    assert result.ratio.interval == pytest.approx([math.exp(end) for end in c.loss_interval])
    cell = transfer(base, reduced, "t")
    assert (cell.base, cell.edited, cell.gain.n) == (None, None, 0)  # nothing is right or wrong in a text
    assert cell.loss_change.value == pytest.approx(c.edited_loss - c.base_loss)
    single = on_text(replace(base, scores=base.scores[:1]), replace(reduced, scores=reduced.scores[:1]))
    assert to_json(single)["ratio"]["interval"] is None
    with pytest.raises(ScoringError):
        on_text(base, replace(reduced, scores=reduced.scores[:1]))


def test_a_cell_of_the_transfer_matrix_is_a_paired_comparison(llama: LanguageModel) -> None:
    split = Task.of("t", [Example(c, f"The capital of {c} is", "Paris") for c in "abcdef"]).every
    base = evaluate(llama, split)
    with applied(llama, "1.fc_in@0.1"):
        reduced = evaluate(llama, split)
    cell = transfer(base, reduced, "another")
    c = compare(base, reduced)
    assert (cell.chosen_on, cell.scored_on, cell.intervention) == ("another", "t", "1.fc_in@0.1")
    assert (cell.gain.value, cell.gain.interval) == (c.gain, c.interval)
    assert cell.loss_change.interval == c.loss_interval
    assert to_json(cell)["gain"]["n"] == 6
