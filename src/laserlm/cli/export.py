"""Commands that save reduced models and check saved ones."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import (
    STORE_DEFAULT,
    DataOptions,
    Json,
    Listing,
    LoadOptions,
    ModelOptions,
    Store,
    TaskOptions,
    print_json,
    with_options,
)
from laserlm.cli.progress import bar, say

if TYPE_CHECKING:
    from laserlm.export import SavedModel
    from laserlm.models import LanguageModel
    from laserlm.scoring.evaluate import Comparison
    from laserlm.searching import SearchResult

Folder = Annotated[Path, typer.Argument(help="A folder that 'laser save' or 'laser compress' wrote.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
FormOption = Annotated[
    str, typer.Option(help="dense (loads without laserlm) or factored (smaller and faster; import laserlm to load it).")
]
SavedDtype = Annotated[
    str | None, typer.Option("--save-dtype", help="float32, bfloat16 or float16 of the saved weights; default: the model's.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that laserlm wrote before.")]
ShardSize = Annotated[str, typer.Option(help="Size of a weight file at most.")]
LOSS_TOLERANCE = 1e-3
"""Difference of two losses, in nats per token, that another machine's rounding explains."""
Push = Annotated[str | None, typer.Option(help="Upload the folder to this hub repository too, OWNER/NAME.")]
Private = Annotated[bool, typer.Option("--private", help="Make that repository a private one, if it is made now.")]


@with_options(model=ModelOptions)
def save(
    model: ModelOptions,
    out: Out,
    reduce: Annotated[list[str] | None, typer.Option(help="A reduction such as 27.fc_in@0.01; may be repeated.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Save what this search found, with its gain: an id, the start of one, or 'last'.")
    ] = None,
    form: FormOption = "dense",
    save_dtype: SavedDtype = None,
    overwrite: Overwrite = False,
    shard_size: ShardSize = "5GB",
    seed: Annotated[
        int | None, typer.Option(help="Seed of ':reference' decompositions; default: the search's, else 0.")
    ] = None,
    push: Push = None,
    private: Private = False,
    store: Store = STORE_DEFAULT,
    json: Json = False,
) -> None:
    """Save a reduced model as a folder that plain from_pretrained loads, with a model card and how to make it again.

    Example: laser save bundled --reduce 28.fc_up@0.05 --out smollm2-laser
    """
    from laserlm.errors import ExportError
    from laserlm.export import save as save_
    from laserlm.export.checkpoint import check_target
    from laserlm.reductions import Intervention

    if (run is None) == (not reduce):
        raise ExportError("nothing to save: give --reduce SPEC, or --run ID for what a search found, and not both")
    what = Intervention.parse(reduce) if reduce else _found(str(run), store)
    check_target(out, overwrite)  # before the model is loaded
    given: dict[str, Any] = {"form": form}
    with bar("reducing and writing", unit="matrices"):
        saved = save_(model.load(), what, out, dtype=save_dtype, overwrite=overwrite, shard_size=shard_size, seed=seed, **given)
    report(saved, push, private, json)


def report(saved: SavedModel, push: str | None, private: bool, json: bool, values: dict[str, Any] | None = None) -> None:
    """Print what was saved, and upload it if asked to."""
    from laserlm.export import push as push_

    address = None if push is None else push_(saved.folder, push, private=private)
    if json:
        print_json((values or saved.as_dict()) | {"pushed": address})
        return
    print(saved)
    dense = [h for h in saved.holdings if h.dense] if saved.record["asked_form"] == "factored" else []
    for h in dense[:8]:
        print(f"  {h.matrix} stays one matrix: {h.dense}")
    if len(dense) > 8:
        print(f"  and {len(dense) - 8} more, see {saved.folder}/laser.json")
    if address is not None:
        print(f"uploaded to {address}")
    print(f"Go on with: laser load-check {saved.folder}")


