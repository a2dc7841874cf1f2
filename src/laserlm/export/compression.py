"""Compress a whole model to a budget of parameters, save it and measure it."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from laserlm.errors import ExportError
from laserlm.export.calibration_text import CalibrationText, own_calibration_text, read_calibration_text
from laserlm.export.checkpoint import Form, SavedModel, SaveOptions, check_request, command_of, write
from laserlm.export.fitting import (
    Allocation,
    Compression,
    Method,
    OnStep,
    check_fit,
    compressible,
    fit_ranks,
    needs_gradients,
    needs_input_moments,
    with_defaults,
)
from laserlm.export.gguf_rounding import QUANTISED_TYPES, rounded_to
from laserlm.export.products import check_products, fastest_products, own_products
from laserlm.export.refinement import check_steps
from laserlm.export.tensor_folder import storage_error
from laserlm.linalg.decomposition import ALGORITHM
from laserlm.low_rank import LowRankLinear
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import dtype_named
from laserlm.out_of_memory import return_freed_memory
from laserlm.paths import atomic_file
from laserlm.scoring.evaluate import text_perplexity
from laserlm.scoring.identity import digest
from laserlm.scoring.records import TokenSequence

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressionResult:
    """A compressed model that was saved, and its perplexity.

    Args:
        saved: the saved model.
        base_perplexity: perplexity of the unchanged model on the held-out text; None without a text.
        perplexity: perplexity of the compressed model on the same text.
        tokens: number of tokens of this text.
        at: perplexity at every ratio that was measured.
        quantised: perplexity and bytes of the unchanged model's weights by type of a GGUF file; empty if not measured.
    """

    saved: SavedModel
    base_perplexity: float | None
    perplexity: float | None
    tokens: int
    at: Mapping[float, float] = field(default_factory=dict)
    quantised: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields except the record as plain JSON values."""
        measured = {"base_perplexity": self.base_perplexity, "perplexity": self.perplexity, "held_out_tokens": self.tokens}
        others = {"at": {f"{ratio:g}": value for ratio, value in self.at.items()}, "quantised": dict(self.quantised)}
        return self.saved.as_dict() | measured | others


