"""The command that writes a search as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from laserlm.cli.options import STORE_DEFAULT, Json, Store, print_json


def report(
    run: Annotated[str, typer.Argument(help="The search's id, the start of it, or 'last'.")],
    out: Annotated[Path | None, typer.Option(help="The file; default: report-RUN.html.")] = None,
    store: Store = STORE_DEFAULT,
    json: Json = False,
) -> None:
    """Write what a search was asked and found as one HTML file that needs nothing else.

    Example: laser report last --out report.html
    """
    from laserlm.store import Store as Results
    from laserlm.web.report import write_report

    with Results.open(store) as results:
        id_ = results.find(run, kind="search").id
        written = write_report(results, id_, out or Path(f"report-{id_}.html"))
    if json:
        print_json({"run": id_, "report": str(written), "bytes": written.stat().st_size})
    else:
        print(f"wrote {written}")
