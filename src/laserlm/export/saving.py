"""Save a model under an intervention, and upload it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

from laserlm.edit.apply import InterventionLike, applied, resolve
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.edit.factors import StoredMatrix, factored
from laserlm.errors import ExportError
from laserlm.export.card import unclear_gain
from laserlm.export.checkpoint import Form, SavedModel, SaveOptions, check_request, command_of, write
from laserlm.export.gguf_file import OutType, check_gguf_request, write_gguf
from laserlm.export.record import RECORD
from laserlm.export.update_adapter import adapter_of
from laserlm.linalg.decomposition import ALGORITHM
from laserlm.models.adapter import LOCAL
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import dtype_named
from laserlm.reductions import Intervention
from laserlm.searching.result import SearchResult

log = logging.getLogger(__name__)
LONGEST_ARGUMENT = 5000
"""Characters of reductions that a command on a card has; Linux takes 131,071, and thousands of strengths have more."""


def save(
    lm: LanguageModel,
    intervention: InterventionLike | SearchResult,
    out: str | Path,
    *,
    form: Form | Literal["gguf"] = "dense",
    outtype: OutType = "f16",
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    shard_size: str = "5GB",
    seed: int | None = None,
    point: int | None = None,
    cache: DecompositionCache | None = None,
    hub_id: str | None = None,
) -> SavedModel:
    """Save a model under an intervention as a folder that ``from_pretrained`` loads.

    ``dense`` is an ordinary checkpoint with the shapes of the base model. ``factored`` stores each reduced matrix as two
    factors if that takes fewer parameters; it loads after ``import laserlm``. ``adapter`` stores only what changes, W' - W, as
    a LoRA that ``peft.PeftModel.from_pretrained`` adds to the unchanged model; of a model with the update of an adapter it
    stores what the reduction leaves of the update. ``gguf`` is a file for llama.cpp, written by its
    own converter (the extra ``gguf``), with a ``Modelfile`` for Ollama. The folder also holds a model card and
    ``laser.json``, which records how to rebuild the model. It is written next to ``out`` and moved there at the end.

    Args:
        lm: the unchanged model.
        intervention: text such as ``27.fc_in@0.01``, or the result of a search, whose gain is then recorded too.
        out: the folder.
        form: ``dense``, ``factored``, ``adapter`` or ``gguf``.
        outtype: type of the matrices in a GGUF file: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        dtype: dtype of the saved weights, such as ``float16``; None keeps the model's dtypes, and stores adapters in float32.
        overwrite: whether to replace a folder that laserlm wrote before.
        shard_size: maximum size of a weight file, such as ``5GB``.
        seed: seed of ``:reference`` decompositions; None uses the search's seed, or 0 without a search.
        point: of the result of a search: number in its list ``pareto``, from 1. None takes the best.
        cache: decomposition cache; None uses the one in ``lm.cache``.
        hub_id: repository that the folder will be uploaded to, which its card then names.

    Raises:
        ExportError: if the folder exists, holds the model or cannot be written, the model was loaded from factors, the search
            found nothing better than the unchanged model or has no such point, an adapter would change nothing or weights
            that layers share, or llama.cpp's converter refuses the model.
        MissingExtraError: if llama.cpp's converter is not installed.
        LaserError: as ``applied``.
    """
    forms = (*get_args(Form), "gguf")
    if form not in forms:
        raise ExportError(f"no form {form!r}; there are {', '.join(forms)}")
    out = Path(out).expanduser().absolute()
    options = SaveOptions("dense" if form == "gguf" else form, dtype, overwrite, shard_size, hub_id)
    check_request(lm, out, options)
    if form == "gguf":
        check_gguf_request(outtype)
    result = None
    if isinstance(intervention, SearchResult):
        result = intervention
        intervention = chosen_intervention(lm, result, point)
        seed = int(result.settings.get("seed", 0)) if seed is None else seed
        if point is None and (unclear := unclear_gain(result.as_dict())):
            log.warning("run %s shows no gain: %s The card says so", result.run, unclear)
    elif point is not None:
        raise ExportError(f"point {point} is of the result of a search; give the result instead of a reduction")
    intervention, seed = Intervention.read(intervention), seed or 0
    text, target = str(intervention), out
    if len(text) > LONGEST_ARGUMENT:
        text, target = f"@{out.name}/{RECORD}", out.with_name(f"{out.name}-again")
    arguments = [*(["--reduce", text] if intervention else []), *(["--seed", str(seed)] if seed else [])]
    entries = {
        "intervention": str(intervention),
        "decomposition": {"algorithm": ALGORITHM, "seed": seed},
        "command": command_of(lm, "save", arguments, target, options),
        "result": None if result is None else result.as_dict(),
    }
    if form == "adapter":
        adapter_dtype = None if dtype is None else dtype_named(dtype)
        adapter = adapter_of(lm, intervention, cache=cache, seed=seed, dtype=adapter_dtype)
        return write(lm, out, nullcontext(adapter.matrices), options, entries, adapter)
    if form == "gguf":
        command = command_of(lm, "save", [*arguments, "--outtype", outtype], target, options, form)
        dense = partial(_dense, lm, intervention, cache=cache, seed=seed)
        return write_gguf(lm, lambda folder: write(lm, folder, dense(), options, entries), out, options, outtype, command)
    edit = factored if form == "factored" else _dense
    return write(lm, out, edit(lm, intervention, cache=cache, seed=seed), options, entries)


def chosen_intervention(lm: LanguageModel, result: SearchResult, point: int | None) -> Intervention:
    """Return the best intervention of a search, or that of a point of its Pareto list, from 1.

    Raises:
        ExportError: if the search was of another model, found nothing better than the unchanged model, or has no such point.
    """
    if result.settings.get("model_hash", lm.hash) != lm.hash:
        adapter = result.settings.get("adapter")
        step = "load that model" if adapter is None else f"load that model with --adapter {adapter} (adapter=...)"
        raise ExportError(f"run {result.run} searched another model than {lm.name}; {step}")
    if point is not None:
        n = len(result.pareto)
        if not 1 <= point <= n:
            there = f"it has 1 to {n}, see 'laser runs show {result.run}'" if n else "its search kept no list of points"
            raise ExportError(f"run {result.run} has no point {point}; {there}")
        return Intervention.parse(result.pareto[point - 1].intervention)
    if not result.best:
        raise ExportError(
            f"run {result.run} found nothing better than the unchanged model, so it has no reduction; name one with --reduce"
        )
    return result.best


def push(folder: Path, hub_id: str, *, private: bool = True) -> str:
    """Upload a saved model to the hub and return its address. Older weight files in the repository are deleted.

    Args:
        folder: the folder. Paths of this machine (``laser.local.json``) are not uploaded.
        hub_id: OWNER/NAME of the repository.
        private: whether a repository that does not exist yet is private. An existing one stays as it is.

    Raises:
        ExportError: if the hub cannot be reached or refuses the upload, or if an adapter's base model is a local folder.
    """
    config = folder / "adapter_config.json"
    base = (
        Path(json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
        if config.is_file()
        else Path()
    )
    if base.is_absolute():
        raise ExportError(
            f"{folder} was saved, but not uploaded to {hub_id}: its base model is the folder {base}, which nobody else has; "
            "load the base model by its hub id, or save with --form dense"
        )
    api = HfApi()
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=hub_id,
                folder_path=folder,
                commit_message="Add the reduced model",
                ignore_patterns=[LOCAL],
                delete_patterns=["*.safetensors", "*.safetensors.index.json"],
            )
        )
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError, RuntimeError) as error:  # RuntimeError: of a large file
        raise ExportError(
            f"{folder} was saved, but not uploaded to {hub_id}: {error}; check the network and 'hf auth login', then run "
            f"'hf upload {hub_id} {folder} --exclude {LOCAL}'"
        ) from error


@contextmanager
def _dense(
    lm: LanguageModel, intervention: Intervention, *, cache: DecompositionCache | None, seed: int
) -> Iterator[Sequence[StoredMatrix]]:
    edits = [edit for edit in resolve(lm.matrices, intervention) if not edit.is_identity]
    with applied(lm, intervention, cache=cache, seed=seed):
        yield [StoredMatrix.of(edit, "saved in the dense form") for edit in edits]
