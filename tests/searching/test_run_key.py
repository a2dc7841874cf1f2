"""What makes a search another one where its examples do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from laserlm.models import LanguageModel
from laserlm.searching import search
from laserlm.tasks import Task


def test_another_seed_is_another_search_even_where_the_order_of_the_examples_is_the_same(
    llama: LanguageModel, task: Task, tmp_path: Path
) -> None:
    one = replace(task, validation=task.validation.limit(1), test=task.test.limit(1))
    runs = {
        search(llama, one, strategy="exhaustive", grid="1.fc_in@r4:reference", seed=seed, store=tmp_path / "runs.db").run
        for seed in (0, 1)
    }
    assert len(runs) == 2


def test_another_bound_or_guard_is_another_search(llama: LanguageModel, task: Task, tmp_path: Path) -> None:
    few = replace(task, validation=task.validation.limit(4), test=task.test.limit(2))
    other = replace(few, name="other")
    text = tmp_path / "text.txt"
    options: list[dict[str, Any]] = [{}, {"max_harm": 0.1}, {"max_harm": 0.2}, {"guards": (few,)}, {"guards": (other,)}]
    options += [{"guards": ("self", few)}, {"guards": ()}, {"guards": ("self",)}, {"guards": (str(text),)}]
    runs = []
    for n, words in ((0, "Paris is a city in France. "), (-1, "Rome is a city in Italy. ")):
        text.write_text(words * 40)
        for more in options[n:]:
            result = search(llama, few, strategy="exhaustive", grid="1.fc_in@0.5", store=tmp_path / "runs.db", **more)
            assert [h.guard for h in result.harms] == [getattr(g, "name", g) for g in more.get("guards", ("self",))]
            runs.append(result.run)
    assert len(runs) == 10
    assert len(set(runs)) == 9  # that the guard is the model's own text is the same as no guard named