def compress(
    lm: LanguageModel,
    out: str | Path,
    *,
    ratio: float,
    measure: Sequence[float] = (),
    calibration: str | Path | None = None,
    method: Method = "two-sided",
    allocation: Allocation = "curvature",
    tokens: int = 16_384,
    dense_above: float | None = None,
    rank_multiple: int | None = None,
    refine: int = 0,
    products: str | None = None,
    quantised: bool = False,
    memory: float | None = None,
    form: Form = "factored",
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    shard_size: str = "5GB",
    hub_id: str | None = None,
    on_step: OnStep = lambda *_: None,
) -> CompressionResult:
    """Compress a model to a share of the parameters of its blocks' matrices, save it, and measure its perplexity.

    A call with the same model and text that was interrupted goes on where it was, also with another ratio.

    Args:
        lm: the unchanged model.
        out: the folder.
        ratio: share of the parameters of the blocks' matrices to keep; embeddings and biases do not change.
        measure: further ratios whose perplexity is measured.
        calibration: a text file. None lets the model write the text, unless the plain method with uniform ranks needs none.
        method: ``plain``, ``scaled``, ``whitened`` or ``two-sided``; see ``fit_ranks``.
        allocation: ``uniform``, ``sensitivity`` or ``curvature``; see ``fit_ranks``.
        tokens: maximum number of tokens for calibration.
        dense_above: a matrix whose factors would take more than this share of its parameters stays dense; see ``fit_ranks``.
        rank_multiple: what ranks are multiples of; see ``fit_ranks``.
        refine: number of steps that train the factors towards the unchanged model's predictions, one passage of the text each.
        products: dtype of the products for gradients and in this training, ``bfloat16`` or the model's own. None takes bfloat16
            for a model in float32, where the processor has instructions for it and the model can be run so.
        quantised: whether to measure the perplexity of the unchanged model's weights in 8 and 4 bits (GGUF q8_0 and q4_0) too.
        memory: bytes of what goes into the blocks, kept for gradients and moments; see ``fit_ranks``. None sets no bound.
        form: ``factored``, or ``dense`` for the products of the factors, which does not make the model smaller.
        dtype: dtype of the saved weights; None keeps the model's dtypes.
        overwrite: whether to replace a folder that laserlm wrote before.
        shard_size: maximum size of a weight file, such as ``5GB``.
        hub_id: repository that the folder will be uploaded to, which its card then names.
        on_step: is called with the stage, and how many of its steps are done, of how many.

    Raises:
        ExportError: if an argument is invalid, the ratio cannot be reached, or a folder cannot be written or is in use.
    """
    out = Path(out).expanduser().absolute()
    options = SaveOptions(form, dtype, overwrite, shard_size, hub_id)
    check_compression(lm, out, options)
    ratios = [ratio, *measure]
    shares: dict[str, Any] = {"dense_above": dense_above, "rank_multiple": rank_multiple}
    check_choices(lm, ratios, calibration, method, allocation, refine, **shares, products=products, quantised=quantised)
    shares = dict(zip(shares, with_defaults(allocation, **shares), strict=True))
    on_step("text", 0, 0)
    text = _text(lm, calibration, tokens, method, allocation, refine, on_step)
    rows = () if text is None else text.calibration
    if needs_input_moments(method, allocation):
        _warn_of_few_tokens(lm, rows)
    products = products or _products_for(lm, text, method, allocation, refine)
    with _own_folder(lm, rows, method, allocation, products) as kept:
        fit: dict[str, Any] = {"method": method, "allocation": allocation, **shares, "products": products}
        fit["memory"] = math.inf if memory is None else memory
        compression = fit_ranks(lm, rows, **fit, folder=kept, on_step=on_step)
        return_freed_memory()
        settings: dict[str, Any] = {"ratio": ratio, "method": method, "allocation": allocation}
        settings |= shares | {"refine": refine}
        if text is not None:
            settings["products"] = products
            compression = _with_trained_factors(lm, compression, ratios, text, refine, products, kept, on_step)
            return_freed_memory()
            on_step("perplexity", 0, 0)
            settings["text"] = text.as_dict() | {"tokens": tokens}
            settings["perplexity"] = _perplexities(lm, compression, ratios, options, text.held_out, kept)
            if quantised:
                settings["perplexity"]["quantised"] = _perplexities_of_quantised(lm, text.held_out, kept)
        return_freed_memory()
        on_step("writing", 0, 0)
        saved = _write(lm, out, options, compression, settings, text)
    measured = settings.get("perplexity", {})
    at = {float(ratio): value for ratio, value in measured.get("at", {}).items()}
    base, compressed, held_out = measured.get("base"), measured.get("compressed"), measured.get("held_out_tokens", 0)
    return CompressionResult(saved, base, compressed, held_out, at, measured.get("quantised", {}))


def _warn_of_few_tokens(lm: LanguageModel, rows: Sequence[TokenSequence]) -> None:
    tokens, widest = sum(len(row.targets) for row in rows), max(m.shape[1] for m in compressible(lm)[0])
    if rows and tokens < widest:
        log.warning(
            "the text has %d tokens for calibration, and matrices have up to %d inputs: many directions of the inputs are not "
            "seen, and the model is likely to break; give a longer text or more --tokens",
            tokens,
            widest,
        )


def check_compression(lm: LanguageModel, out: Path, options: SaveOptions) -> None:
    """Raise an error unless a compressed model can be written with these options; see ``check_request``."""
    if options.form == "adapter":
        raise ExportError("compress changes nearly all weights, which no small adapter can; use the form factored or dense")
    check_request(lm, out, options)


