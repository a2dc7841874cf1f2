"""A leaderboard: published results, one's own and submitted ones, as a folder of plain files."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from laserlm.errors import ReportError
from laserlm.paths import atomic_folder
from laserlm.provenance import versions
from laserlm.reductions import Intervention, Reduction
from laserlm.store import Store
from laserlm.studies.published import CHECKPOINTS, Published, published
from laserlm.web.pages import page
from laserlm.web.submissions import described, finished, read

__all__ = ["MARKER", "BuildResult", "LeaderboardEntry", "Table", "Write", "build", "rows"]

MARKER = "laser-leaderboard.json"
"""Stands in every folder that ``build`` wrote; no other one is replaced."""
INDEX = "index.html"
REPORTS = "reports"
FORMAT = 1
ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
LINK = re.compile(rf"https://[^\s\"'<>\\]+|{REPORTS}/[0-9a-f]{{12}}\.html", re.ASCII)
Metric = Literal["accuracy", "pass@1", "loss"]
Origin = Literal["published", "own run", "submitted"]
Write = Callable[[Store, str, Path], object]


@dataclass(frozen=True, kw_only=True)
class LeaderboardEntry:
    """One result.

    Args:
        model: its name.
        task: the task's name.
        metric: what is counted, ``loss`` where a task knows no accuracy.
        base: accuracy before, as a share; None where there is none.
        base_loss: in nats per answer token; None where it is not known, as below.
        edited: accuracy under the intervention.
        edited_loss: its loss.
        interval: 95 % interval of the gain.
        loss_interval: of the change of loss.
        n: number of test examples.
        intervention: canonical text.
        method: as its source calls it.
        credit: source, or who handed it in.
        origin: where the row is from.
        how: what else is known of how it was found.
        run: id of the run of one's own that found it, or empty.
        report: relative path or https address of more about it, or empty.
        model_hash: sha256 of the model's weights, or empty.
        test_hash: sha256 of the test split, or empty.
        held_out: whether it is measured on a test split that had no part in the choice.
    """

    model: str
    task: str
    metric: Metric
    base: float | None
    base_loss: float | None
    edited: float | None
    edited_loss: float | None
    interval: tuple[float, float] | None = None
    loss_interval: tuple[float, float] | None = None
    n: int | None = None
    intervention: str
    method: str
    credit: str
    origin: Origin
    how: str = ""
    run: str = ""
    report: str = ""
    model_hash: str = ""
    test_hash: str = ""
    held_out: bool = False

    def __post_init__(self) -> None:
        if self.report and not LINK.fullmatch(self.report):
            raise ReportError(f"a row cannot link to {self.report!r}; give an https:// address")

    @property
    def gain(self) -> float | None:
        """Accuracy under the intervention less that before."""
        return None if self.base is None or self.edited is None else self.edited - self.base

    @property
    def change(self) -> float | None:
        """Loss under the intervention less that before."""
        return None if self.base_loss is None or self.edited_loss is None else self.edited_loss - self.base_loss

    @property
    def lacks(self) -> tuple[str, ...]:
        """What the row does not carry of what a verified one does."""
        needed = {
            "an intervention": self.intervention,
            "a sha256 of the model's weights": self.model_hash,
            "a sha256 of the test split": self.test_hash,
            "a test split that had no part in the choice": self.held_out,
        }
        return tuple(name for name, there in needed.items() if not there)

    @property
    def verified(self) -> bool:
        """Whether the row carries all that it takes to repeat and trust the measurement."""
        return not self.lacks

    @property
    def reductions(self) -> list[str]:
        """The reductions as ``[matrix, layer, kept fraction]``, or as text where more than these three say what they are."""
        return [_triple(r) for r in Intervention.parse(self.intervention).reductions]

    @property
    def measured(self) -> tuple[object, ...]:
        """What was measured: equal for equal rows, whoever tells of them."""
        figures = (self.base, self.base_loss, self.edited, self.edited_loss)
        return (self.model_hash, self.task, self.test_hash, self.intervention, self.n, *figures)


@dataclass(frozen=True)
class Table:
    """The rows of one task that count the same, the best gain first.

    Args:
        task: the task's name.
        metric: what is counted.
        rows: one or more.
    """

    task: str
    metric: Metric
    rows: tuple[LeaderboardEntry, ...]


@dataclass(frozen=True)
class BuildResult:
    """What was built.

    Args:
        folder: where.
        rows: number of rows.
        verified: number of verified ones among them.
        tables: number of tables.
        reports: number of reports beside the page.
    """

    folder: Path
    rows: int
    verified: int
    tables: int
    reports: int


def rows(store: Store | None = None, submissions: Path | None = None) -> list[LeaderboardEntry]:
    """Return the published rows, those of finished searches that found something, and the submitted ones.

    A result that was found twice, or was found here and is submitted too, is one row.

    Args:
        store: the results database; None leaves it out.
        submissions: folder of submissions; None leaves it out.

    Raises:
        ReportError: if a submission is wrong, or there is no such folder.
    """
    own: dict[tuple[object, ...], LeaderboardEntry] = {}
    for info in store.runs() if store is not None else ():
        if finished(info):
            row = _row(described(info), origin="own run", credit=f"run {info.id}", run=_checked_id(info.id))
            own.setdefault(row.measured, row)  # the newest of equal ones
    submitted = []
    for file in _files(submissions):
        row = _submitted(read(file))
        mine = own.pop(row.measured, None)
        submitted.append(row if mine is None else replace(row, run=mine.run))
    return [*(_published(p) for p in published()), *submitted, *own.values()]


def build(
    out: str | Path, store: Store | None = None, *, submissions: Path | None = None, report: Write | None = None
) -> BuildResult:
    """Write the leaderboard as a folder of plain files: one page, and the reports of one's own runs.

    The folder is written beside ``out`` and moved there at the end.

    Args:
        out: the folder; one that is there already is replaced if this function wrote all of it.
        store: the results database; None leaves it out.
        submissions: folder of submissions; None leaves it out.
        report: writes the report of a run, given store, id and path; with None those that are in ``out`` already are kept.

    Raises:
        ReportError: if the folder holds anything else or cannot be written, or a submission is wrong.
    """
    out = Path(out).resolve()
    _check_target(out)
    listed = rows(store, submissions)
    reports = 0
    try:
        with atomic_folder(out, existing="replace" if out.exists() else "refuse") as part:
            for i, row in enumerate(listed):
                if row.run and _write_report(row.run, store, out, part, report):
                    reports += 1
                    listed[i] = replace(row, report=row.report or f"{REPORTS}/{row.run}.html")
            tables = _tables(listed)
            (part / INDEX).write_text(_page(tables, listed), encoding="utf-8")
            marker = {"format": FORMAT, "laserlm": versions()["laserlm"], "rows": len(listed)}
            (part / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
            _check_target(out)
    except OSError as error:
        raise ReportError(f"cannot write {out}: {error}; free space there, or give another folder") from error
    return BuildResult(out, len(listed), sum(row.verified for row in listed), len(tables), reports)


def _check_target(out: Path) -> None:
    """Raise a ReportError where a folder may not be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ReportError(f"{out} is a file; give a folder")
    held = [*out.iterdir(), *((out / REPORTS).iterdir() if (out / REPORTS).is_dir() else ())]
    if not held:
        return
    if not (out / MARKER).is_file():
        raise ReportError(
            f"{out} was not built by 'laser leaderboard build' (it has no {MARKER}) and is left alone; give another folder"
        )
    known = re.compile(rf"{INDEX}|{re.escape(MARKER)}|{REPORTS}|{REPORTS}/{ID.pattern}\.html")
    names = sorted(path.relative_to(out).as_posix() for path in held)
    strange = [name for name in names if not known.fullmatch(name)]
    if strange:
        raise ReportError(
            f"{out} holds {', '.join(strange[:5])}, which 'laser leaderboard build' did not write and would delete; "
            "move that away, or give another folder"
        )


