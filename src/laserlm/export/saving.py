"""Save a model under an intervention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

from laserlm.edit.apply import InterventionLike, applied, resolve
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.edit.factors import StoredMatrix, factored
from laserlm.errors import ExportError
from laserlm.export.checkpoint import Form, SavedModel, SaveOptions, check_request, command_of, write
from laserlm.linalg.decomposition import ALGORITHM
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import Intervention
from laserlm.searching.result import SearchResult

__all__ = ["push", "save"]


def save(
    lm: LanguageModel,
    what: InterventionLike | SearchResult,
    out: str | Path,
    *,
    form: Form = "dense",
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    shard_size: str = "5GB",
    seed: int | None = None,
    cache: DecompositionCache | None = None,
) -> SavedModel:
    """Save a model as it is under an intervention, as a folder that plain ``from_pretrained`` loads.

    ``dense`` is an ordinary checkpoint of the base model's shape. ``factored`` holds each reduced matrix as two factors
    where that takes fewer parameters, and loads once laserlm is imported. The folder is written beside ``out`` and moved
    there at the end; with it come a model card and ``laser.json``, which says how to make it again.

    Args:
        lm: the unchanged model.
        what: text such as ``27.fc_in@0.01``, or what a search found, whose gain is then recorded too.
        out: the folder.
        form: ``dense`` or ``factored``.
        dtype: of the saved weights, such as ``float16``; None keeps the model's.
        overwrite: replace a folder that laserlm wrote before.
        shard_size: bytes of a weight file at most, such as ``5GB``.
        seed: of ``:reference`` decompositions; None takes the search's, else 0.
        cache: decompositions to use; None takes the one kept under ``lm.cache``.

    Raises:
        ExportError: if the folder exists already or cannot be written, the model was loaded from factors, or a search
            found nothing better than the unchanged model.
        LaserError: as ``applied``.
    """
    out = Path(out).absolute()
    how = SaveOptions(form, dtype, overwrite, shard_size)
    check_request(lm, out, how)
    if isinstance(what, SearchResult):
        if what.settings.get("model_hash", lm.hash) != lm.hash:
            raise ExportError(f"the search of run {what.run} was on another model than {lm.name}; load that one")
        if not what.best:
            raise ExportError(f"run {what.run} found nothing better than the unchanged model; there is nothing to save")
        seed = int(what.settings.get("seed", 0)) if seed is None else seed
    seed = seed or 0
    intervention = what.best if isinstance(what, SearchResult) else Intervention.parse(what)
    edits = [edit for edit in resolve(lm.matrices, intervention) if not edit.is_identity]
    change = (
        factored(lm, intervention, cache=cache, seed=seed)
        if form == "factored"
        else _dense(lm, intervention, [StoredMatrix.of(e, "saved in the dense form") for e in edits], cache, seed)
    )
    options = [*(["--reduce", str(intervention)] if intervention else []), *(["--seed", str(seed)] if seed else [])]
    record = {
        "intervention": str(intervention),
        "decomposition": {"algorithm": ALGORITHM, "seed": seed},
        "command": command_of(lm, "save", options, out, how),
        "found": what.as_dict() if isinstance(what, SearchResult) else None,
    }
    return write(lm, out, change, how, record)


def push(saved: Path, hub_id: str, *, private: bool = False) -> str:
    """Upload a saved model to the hub, and return its address; weight files there that are not its own go.

    Raises:
        ExportError: if the hub cannot be reached, or refuses.
    """
    api = HfApi()
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=hub_id,
                folder_path=saved,
                commit_message="Add the reduced model",
                delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            )
        )
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise ExportError(
            f"{saved} was saved, but not uploaded to {hub_id}: {error}; check the network and 'hf auth login', then "
            f"'hf upload {hub_id} {saved}'"
        ) from error


@contextmanager
def _dense(
    lm: LanguageModel, intervention: Intervention, holdings: Sequence[StoredMatrix], cache: DecompositionCache | None, seed: int
) -> Iterator[Sequence[StoredMatrix]]:
    with applied(lm, intervention, cache=cache, seed=seed):
        yield holdings
