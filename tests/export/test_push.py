"""Uploading a saved folder by huggingface_hub, to a stand-in of the hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import COMMIT, HubStandIn, hub_stand_in
from huggingface_hub import ModelCardData
from yaml import safe_load

from laserlm.errors import ExportError
from laserlm.export import push, save
from laserlm.models import LanguageModel


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with hub_stand_in(monkeypatch) as stand_in:
        yield stand_in


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's call of httpx
@pytest.mark.parametrize("private", [True, False])
def test_a_folder_is_uploaded_with_its_card_and_without_local_paths(
    private: bool, hub: HubStandIn, llama: LanguageModel, tmp_path: Path
) -> None:
    folder = save(llama, "1.mlp@0.1", tmp_path / "out", hub_id="me/mine").folder
    (folder / "laser.local.json").write_text(json.dumps({"base": "/home/me/model"}))
    address = push(folder, "me/mine", private=private)
    assert address == f"{hub.url}/me/mine/commit/{COMMIT}"
    (repository,) = hub.created
    visibility = "private" if private else "public"
    assert (repository["organization"], repository["name"], repository["visibility"]) == ("me", "mine", visibility)
    assert "Bearer hf_stand_in" in hub.tokens
    assert hub.files == {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.iterdir() if file.name != "laser.local.json"
    }
    assert len(hub.large) == 1
    assert hub.deleted == ["old.safetensors"]
    assert ModelCardData(**safe_load(hub.cards[0].split("---")[1])).library_name == "transformers"


def test_a_large_file_that_is_not_taken_is_an_error_that_says_how_to_go_on(
    hub: HubStandIn, llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(llama, "1.mlp@0.1", tmp_path / "out").folder
    monkeypatch.setattr(hub, "url", "http://127.0.0.1:1")  # what the hub says where large files go; nothing listens there
    with pytest.raises(ExportError, match=r"(?s)was saved, but not uploaded to me/mine: .*'hf upload me/mine"):
        push(folder, "me/mine")


def test_a_refusal_of_the_hub_leaves_the_folder_and_says_how_to_go_on(
    hub: HubStandIn, llama: LanguageModel, tmp_path: Path
) -> None:
    hub.refuses = 403
    folder = save(llama, "1.mlp@0.1", tmp_path / "out").folder
    with pytest.raises(ExportError, match=r"(?s)was saved, but not uploaded to me/mine: 403 .*'hf upload me/mine"):
        push(folder, "me/mine")
    assert (folder / "model.safetensors").is_file()
    assert hub.files == {}
