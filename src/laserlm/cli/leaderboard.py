"""Commands on the leaderboard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from laserlm.cli.options import STORE_DEFAULT, DataOptions, Json, LoadOptions, Overwrite, Store, print_json, with_options
from laserlm.cli.progress import print_stderr
from laserlm.errors import ReportError

if TYPE_CHECKING:
    from laserlm.store import Store as Results

app = typer.Typer(no_args_is_help=True, help="Build a leaderboard as a static site; write and collect submissions to one.")


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder to write; replaces an earlier leaderboard.")],
    store: Store = STORE_DEFAULT,
    submissions: Annotated[Path | None, typer.Option(help="Folder filled by 'laser leaderboard add'.")] = None,
    reports: Annotated[bool, typer.Option("--reports", help="Also write the report of each of your runs.")] = False,
    json: Json = False,
) -> None:
    """Build a page with published results, your own results and submitted ones.

    Without --reports, the reports that are in the folder already are kept.

    Example: laser leaderboard build --out site/ --reports
    """
    from dataclasses import asdict

    from laserlm.store import Store as Results
    from laserlm.web.leaderboard import build as build_site

    with Results.open(store, create=store == STORE_DEFAULT) as results:
        result = build_site(out, results, submissions=submissions, report=_write_report if reports else None)
    if json:
        print_json(asdict(result) | {"folder": str(result.folder)})
    else:
        print(f"{result.folder / 'index.html'}: {result.rows} rows, {result.verified} verified, in {result.tables} tables")
        if result.reports:
            print(f"{result.reports} reports in {result.folder / 'reports'}")


def _write_report(store: Results, run: str, out: Path) -> Path | None:
    """Write the report of a run, or print why there is none, for example for a run of an older laserlm."""
    from laserlm.web.report import write_report

    try:
        return write_report(store, run, out)
    except ReportError as error:
        print_stderr(f"no report: {error}")
        return None


@app.command()
def submit(
    run: Annotated[str, typer.Argument(help="Id of a finished search, its start, or 'last'.")],
    credit: Annotated[str | None, typer.Option(help="Name to show with the result.")] = None,
    report: Annotated[str | None, typer.Option(help="Address of a report, https:// only.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="stdout")] = None,
    overwrite: Overwrite = False,
    store: Store = STORE_DEFAULT,
) -> None:
    """Write the result of a search as a submission; apart from the credit it names no person, folder or machine.

    Example: laser leaderboard submit last --credit "A. Reader" --out result.json
    """
    import json

    from laserlm.paths import atomic_file, check_new_file
    from laserlm.store import Store as Results
    from laserlm.web.submissions import submission

    if out is not None:
        start = b'{\n  "format": '
        check_new_file(out, kind="a submission", is_ours=lambda content: content.startswith(start), overwrite=overwrite)
    with Results.open(store, create=False) as results:
        document = submission(results.find(run, kind="search"), credit=credit, report=report)
    if out is None:
        print_json(document)
        return
    with atomic_file(out) as part:
        part.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print_stderr(f"wrote {out}")


@app.command()
@with_options(load_options=LoadOptions, data_options=DataOptions)
def verify(
    file: Annotated[Path, typer.Argument(help="Submission to measure again.")],
    load_options: LoadOptions,
    data_options: DataOptions,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of the model.", show_default="as submitted")] = None,
    task: Annotated[str | None, typer.Option(help="Task, such as jsonl:FILE.", show_default="as submitted")] = None,
    store: Store = STORE_DEFAULT,
    json: Json = False,
) -> None:
    """Measure a submission again here; if its figures hold, 'laser leaderboard build' shows its row as verified.

    Example: laser leaderboard verify submissions/worldfacts-1a2b.json
    """
    from laserlm.store import Store as Results
    from laserlm.web.submissions import BUNDLED, load_submission
    from laserlm.web.verification import verify as verify_document

    document = load_submission(file)
    name = model or document["model"]["name"]
    decoding = {k: v for k, v in document["task"].get("decoding", {}).items() if k in ("new_tokens", "samples", "temperature")}
    loaded = replace(data_options, **decoding).load_task(task or document["task"]["name"])
    split = loaded.test.limit(int(document["result"]["n"]))
    load_options = replace(load_options, dtype=load_options.dtype or document["model"].get("dtype"))
    with Results.open(store) as results:
        lm = load_options.load_named("bundled" if name == BUNDLED else name)
        again = verify_document(document, results, lm, split, batch_size=data_options.batch_size)
    if json:
        print_json({"file": str(file), "verified": True, "test": again.as_dict()})
    else:
        print(f"{file}: verified; {again}")


@app.command()
def add(
    files: Annotated[list[Path], typer.Argument(help="Submission files to check and copy.")],
    to: Annotated[Path, typer.Option(help="Folder to copy valid submissions to.")],
    json: Json = False,
) -> None:
    """Check submissions, and copy the valid and new ones into a folder.

    Example: laser leaderboard add result.json --to submissions/
    """
    from laserlm.web.submissions import add as add_to

    results = add_to(files, to)
    if json:
        print_json([{"file": str(a.file), "target": a.target and str(a.target), "problems": a.problems} for a in results])
    else:
        for a in results:
            if a.target is not None:
                print(f"{a.file}: added as {a.target}")
            for problem in a.problems:
                print_stderr(f"{a.file}: {problem}")
    refused = sum(a.target is None for a in results)
    if refused:
        raise ReportError(f"{refused} of {len(results)} files were refused; correct the problems above and add the files again")
