"""The command ``laser sweep-layers``."""

from __future__ import annotations

from typing import Annotated

import typer

from laserlm.cli.options import TableOptions, TaskOptions, UpdatedModelOptions, with_options
from laserlm.cli.progress import progress_bar


@with_options(model_options=UpdatedModelOptions, task_options=TaskOptions, table=TableOptions)
def sweep_layers(
    model_options: UpdatedModelOptions,
    task_options: TaskOptions,
    table: TableOptions,
    ratios: Annotated[str, typer.Option(help="Kept fractions of the singular values, by commas or spaces.")] = "0.1,0.25,0.5",
    more: Annotated[list[str] | None, typer.Argument(help="More ratios.", hidden=True)] = None,
    from_top: Annotated[int, typer.Option(min=1, help="Number of last blocks to reduce at most.")] = 4,
    stack: Annotated[str, typer.Option(help="Stack, encoder or decoder, if the model has both.")] = "",
    split: Annotated[str, typer.Option(help="Split: validation, test or all.")] = "validation",
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of examples.")] = None,
) -> None:
    """Reduce every matrix of the last blocks, one block more at a time, and print scores and sizes.

    Example: laser sweep-layers bundled --ratios .1 .25 .5 --from-top 4 --task worldfacts --limit 200
    """
    from laserlm.studies.last_layers import sweep_layers

    sizes = [ratio for text in (ratios, *(more or ())) for ratio in text.split(",") if ratio.strip()]
    examples = task_options.split(split, limit)
    lm = model_options.load()
    with progress_bar("sweeping", unit="models") as advance:
        points = sweep_layers(
            lm, examples, ratios=sizes, from_top=from_top, stack=stack, batch_size=task_options.batch_size, on_model=advance
        )
    table.print([point.as_dict() for point in points], f"{examples.task}, {examples.name}")