def check_choices(
    lm: LanguageModel,
    ratios: Sequence[float],
    calibration: str | Path | None,
    method: Method,
    allocation: Allocation,
    refine: int,
    *,
    dense_above: float | None,
    rank_multiple: int | None,
    products: str | None,
    quantised: bool,
) -> bool:
    """Return whether there will be a text; arguments are those of ``compress``, with the ratio before those to measure.

    Raises:
        ExportError: if an argument is invalid, or perplexity is to be measured without a text.
    """
    check_fit(method, allocation, ratios, dense_above, rank_multiple)
    check_steps(lm, refine)
    check_products(lm, products)
    has_text = calibration is not None or needs_text(method, allocation, refine)
    if not has_text and (len(ratios) > 1 or quantised):
        raise ExportError(
            "plain decompositions with uniform ranks need no text, and perplexity is measured on one; give --calibration FILE, "
            f"or leave out {'--quantised' if quantised else '--measure'}"
        )
    return has_text


def needs_text(method: Method, allocation: Allocation, refine: int = 0) -> bool:
    """Return whether a compression needs a text to calibrate or to train on."""
    return (method, allocation) != ("plain", "uniform") or bool(refine)


def _write(
    lm: LanguageModel,
    out: Path,
    options: SaveOptions,
    compression: Compression,
    settings: dict[str, Any],
    text: CalibrationText | None,
) -> SavedModel:
    arguments = ["--ratio", f"{settings['ratio']:g}", "--method", settings["method"], "--allocation", settings["allocation"]]
    if settings["allocation"] != "uniform":
        arguments += ["--dense-above", f"{settings['dense_above']:g}", "--rank-multiple", str(settings["rank_multiple"])]
    arguments += ["--refine", str(settings["refine"])]
    if text is not None:
        arguments += ["--products", settings["products"]]
        arguments += ["--calibration", text.name, "--tokens", str(settings["text"]["tokens"])]
        arguments += ["--quantised"] if "quantised" in settings["perplexity"] else []
        arguments += [word for ratio in [*settings["perplexity"]["at"]][1:] for word in ("--measure", ratio)]
    entries = {
        "compression": settings,
        "decomposition": {"algorithm": ALGORITHM, "seed": 0},
        "command": command_of(lm, "compress", arguments, out, options),
    }
    files = {text.name: text.content} if text is not None and text.is_own else {}
    return write(lm, out, compression.applied(lm, settings["ratio"], options.form), options, entries, files=files)


