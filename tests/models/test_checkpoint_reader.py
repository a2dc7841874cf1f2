from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES

from laserlm.errors import ModelError, WeightError
from laserlm.export import save
from laserlm.models import LanguageModel, read_matrix
from laserlm.models.checkpoint_reader import open_checkpoint

Make = Callable[..., LanguageModel]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mixtral"])
def test_every_matrix_is_read_from_the_files_as_from_the_model(family: str, make: Make, tmp_path: Path) -> None:
    lm = make(family)
    lm.model.save_pretrained(tmp_path, max_shard_size="40KB")
    stored = open_checkpoint(tmp_path)
    assert stored.family == lm.family
    assert stored.matrices == lm.matrices
    for m in stored.matrices:
        assert torch.equal(stored.read(m), read_matrix(lm.model, m)), m.id


def test_a_layout_of_its_own_is_told(make: Make, tmp_path: Path) -> None:
    lm = make("mixtral")  # whose experts are stored one by one and stacked when loaded
    lm.model.save_pretrained(tmp_path)
    stored = open_checkpoint(tmp_path)
    attention, expert = (next(m for m in stored.matrices if m.name == name) for name in ("q_proj", "experts.1.fc_in"))
    assert torch.equal(stored.read(attention), read_matrix(lm.model, attention))
    with pytest.raises(WeightError, match="another layout"):
        stored.read(expert)


def test_factors_are_not_taken_for_the_matrix(llama: LanguageModel, tmp_path: Path) -> None:
    saved = save(llama, "1.fc_in@0.2", tmp_path / "out", form="factored")
    stored = open_checkpoint(saved.folder)
    matrix = next(m for m in stored.matrices if m.id == "1.fc_in")
    with pytest.raises(WeightError, match=r"\(6, 32\), not \(48, 32\)"):
        stored.read(matrix)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-org/no-such-model"])
def test_what_is_not_there_is_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot open"):
        open_checkpoint(name)
    with pytest.raises(ModelError, match="no safetensors"):
        open_checkpoint(tmp_path)
