from __future__ import annotations

from pathlib import Path

import pytest

from laserlm.edit import applied
from laserlm.errors import AnalysisError, SpecError
from laserlm.jsonable import to_json
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import compare, evaluate
from laserlm.store import Store
from laserlm.studies import cached_scorer
from laserlm.studies.rank_curve import rank_curve
from laserlm.tasks import Example, Split, Task


@pytest.fixture
def split() -> Split:
    pairs = zip("abcdefgh", ["Paris", "Rome"] * 4, strict=True)
    return Task.of("t", [Example(c, f"The capital of {c} is", a) for c, a in pairs]).every


def test_every_size_is_scored_as_that_reduction(llama: LanguageModel, split: Split, tmp_path: Path) -> None:
    seen = []
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as score:
        points = rank_curve(
            "1.k_proj@0.5+2.k_proj@0.5", score, ranks=(40, 10, 0), rhos=("0.5", "1"), on_point=lambda *a: seen.append(a)
        )
        base = score("")
    assert [(p.size, p.chosen) for p in points] == [("0.5", True), ("r10", False), ("r0", False), ("1", False)]  # 16 at most
    assert points[1].ranks == {"1.k_proj": 10, "2.k_proj": 10}
    assert points[0].ranks == {"1.k_proj": 8, "2.k_proj": 8}
    assert points[3].loss_change.value == points[3].gain.value == 0
    assert [s[:2] for s in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    with applied(llama, "1-2.k_proj@r10"):
        edited = evaluate(llama, split)
    c = compare(base, edited)
    assert points[1].loss == pytest.approx(edited.loss)
    assert (points[1].gain.value, points[1].gain.interval) == (c.gain, c.interval)
    assert points[1].loss_change.interval == pytest.approx(c.loss_interval)
    assert to_json(points[0])["accuracy"]["n"] == 8


def test_a_reduction_of_several_sizes_is_on_its_own_curve(llama: LanguageModel, split: Split, tmp_path: Path) -> None:
    text = "1.k_proj@0.25+2.fc_in@0.5"
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as score:
        points = rank_curve(text, score, ranks=(4,), rhos=("0.5",))
    assert [(p.size, p.chosen) for p in points] == [("0.25, 0.5", True), ("r4", False), ("0.5", False)]
    with applied(llama, text):
        assert points[0].loss == pytest.approx(evaluate(llama, split).loss)


def test_sizes_that_cannot_be_read_are_errors(llama: LanguageModel, split: Split, tmp_path: Path) -> None:
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as score:
        with pytest.raises(AnalysisError, match="reduction"):
            rank_curve("", score)
        with pytest.raises(AnalysisError, match="r5 is a rank"):
            rank_curve("1.k_proj@0.5", score, rhos=("r5",))
        with pytest.raises(SpecError, match="half"):
            rank_curve("1.k_proj@0.5", score, rhos=("half",))