def _write_report(run: str, store: Store | None, out: Path, part: Path, write: Write | None) -> bool:
    """Write the report of a run, or keep the one that is there; return whether there is one."""
    name = f"{REPORTS}/{_checked_id(run)}.html"
    if (store is None or write is None) and not (out / name).is_file():
        return False
    (part / REPORTS).mkdir(exist_ok=True)
    if store is not None and write is not None:
        return write(store, run, part / name) is not None
    shutil.copyfile(out / name, part / name)
    return True


def _checked_id(run: str) -> str:
    if not ID.fullmatch(run):
        raise ReportError(f"{run!r} is no id of a run, so no file is named after it; an id is 12 hexadecimal digits")
    return run


def _files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise ReportError(f"there is no folder {folder}; fill one with 'laser leaderboard add FILE --to {folder}'")
    return sorted(folder.glob("*.json"))


def _published(p: Published) -> LeaderboardEntry:
    scale = 100 if p.metric == "accuracy_percent" else 1
    return LeaderboardEntry(
        model=CHECKPOINTS[p.model][0],
        task=p.task,
        metric="pass@1" if p.metric == "pass_at_1" else "accuracy",
        base=p.base / scale,
        base_loss=p.base_loss,
        edited=p.edited / scale,
        edited_loss=p.edited_loss,
        intervention=str(Intervention.parse(p.intervention)),
        method=p.method,
        credit=p.source,
        origin="published",
    )