@with_options()
def load_check(folder: Folder, json: Json = False) -> None:
    """Load a saved model in a fresh process, and compare its logits with those recorded when it was saved.

    Example: laser load-check smollm2-laser
    """
    from laserlm.errors import ExportError
    from laserlm.export import load_check as load_check_

    found = load_check_(folder)
    if json:
        print_json(asdict(found) | {"agrees": found.agrees})
    else:
        print(f"{folder} {found}")
    if not found.agrees:
        raise ExportError(f"{folder} does not compute what was recorded when it was saved; save it again")


@with_options(model=LoadOptions, data=DataOptions)
def reproduce(
    folder: Folder,
    model: LoadOptions,
    data: DataOptions,
    base: Annotated[str | None, typer.Option(help="Where its base model is now; default: as recorded.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Where the text is now that it was calibrated on; default: as recorded.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The recorded search's task, where it was a file of your own: jsonl:FILE.")
    ] = None,
    score: Annotated[bool, typer.Option(help="Score the recorded search's test split again too.")] = True,
    json: Json = False,
) -> None:
    """Make a saved model again from its base model, and compare weights and, where a search was recorded, its test scores.

    Example: laser reproduce smollm2-laser
    """
    from laserlm.errors import ExportError
    from laserlm.export import read_record
    from laserlm.export import reproduce as reproduce_

    record = read_record(folder)
    made_from = record["base"]
    options = replace(
        model,
        revision=model.revision or made_from["revision"],
        dtype=model.dtype or record["dtype"]["base"],
        kind=model.kind or made_from["kind"],
    )
    with bar("making it again", unit="matrices"):
        lm = options.load_named(base or made_from["name"])
        found = reproduce_(folder, lm, calibration=calibration)
    scored = _scored_again(lm, record, task, data) if score and record.get("found") else None
    if json:
        print_json(asdict(found) | {"agrees": found.agrees, "test": None if scored is None else scored.as_dict()})
    else:
        print(f"{folder}: {found}")
    same = True
    if scored is not None:
        then = record["found"]["test"]
        same = (scored.corrected, scored.broken) == (then["corrected"], then["broken"])
        losses = [(scored.base_loss, then["base_loss"]), (scored.edited_loss, then["best_loss"])]
        same = same and all(abs(now - before) <= LOSS_TOLERANCE for now, before in losses)
        if not json:
            told = "{base:.1%} -> {best:.1%}, {corrected} corrected, {broken} broken, loss {base_loss:.3f} -> {best_loss:.3f}"
            now = scored.as_dict() | {"best": scored.edited, "best_loss": scored.edited_loss}
            print(f"recorded: {told.format(**then)}")
            print(f"again: {told.format(**now)}")
    if not found.agrees or not same:
        raise ExportError(f"{folder} could not be reproduced; compare the versions in its laser.json with those installed here")


def _found(run: str, store: str) -> SearchResult:
    """Return what a finished search of the store found."""
    from laserlm.errors import StoreError
    from laserlm.searching import SearchResult
    from laserlm.store import Store as Results

    with Results.open(store) as results:
        info = results.find(run, kind="search")
    if info.outcome is None:
        raise StoreError(f"run {info.id} is {info.status}, not finished; finish it with the same 'laser search' first")
    found = SearchResult.from_dict(info.outcome)
    return replace(found, settings=found.settings or info.settings)


def _scored_again(lm: LanguageModel, record: dict[str, Any], task: str | None, data: DataOptions) -> Comparison | None:
    """Score the test split that a search recorded, or say why that cannot be done here."""
    from laserlm.edit import applied
    from laserlm.errors import TaskError
    from laserlm.scoring.evaluate import compare, evaluate

    found = record["found"]
    settings = found["settings"]
    try:
        split = data.read(task or settings["task"]).test.limit(found["test"]["n"])
    except TaskError as error:
        say(f"The test scores are not compared, for the task's data is not here: {error}; see --task and --data")
        return None
    if split.hash != settings["test"]:
        say(
            f"The test scores are not compared: these are not the examples of {settings['task']} that were recorded; give "
            "--task, --data and the other task options of that search"
        )
        return None
    evaluations = []
    for intervention in ("", found["best"]):
        with applied(lm, intervention, seed=record["decomposition"]["seed"]):
            evaluations.append(evaluate(lm, split, scorer=settings["scorer"], batch_size=data.batch_size))
    return compare(*evaluations)


