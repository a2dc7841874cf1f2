"""The command ``laser report``, which writes a search as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from laserlm.cli.options import STORE_DEFAULT, Json, Overwrite, Store, print_json


def report(
    run: Annotated[str, typer.Argument(help="Id of a search, its start, or 'last'.")],
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="report-RUN.html")] = None,
    overwrite: Overwrite = False,
    store: Store = STORE_DEFAULT,
    json: Json = False,
) -> None:
    """Write the settings and results of a search as one self-contained HTML file.

    Example: laser report last --out report.html
    """
    from laserlm.store import Store as Results
    from laserlm.web.report import write_report

    with Results.open(store, create=False) as results:
        id_ = results.find(run, kind="search").id
        file = write_report(results, id_, (out or Path(f"report-{id_}.html")).expanduser(), overwrite=overwrite)
    if json:
        print_json({"run": id_, "report": str(file), "bytes": file.stat().st_size})
    else:
        print(f"wrote {file}")