@contextmanager
def _own_folder(
    lm: LanguageModel, rows: Sequence[TokenSequence], method: Method, allocation: Allocation, products: str
) -> Iterator[Path]:
    """Yield the folder of what is computed for these arguments, for this process alone, and remove it after success."""
    model = [lm.hash, str(lm.dtype), str(lm.device)]
    identity = [*model, [row.ids for row in rows], method, allocation, products, version("laserlm")]
    folder = lm.cache / "compressions" / digest(identity)[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ExportError(
            f"another process compresses {lm.name} on this text, in {folder}; wait until it ends, or give another --cache"
        ) from None
    except OSError as error:
        raise storage_error(folder, error) from error
    with lock:
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def _text(
    lm: LanguageModel,
    file: str | Path | None,
    tokens: int,
    method: Method,
    allocation: Allocation,
    refine: int,
    on_step: OnStep,
) -> CalibrationText | None:
    """Return the text to calibrate and to train on; None if none is needed and none is named."""
    if file is not None:
        text = read_calibration_text(lm, file, tokens=tokens, refine=refine)
    elif needs_text(method, allocation, refine):
        text = own_calibration_text(
            lm, tokens=tokens, refine=refine, on_tokens=lambda done, total: on_step("text", done, total)
        )
    else:
        return None
    return text if needs_text(method, allocation) else replace(text, calibration=())


def _products_for(lm: LanguageModel, text: CalibrationText | None, method: Method, allocation: Allocation, refine: int) -> str:
    """Return the dtype of the products for gradients and in training, if there are any, else the model's own."""
    if text is None or not (refine or needs_gradients(method, allocation)):
        return own_products(lm)
    return fastest_products(lm, (text.calibration or text.refinement)[0])


def _with_trained_factors(
    lm: LanguageModel,
    compression: Compression,
    ratios: Sequence[float],
    text: CalibrationText,
    steps: int,
    products: str,
    folder: Path,
    on_step: OnStep,
) -> Compression:
    """Train the factors at every ratio that is measured, so that the perplexities can be compared."""
    for ratio in dict.fromkeys(ratios) if steps else ():
        shown = f"refinement at {ratio:g}"
        compression = compression.refine(
            lm,
            ratio,
            text.refinement,
            folder,
            steps=steps,
            products=products,
            on_step=lambda done, total: on_step(shown, done, total),  # noqa: B023
        )
    return compression


def _perplexities(
    lm: LanguageModel, compression: Compression, ratios: Sequence[float], options: SaveOptions, text: str, folder: Path
) -> dict[str, Any]:
    def measured() -> dict[str, float]:
        evaluation = text_perplexity(lm, text)
        size = _weight_bytes(lm, options.dtype)
        return {"perplexity": evaluation.perplexity, "bytes": size, "tokens": evaluation.tokens}

    def at(ratio: float) -> dict[str, float]:
        with compression.applied(lm, ratio, options.form):
            return measured()

    identity = [text, str(options.dtype)]
    of_ratios = {}
    for ratio in ratios:
        trained = ratio in compression.refined and compression.refined[ratio].name
        shares = [compression.dense_above, compression.rank_multiple]
        of_ratio = [*identity, f"{ratio:g}", options.form, *shares, trained]
        of_ratios[f"{ratio:g}"] = _measure_once(folder, of_ratio, partial(at, ratio))
    base = _measure_once(folder, identity, measured)
    return {
        "base": base["perplexity"],
        "compressed": of_ratios[f"{ratios[0]:g}"]["perplexity"],
        "at": {ratio: of_ratio["perplexity"] for ratio, of_ratio in of_ratios.items()},
        "bytes": {"base": base["bytes"]} | {ratio: of_ratio["bytes"] for ratio, of_ratio in of_ratios.items()},
        "held_out_tokens": base["tokens"],
    }


def _measure_once(folder: Path, identity: Sequence[object], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what an earlier call measured and kept in the folder for this identity, or measure and keep it."""
    file = folder / f"perplexity-{digest(identity)[:16]}.json"
    try:
        if file.is_file():
            found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
            return found
    except OSError as error:
        raise storage_error(folder, error) from error
    except ValueError as error:
        log.warning("%s is damaged (%s); its perplexity is measured again", file, error)
    measured = measure()
    try:
        with atomic_file(file) as part:
            part.write_text(json.dumps(measured), encoding="utf-8")
    except OSError as error:
        raise storage_error(folder, error) from error
    return measured


def _weight_bytes(lm: LanguageModel, dtype: str | torch.dtype | None) -> int:
    """Return the bytes of all weights as they would be saved, with the places of rows; None keeps the model's dtypes."""
    itemsize = lm.dtype.itemsize if dtype is None else dtype_named(dtype).itemsize
    orders = [m.order.nbytes for m in lm.model.modules() if isinstance(m, LowRankLinear) and m.order is not None]
    return sum(orders) + sum(p.numel() * (itemsize if p.dtype == lm.dtype else p.itemsize) for p in lm.model.parameters())


def _perplexities_of_quantised(lm: LanguageModel, text: str, folder: Path) -> dict[str, dict[str, float]]:
    """Return the bytes and the perplexity of the unchanged model's weights in the types of a GGUF file."""

    def measured(kind: str) -> dict[str, float]:
        with rounded_to(lm, kind) as size:
            return {"bytes": size, "perplexity": text_perplexity(lm, text).perplexity}

    return {kind: _measure_once(folder, [text, kind], partial(measured, kind)) for kind in QUANTISED_TYPES}
