"""The command ``laser compress``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import Json, UpdatedModelOptions, with_options
from laserlm.cli.progress import progress_bar
from laserlm.cli.save import FolderOptions

if TYPE_CHECKING:
    from laserlm.export import CompressionResult


@with_options(model_options=UpdatedModelOptions, folder=FolderOptions)
def compress(
    model_options: UpdatedModelOptions,
    folder: FolderOptions,
    ratio: Annotated[float, typer.Option(help="Share of the parameters of the blocks' matrices to keep.")] = 0.8,
    measure: Annotated[
        list[float] | None, typer.Option(help="Further ratio whose perplexity is measured; may be repeated.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text file; perplexity is measured on its last fifth.", show_default="text that the model writes"),
    ] = None,
    method: Annotated[str, typer.Option(help="Decomposition: plain, scaled, whitened, or two-sided.")] = "two-sided",
    allocation: Annotated[str, typer.Option(help="Ranks: uniform, sensitivity, or curvature.")] = "curvature",
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens for calibration.")] = 16_384,
    dense_above: Annotated[
        float | None,
        typer.Option(help="Keep matrices dense whose factors exceed this share.", show_default="0.9; 1 for uniform ranks"),
    ] = None,
    rank_multiple: Annotated[
        int | None, typer.Option(min=1, help="What ranks are multiples of.", show_default="32; 1 for uniform ranks")
    ] = None,
    refine: Annotated[int, typer.Option(min=0, help="Steps that train the factors.")] = 0,
    products: Annotated[
        str | None,
        typer.Option(help="Dtype of matrix products for gradients: bfloat16, or the model's.", show_default="the faster one"),
    ] = None,
    quantised: Annotated[bool, typer.Option("--quantised", help="Measure 8 and 4 bits of the base model too.")] = False,
    memory: Annotated[
        float | None, typer.Option(min=0, help="Most GiB of block inputs kept for gradients.", show_default="all that it takes")
    ] = None,
    form: Annotated[str, typer.Option(help="Form: dense, or factored (smaller).")] = "factored",
    json: Json = False,
) -> None:
    """Compress a whole model to a budget of parameters, with a rank for every matrix. OUT.html shows the ranks.

    A command that was interrupted goes on if it is given again.

    Example: laser compress bundled --ratio 0.8 --out smollm2-small
    """
    from laserlm.export.compression import compress
    from laserlm.web.compression_report import check_compression_report, write_compression_report

    if model_options.adapter is not None:
        raise typer.BadParameter(
            f"--adapter {model_options.adapter} is for the update alone, and all weights are compressed here; name "
            "the adapter's folder as the model, which merges it"
        )
    folder.check(model_options.model)
    settings: dict[str, Any] = {
        "ratio": ratio,
        "measure": measure or (),
        "calibration": calibration,
        "method": method,
        "allocation": allocation,
        "tokens": tokens,
        "dense_above": dense_above,
        "rank_multiple": rank_multiple,
        "refine": refine,
        "products": products,
        "quantised": quantised,
        "memory": None if memory is None else memory * 2**30,
        "form": form,
        "dtype": folder.save_dtype,
    }
    if folder.dry_run:
        from laserlm.export.export_plan import plan_compression

        lm = model_options.load()
        planned = plan_compression(lm, **settings)
        folder.print_plan(planned, lm.cache, json)
        return
    report = folder.out.expanduser().absolute()
    report = report.with_name(f"{report.name}.html")
    check_compression_report(report, overwrite=folder.overwrite)
    with progress_bar("compress: loading", unit="steps") as advance, _resumable():
        result = compress(
            model_options.load(),
            folder.out,
            **settings,
            overwrite=folder.overwrite,
            shard_size=folder.shard_size,
            hub_id=folder.push,
            on_step=lambda stage, done, total: advance(done, total, items=done, label=f"compress: {stage}"),
        )
    write_compression_report(result.saved.folder, report, overwrite=folder.overwrite)
    folder.finish(result.saved, json, result.as_dict() | {"report": str(report)})
    if not json:
        _print_perplexity(result)
        print(f"Open {report} for the rank of every matrix")


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interruption:
        interruption.add_note("Run the same command again to go on.")
        raise


def _print_perplexity(result: CompressionResult) -> None:
    if result.perplexity is not None:
        print(f"perplexity {result.base_perplexity:.2f} -> {result.perplexity:.2f} on {result.tokens:,} held-out tokens")
    for ratio, perplexity in [*result.at.items()][1:]:
        print(f"  with {ratio:.0%} of the parameters: {perplexity:.2f}")
    for kind, measured in result.quantised.items():
        print(f"  the base model's weights as {kind}, {measured['bytes'] / 2**20:.1f} MiB: {measured['perplexity']:.2f}")
    settings = result.saved.record["compression"]
    if result.perplexity is not None and not settings["refine"]:
        print("Training the factors keeps more, with 16 or more bytes of memory for each of their numbers: --refine 20")
    if (settings.get("text") or {}).get("own"):
        print("The model wrote the calibration text. A text of the kind that it will read keeps more: --calibration FILE")
