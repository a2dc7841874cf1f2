"""Commands on the leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from laserlm.cli.options import STORE_DEFAULT, Json, Store, print_json
from laserlm.cli.progress import say
from laserlm.errors import ReportError

if TYPE_CHECKING:
    from laserlm.store import Store as Results
    from laserlm.web.leaderboard import Write

app = typer.Typer(no_args_is_help=True, help="Build a leaderboard as a static site; write and collect submissions to one.")


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier leaderboard there is replaced.")],
    store: Store = STORE_DEFAULT,
    submissions: Annotated[
        Path | None, typer.Option(help="Folder of submissions, as 'laser leaderboard add' fills it.")
    ] = None,
    reports: Annotated[
        bool, typer.Option("--reports", help="Write the report of each of your runs too; else those there are kept.")
    ] = False,
    json: Json = False,
) -> None:
    """Build a page of published results, those of your own searches, and submitted ones.

    Example: laser leaderboard build --out site/ --reports
    """
    from dataclasses import asdict

    from laserlm.store import Store as Results
    from laserlm.web.leaderboard import build as build_site

    write: Write | None = None
    if reports:
        write = _write
    with Results.open(store) as results:
        built = build_site(out, results, submissions=submissions, report=write)
    if json:
        print_json(asdict(built) | {"folder": str(built.folder)})
    else:
        print(f"{built.folder / 'index.html'}: {built.rows} rows, {built.verified} verified, in {built.tables} tables")
        if built.reports:
            print(f"{built.reports} reports in {built.folder / 'reports'}")


def _write(store: Results, run: str, out: Path) -> Path | None:
    """Write the report of a run; where there can be none, as of one that an older laserlm wrote, say so and go on."""
    from laserlm.web.report import write_report

    try:
        return write_report(store, run, out)
    except ReportError as error:
        say(f"no report: {error}")
        return None


@app.command()
def submit(
    run: Annotated[str, typer.Argument(help="Id of a finished search, the start of it, or 'last'.")],
    credit: Annotated[str | None, typer.Option(help="A name to show with the result.")] = None,
    report: Annotated[str | None, typer.Option(help="An https:// address where more is told about it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of stdout.")] = None,
    store: Store = STORE_DEFAULT,
) -> None:
    """Write what a search found as a submission; it names no folders, users or machines but the credit.

    Example: laser leaderboard submit last --credit "A. Reader" --out result.json
    """
    import json

    from laserlm.paths import atomic_file
    from laserlm.store import Store as Results
    from laserlm.web.submissions import submission

    with Results.open(store) as results:
        document = submission(results.find(run, kind="search"), credit=credit, report=report)
    if out is None:
        print_json(document)
        return
    with atomic_file(out) as part:
        part.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"wrote {out}")


@app.command()
def add(
    files: Annotated[list[Path], typer.Argument(help="Submissions, of any origin.")],
    to: Annotated[Path, typer.Option(help="Folder of submissions.")],
    json: Json = False,
) -> None:
    """Check submissions, and copy those that are right and new into a folder.

    Example: laser leaderboard add result.json --to submissions/
    """
    from laserlm.web.submissions import add as add_to

    added = add_to(files, to)
    if json:
        print_json([{"file": str(a.file), "target": a.target and str(a.target), "problems": a.problems} for a in added])
    else:
        for a in added:
            if a.target is not None:
                print(f"{a.file}: added as {a.target}")
            for problem in a.problems:
                say(f"{a.file}: {problem}")
    refused = sum(a.target is None for a in added)
    if refused:
        raise ReportError(f"{refused} of {len(added)} files were refused; correct what is said of them, and add them again")
