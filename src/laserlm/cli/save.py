"""The command ``laser save``, and the options for writing a folder that it shares with ``laser compress``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import STORE_DEFAULT, Json, Store, UpdatedModelOptions, print_json, with_options
from laserlm.cli.progress import progress_bar
from laserlm.cli.search_result import search_result

if TYPE_CHECKING:
    from laserlm.export import SavedModel
    from laserlm.export.export_plan import ExportPlan

MAX_DENSE_LINES = 8
"""Number of matrices that are listed because they stay dense."""

FormOption = Annotated[
    str,
    typer.Option(help="Form: dense, factored (smaller), adapter (LoRA) or gguf (llama.cpp)."),
]


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """The folder to write, its weights, and the repository to upload it to."""

    out: Annotated[Path, typer.Option(help="Folder to write.")]
    save_dtype: Annotated[
        str | None, typer.Option(help="Dtype of the saved weights, such as float16.", show_default="the model's")
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that laserlm wrote before.")] = False
    shard_size: Annotated[str, typer.Option(help="Maximum size of a weight file.")] = "5GB"
    push: Annotated[str | None, typer.Option(help="Hub repository to upload the folder to, OWNER/NAME.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the memory and the disk space; write nothing.")] = False
    public: Annotated[bool, typer.Option("--public/--private", help="With --push: whether a new repository is public.")] = False

    def check(self, model: str) -> None:
        """Raise an error unless the folder may be written; call it before the model with this name is loaded."""
        from laserlm.export.checkpoint import check_target

        check_target(self.out.expanduser(), self.overwrite, model)

    def print_plan(self, planned: ExportPlan, cache: Path, json: bool) -> None:
        """Print what writing the folder will take, and warn where a disk has too little space."""
        planned.warn_of_full_disks(self.out.expanduser(), cache)
        if json:
            print_json(planned.as_dict())
            return
        gib = 2**30
        phases = ", ".join(f"{name} {phase.total / gib:.2f} GiB" for name, phase in planned.phases.items())
        print(f"Memory of a process, without PyTorch's own: {planned.memory.total / gib:.2f} GiB.")
        print(f"Peak of each phase: {phases}. The model's weights take {planned.memory.weights / gib:.2f} GiB of it.")
        meanwhile = f", and {planned.temporary_bytes / gib:.2f} GiB more until it is done" if planned.temporary_bytes else ""
        print(f"{self.out} takes {planned.folder_bytes / gib:.2f} GiB of its disk{meanwhile}.")
        print(f"The cache folder grows by up to {planned.cache_bytes / gib:.2f} GiB.")

    def finish(self, saved: SavedModel, json: bool, values: dict[str, Any] | None = None) -> None:
        """Upload the saved model if asked to, and print it."""
        from laserlm.export import push

        address = None if self.push is None else push(saved.folder, self.push, private=not self.public)
        if json:
            print_json((values or saved.as_dict()) | {"pushed": address})
            return
        print(saved)
        dense = [m for m in saved.matrices if m.reason_kept_dense] if saved.record["asked_form"] == "factored" else []
        for m in dense[:MAX_DENSE_LINES]:
            print(f"  {m.matrix} stays one matrix: {m.reason_kept_dense}")
        if len(dense) > MAX_DENSE_LINES:
            print(f"  and {len(dense) - MAX_DENSE_LINES} more, see {saved.folder}/laser.json")
        if address is not None:
            print(f"uploaded to {address}")
        if saved.form == "gguf":
            print(f"Go on with: ollama create {saved.folder.name.lower()} -f {saved.folder / 'Modelfile'}")
        else:
            print(f"Go on with: laser load-check {saved.folder}")


@with_options(model_options=UpdatedModelOptions, folder=FolderOptions)
def save(
    model_options: UpdatedModelOptions,
    folder: FolderOptions,
    reduce: Annotated[list[str] | None, typer.Option(help="Reduction such as 27.fc_in@0.01; may be repeated.")] = None,
    run: Annotated[str | None, typer.Option(help="Search to save: id, start of an id, or 'last'.")] = None,
    point: Annotated[
        int | None, typer.Option(min=1, help="With --run: number in its Pareto list.", show_default="the chosen one")
    ] = None,
    form: FormOption = "dense",
    outtype: Annotated[str, typer.Option(help="Weights of --form gguf: f32, f16, bf16 or q8_0.")] = "f16",
    seed: Annotated[
        int | None, typer.Option(help="Seed of ':reference' decompositions.", show_default="the search's, else 0")
    ] = None,
    store: Store = STORE_DEFAULT,
    json: Json = False,
) -> None:
    """Save a reduced model as a folder that from_pretrained loads, with a model card and a record to rebuild it.

    Example: laser save bundled --reduce 28.fc_up@0.05 --out smollm2-laser
    """
    from laserlm.errors import ExportError
    from laserlm.export.export_plan import plan_save
    from laserlm.export.saving import chosen_intervention, save
    from laserlm.reductions import Intervention

    if run is None and not reduce:
        raise ExportError("nothing to save: give --reduce SPEC, or --run ID for the result of a search")
    if run is not None and reduce:
        raise ExportError("--reduce and --run both name a reduction: leave one of them out")
    if point is not None and run is None:
        raise typer.BadParameter("--point is a number in the Pareto list of a search; add --run ID")
    intervention = Intervention.read(reduce) if reduce else search_result(str(run), store)
    folder.check(model_options.model)
    if folder.dry_run:
        lm = model_options.load()
        tried = intervention if isinstance(intervention, Intervention) else chosen_intervention(lm, intervention, point)
        planned = plan_save(lm, tried, form=form, outtype=outtype, dtype=folder.save_dtype)  # type: ignore[arg-type]
        folder.print_plan(planned, lm.cache, json)
        return
    with progress_bar("reducing and writing", unit="matrices"):
        saved = save(
            model_options.load(),
            intervention,
            folder.out,
            form=form,  # type: ignore[arg-type]
            outtype=outtype,  # type: ignore[arg-type]
            dtype=folder.save_dtype,
            overwrite=folder.overwrite,
            shard_size=folder.shard_size,
            seed=seed,
            point=point,
            hub_id=folder.push,
        )
    folder.finish(saved, json)