def _submitted(document: dict[str, Any]) -> LeaderboardEntry:
    credit = document.get("credit", "not named")
    return replace(_row(document, origin="submitted", credit=credit), report=document.get("report", ""))


def _row(document: dict[str, Any], *, origin: Origin, credit: str, run: str = "") -> LeaderboardEntry:
    """Return the row of a submission, or of a run in that form."""
    task, result, search = document["task"], document["result"], document.get("search", {})
    metrics: dict[str, Metric] = {"perplexity": "loss", "program": "pass@1"}
    how = [f"scored by {task['scorer']}"]
    if "strategy" in search:
        how.append(search["strategy"])
    if "candidates" in search:
        how.append(f"{int(search['candidates']):,} candidates")
    if not search.get("complete", True):
        how.append("ended by its time")
    splits = (task.get("validation"), task.get("test"))
    return LeaderboardEntry(
        model=document["model"]["name"],
        task=task["name"],
        metric=metrics.get(task["scorer"], "accuracy"),
        base=result["base"]["accuracy"],
        base_loss=result["base"].get("loss"),
        edited=result["edited"]["accuracy"],
        edited_loss=result["edited"].get("loss"),
        interval=_pair(result.get("interval")),
        loss_interval=_pair(result.get("loss_interval")),
        n=int(result["n"]),
        intervention=document["intervention"],
        method=document["method"],
        credit=credit,
        origin=origin,
        how=", ".join(how),
        run=run,
        model_hash=document["model"].get("sha256", ""),
        test_hash=task.get("test", ""),
        held_out=None not in splits and splits[0] != splits[1],
    )


def _pair(values: list[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])


def _triple(r: Reduction) -> str:
    plain = Reduction(r.layers, r.matrix, r.size)
    return f"[{r.matrix}, {r.layers}, {r.size}]" if r == plain and r.size.rho is not None else str(r)


def _tables(listed: Iterable[LeaderboardEntry]) -> list[Table]:
    groups: dict[tuple[str, Metric], list[LeaderboardEntry]] = defaultdict(list)
    for row in listed:
        groups[row.task, row.metric].append(row)
    return [Table(*key, tuple(sorted(groups[key], key=_rank))) for key in sorted(groups)]


def _rank(row: LeaderboardEntry) -> tuple[float, str, str]:
    best = row.change if row.metric == "loss" else None if row.gain is None else -row.gain
    return (float("inf") if best is None else best, row.model, row.intervention)


def _page(tables: list[Table], listed: list[LeaderboardEntry]) -> str:
    return page(
        "leaderboard",
        tables=tables,
        rows=len(listed),
        verified=sum(row.verified for row in listed),
        choices={
            "model": sorted({row.model for row in listed}, key=str.casefold),
            "task": sorted({row.task for row in listed}, key=str.casefold),
            "method": sorted({row.method for row in listed}, key=str.casefold),
        },
        version=versions()["laserlm"],
        day=datetime.now(UTC).date().isoformat(),
    )
