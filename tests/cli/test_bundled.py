"""What a user does first, on the bundled model: search, save what was found, and load it without laserlm's help."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from laserlm.edit import applied
from laserlm.models import LanguageModel

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.bundled
@torch.no_grad()
def test_what_a_search_finds_is_saved_and_computes_the_same_in_transformers(
    run: Run, bundled: LanguageModel, tmp_path: Path
) -> None:
    out, store = tmp_path / "out", ("--store", tmp_path / "runs.db", "--cache", bundled.cache)
    search = ("search", "bundled", "--task", "worldfacts", "--limit", 24, "--grid", "29.v_proj@0.25,0.75", "--metric", "loss")
    code, printed, err = run(*search, *store, "--json")
    assert code == 0, err
    values = json.loads(printed)
    assert (values["candidates"], values["complete"]) == (2, True)
    assert values["best"]
    assert values["validation"]["best_loss"] < values["validation"]["base_loss"]
    code, printed, err = run("save", "bundled", "--run", values["run"], *store, "--out", out, "--json")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = bundled.require_tokenizer()("The capital of France is Paris, and that of Italy is", return_tensors="pt").input_ids
    unchanged = bundled.model(input_ids=ids).logits
    with applied(bundled, values["best"]):
        expected = bundled.model(input_ids=ids).logits
    written = model(input_ids=ids).logits
    torch.testing.assert_close(written, expected)
    assert not torch.allclose(written, unchanged, atol=1e-3)
    assert json.loads((out / "laser.json").read_text())["result"]["test"]["n"] == values["test"]["n"]
    shutil.rmtree(out)  # half a gigabyte
