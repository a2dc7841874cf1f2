"""What makes a search another one where its examples do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
