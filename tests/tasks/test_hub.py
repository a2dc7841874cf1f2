"""Data sets of the hub: here folders that are laid out as one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from laserlm.errors import TaskError
from laserlm.tasks import task
from laserlm.tasks.definitions import DEFINITIONS
from laserlm.tasks.hub import Hub, hub_records

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def published(folder: Path) -> Path:
    """Write a data set with one configuration of two splits."""
    folder.mkdir()
    for split, n in (("train", 3), ("validation", 2)):
        rows = [{"id": f"{split}{i}", "question": f"Question {i}?", "answer": "yes", "level": "hard"} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: fullwiki\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: validation\n    path: validation.jsonl\n---\n"
    )
    return folder


def test_splits_are_read_in_their_order_and_rows_are_numbered(tmp_path: Path) -> None:
    folder = published(tmp_path / "set")
    parts = hub_records(Hub(str(folder), None, ("validation", "train"), "fullwiki"))
    assert [[row["id"] for _, row in part] for part in parts] == [
        ["validation0", "validation1"],
        ["train0", "train1", "train2"],
    ]
    assert parts[0][1][0] == f"{folder}, validation, row 2"


def test_a_file_may_be_named_for_each_split(tmp_path: Path) -> None:
    folder = published(tmp_path / "set")
    files = {"a": "validation.jsonl", "b": "train.jsonl"}
    parts = hub_records(Hub(str(folder), None, ("a", "b"), files=files))
    assert [len(part) for part in parts] == [2, 3]


def test_a_task_takes_its_rows_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published(tmp_path / "set")
    monkeypatch.setattr("laserlm.tasks.definitions.DEFINITIONS", DEFINITIONS)
    here = Hub(str(folder), None, ("train", "validation"), "fullwiki")
    monkeypatch.setitem(
        DEFINITIONS, "hotpotqa", type(DEFINITIONS["hotpotqa"])(**{**vars(DEFINITIONS["hotpotqa"]), "hub": here})
    )
    dataset = task("hotpotqa")
    # As many rows of the training split as there are of the other, and then those.
    assert [e.id for e in dataset.every] == ["train0", "train1", "validation0", "validation1"]


def test_an_unreachable_data_set_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"from the hub: .*Fetch the published file and give it with --data"):
        hub_records(Hub("nobody/nothing", None, ("test",)))
    folder = published(tmp_path / "set")
    with pytest.raises(TaskError, match=re.escape(f"cannot read {folder} (dev) from the hub")):
        hub_records(Hub(str(folder), None, ("dev",), "fullwiki"))


@pytest.mark.parametrize("name", [name for name, d in DEFINITIONS.items() if d.hub])
def test_every_data_set_of_the_hub_is_pinned_to_a_commit(name: str) -> None:
    hub = DEFINITIONS[name].hub
    assert hub is not None
    assert re.fullmatch(r"[0-9a-f]{40}", hub.revision or "")
    assert set(hub.files) <= set(hub.splits)


def test_without_the_hub_a_task_says_so() -> None:
    with pytest.raises(TaskError, match=r"cannot read fever/fever \(paper_dev\) from the hub"):
        task("fever")
