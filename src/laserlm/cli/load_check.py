"""The command ``laser load-check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from laserlm.cli.options import Json, print_json, with_options

Folder = Annotated[Path, typer.Argument(help="Folder that 'laser save' or 'laser compress' wrote.")]


@with_options()
def load_check(
    folder: Folder,
    allow_remote_code: Annotated[
        bool, typer.Option("--allow-remote-code", help="Run modelling code that comes with the folder.")
    ] = False,
    json: Json = False,
) -> None:
    """Check that a saved folder loads: in a fresh process, with the files and logits recorded when it was saved.

    All that no reduction touches is compared with the base model, if that is here.

    Example: laser load-check smollm2-laser
    """
    from laserlm.errors import ExportError
    from laserlm.export.check import load_check

    check = load_check(folder, allow_remote_code=allow_remote_code)
    if json:
        print_json(asdict(check) | {"agrees": check.agrees})
    else:
        print(f"{folder} {check}")
    if check.changed_weights:
        raise ExportError(f"{', '.join(check.changed_weights)} of {folder} changed since the model was saved; save it again")
    if check.lost:
        raise ExportError(f"{folder} is not its base model with the reduction: {check.lost[0]}; save it again")
    if not check.agrees:
        raise ExportError(f"the outputs of {folder} differ from those recorded when it was saved; save it again")
