"""The default search, saving and checking of families of each kind in half precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from in_process import check_here
from searching.test_components import questions

from laserlm.export import load_check, save
from laserlm.models import LanguageModel, load
from laserlm.searching import search
from laserlm.tasks import Split, Task

Make = Callable[..., LanguageModel]


def asked_of(task: Task, what: str) -> Task:
    """Return the questions with another word, so that they guard others and share none."""

    def of(split: Split) -> Split:
        examples = (replace(e, id=f"{what} {e.id}", prompt=e.prompt.replace("capital", what)) for e in split.examples)
        return replace(split, examples=tuple(examples))

    return replace(task, name=what, validation=of(task.validation), test=of(task.test), every=of(task.every))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "t5", "llama4", "gemma3n", "bert"])
def test_a_choice_in_half_precision_is_saved_and_checked(
    family: str, dtype: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_here(monkeypatch)
    built = make(family)
    built.model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    built.require_tokenizer().save_pretrained(tmp_path / "model")
    lm = load(tmp_path / "model", kind=built.kind, device="cpu", cache=tmp_path / "cache")
    assert lm.dtype == getattr(torch, dtype)
    guards = [asked_of(questions(), "river")] if lm.kind != "causal" else None
    result = search(
        lm, questions(), strategy="strengths", grid="all.all@0.5", metric="loss", guards=guards, max_harm=0.2, delta=0.5
    )
    assert not result.failed
    assert result.best
    assert result.validation.edited_loss < result.validation.base_loss
    for form in ("dense", "factored"):
        assert load_check(save(lm, result, tmp_path / form, form=form).folder).agrees