@with_options(model=ModelOptions)
def compress(
    model: ModelOptions,
    out: Out,
    ratio: Annotated[float, typer.Option(help="Share of the parameters of the blocks' matrices that is kept.")] = 0.8,
    calibration: Annotated[
        Path | None, typer.Option(help="A text file; its last fifth is held out and the perplexity measured there.")
    ] = None,
    method: Annotated[str, typer.Option(help="plain (the weights alone) or whitened (the inputs they meet).")] = "whitened",
    allocation: Annotated[
        str, typer.Option(help="uniform, or sensitivity (ranks by a first-order screen of the loss).")
    ] = "sensitivity",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to calibrate on, at most.")] = 32_768,
    form: FormOption = "factored",
    save_dtype: SavedDtype = None,
    overwrite: Overwrite = False,
    shard_size: ShardSize = "5GB",
    push: Push = None,
    private: Private = False,
    json: Json = False,
) -> None:
    """Compress a whole model to a budget of parameters, choosing a rank for every matrix.

    Example: laser compress bundled --ratio 0.8 --calibration corpus.txt --out smollm2-small
    """
    from laserlm.export.checkpoint import check_target
    from laserlm.export.compression import compress as compress_

    check_target(out, overwrite)  # before the model is loaded
    given: dict[str, Any] = {"method": method, "allocation": allocation, "form": form}
    with bar("calibrating and writing", unit="matrices"):
        found = compress_(
            model.load(),
            out,
            ratio=ratio,
            calibration=calibration,
            tokens=tokens,
            dtype=save_dtype,
            overwrite=overwrite,
            shard_size=shard_size,
            **given,
        )
    report(found.saved, push, private, json, found.as_dict())
    if found.perplexity is not None and not json:
        change = f"{found.base_perplexity:.2f} -> {found.perplexity:.2f}"
        print(f"perplexity {change} on {found.tokens:,} tokens that nothing was fitted to")


@with_options(model=ModelOptions, task=TaskOptions, listing=Listing)
def sweep_layers(
    model: ModelOptions,
    task: TaskOptions,
    listing: Listing,
    ratios: Annotated[
        str, typer.Option(help="Kept fractions of the singular values; more may follow, or be joined by commas.")
    ] = "0.1,0.25,0.5",
    more: Annotated[list[str] | None, typer.Argument(help="More ratios.", hidden=True)] = None,
    from_top: Annotated[int, typer.Option(min=1, help="Blocks to go down to, from the last.")] = 4,
    stack: Annotated[str, typer.Option(help="encoder or decoder, where the model has both.")] = "",
    split: Annotated[str, typer.Option(help="validation, test or all.")] = "validation",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of the split.")] = None,
) -> None:
    """Reduce every matrix of the last blocks, one block more at a time: score, and share of the parameters kept.

    Example: laser sweep-layers bundled --ratios .1 .25 .5 --from-top 4 --task worldfacts --limit 200
    """
    from laserlm.studies.last_layers import sweep_layers as sweep

    wanted = [ratio for text in (ratios, *(more or ())) for ratio in text.split(",") if ratio.strip()]
    examples = task.split(split, limit)
    lm = model.load()
    with bar("sweeping", unit="models") as advance:
        found = sweep(lm, examples, ratios=wanted, from_top=from_top, stack=stack, batch_size=task.batch_size, on_model=advance)
    listing.print([row.as_dict() for row in found], f"{examples.task}, {examples.name}")
