"""The command ``laser load-check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from laserlm.cli.options import Json, print_json, with_options

Folder = Annotated[Path, typer.Argument(help="Folder that 'laser save' or 'laser compress' wrote.")]


@with_options()
def load_check(folder: Folder, json: Json = False) -> None:
    """Load a saved model in a fresh process, and compare its files and logits with those recorded when it was saved.

    Example: laser load-check smollm2-laser
    """
    from laserlm.errors import ExportError
    from laserlm.export.check import load_check

    check = load_check(folder)
    if json:
        print_json(asdict(check) | {"agrees": check.agrees})
    else:
        print(f"{folder} {check}")
    if check.changed_weights:
        raise ExportError(f"{', '.join(check.changed_weights)} of {folder} changed since the model was saved; save it again")
    if not check.agrees:
        raise ExportError(f"the outputs of {folder} differ from those recorded when it was saved; save it again")
