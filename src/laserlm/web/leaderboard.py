"""A leaderboard of published, own and submitted results, as a folder of static files."""

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
from laserlm.web.submissions import claim, describe_run, is_finished, load_submission
from laserlm.web.verification import verified_claims

MARKER_FILE = "laser-leaderboard.json"
"""File in every folder that ``build`` wrote; ``build`` replaces no other folder."""
INDEX = "index.html"
REPORTS = "reports"
FORMAT = 1
ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
LINK = re.compile(rf"https://[^\s\"'<>\\]+|{REPORTS}/[0-9a-f]{{12}}\.html", re.ASCII)
Metric = Literal["accuracy", "pass@1", "loss"]
Origin = Literal["published", "own run", "submitted"]
ReportWriter = Callable[[Store, str, Path], object]


@dataclass(frozen=True, kw_only=True)
class LeaderboardEntry:
    """One result of the leaderboard.

    Args:
        model: name of the model.
        task: name of the task.
        metric: the main metric; ``loss`` for tasks without an accuracy.
        base: accuracy of the unchanged model as a share; None if there is none.
        base_loss: loss of the unchanged model in nats per answer token; None if unknown.
        edited: accuracy under the intervention.
        edited_loss: loss under the intervention.
        interval: 95 % interval of the gain.
        loss_interval: 95 % interval of the change of loss.
        n: number of test examples.
        intervention: canonical text.
        method: name of the method in its source.
        credit: source or submitter.
        origin: origin of the entry.
        how: further facts about the search.
        run: id of the own run, or empty.
        report: relative path or https address of a report, or empty.
        model_hash: sha256 of the model's weights, or empty.
        test_hash: sha256 of the test split, or empty.
        held_out: whether the test split had no part in the choice.
        harms: perplexity ratios on the guards of the search, as in a submission; empty if the harm was not measured. They are
            no part of a verification.
        verified: whether the entry was measured again here with the same figures (``laser leaderboard verify``).
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
    harms: tuple[dict[str, Any], ...] = ()
    verified: bool = False

    def __post_init__(self) -> None:
        if self.report and not LINK.fullmatch(self.report):
            raise ReportError(f"the report {self.report!r} is not an https:// address; give one, or leave it out")

    @property
    def gain(self) -> float | None:
        """Accuracy under the intervention minus the base accuracy."""
        return None if self.base is None or self.edited is None else self.edited - self.base

    @property
    def change(self) -> float | None:
        """Loss under the intervention minus the base loss."""
        return None if self.base_loss is None or self.edited_loss is None else self.edited_loss - self.base_loss

    @property
    def lacks(self) -> tuple[str, ...]:
        """The parts without which nobody can measure the entry again."""
        needed = {
            "an intervention": self.intervention,
            "a sha256 of the model's weights": self.model_hash,
            "a sha256 of the test split": self.test_hash,
            "a test split that had no part in the choice": self.held_out,
        }
        return tuple(name for name, is_present in needed.items() if not is_present)

    @property
    def is_claim(self) -> bool:
        """Whether the figures are a stranger's word alone: neither published, nor measured here."""
        return self.origin == "submitted" and not self.verified

    @property
    def is_own(self) -> bool:
        """Whether it is a run of this results database."""
        return self.origin == "own run"

    @property
    def reductions(self) -> list[str]:
        """The reductions as ``[matrix, layer, kept fraction]``, or as text if these three do not determine the reduction."""
        return [_triple(r) for r in Intervention.parse(self.intervention).reductions]

    @property
    def identity(self) -> tuple[object, ...]:
        """The measurement: equal for entries of the same result, whatever their origin."""
        figures = (self.base, self.base_loss, self.edited, self.edited_loss)
        what = (self.model, self.method, self.model_hash, self.task, self.test_hash, self.intervention, self.n)
        return (*what, *figures, repr(self.harms))


@dataclass(frozen=True)
class Table:
    """The entries of one task and metric: own runs, others, then what is a stranger's word alone; each the best gain first."""

    task: str
    metric: Metric
    rows: tuple[LeaderboardEntry, ...]

    @property
    def is_by_gain(self) -> bool:
        """Whether the rows without the claims are in the order of the gain: there are own runs alone, or none."""
        return len({row.is_own for row in self.rows if not row.is_claim}) < 2


@dataclass(frozen=True)
class BuildResult:
    """The folder of a leaderboard, and the numbers of its rows, verified rows, tables and reports."""

    folder: Path
    rows: int
    verified: int
    tables: int
    reports: int


def rows(store: Store | None = None, submissions: Path | None = None) -> list[LeaderboardEntry]:
    """Return the published entries, the submitted ones, and those of finished searches that found a reduction.

    Equal results of two own runs, or of an own run and a submission, are one entry.

    Args:
        store: the results database, or None.
        submissions: folder of submissions, or None.

    Raises:
        ReportError: if a submission is invalid, or the folder does not exist.
    """
    verified = verified_claims(store)
    entries: dict[tuple[object, ...], LeaderboardEntry] = {}
    for info in store.runs() if store is not None else ():
        if is_finished(info):
            document = describe_run(info)
            entry = _entry(document, origin="own run", credit=f"run {info.id}", run=_checked_id(info.id))
            entries.setdefault(entry.identity, replace(entry, verified=claim(document) in verified))  # the newest comes first
    for file in _files(submissions):
        document = load_submission(file)
        entry = replace(_submitted_entry(document), verified=claim(document) in verified)
        same = entries.get(entry.identity)
        if same is not None:  # several people may hand in one result; each is named
            credits = dict.fromkeys((*same.credit.split("; "), entry.credit))
            entry = replace(same, credit="; ".join(credits), report=same.report or entry.report)
        entries[entry.identity] = entry
    return [*(_published_entry(p) for p in published()), *entries.values()]


def build(
    out: str | Path, store: Store | None = None, *, submissions: Path | None = None, report: ReportWriter | None = None
) -> BuildResult:
    """Write the leaderboard as a folder of static files: one page, and the reports of the own runs.

    A temporary folder is written and then moved to ``out``.

    Args:
        out: the folder. An existing folder is replaced if this function wrote all of it.
        store: the results database, or None.
        submissions: folder of submissions, or None.
        report: writes the report of a run for a store, an id and a path; None keeps the reports that are in ``out``.

    Raises:
        ReportError: if the folder has other files or cannot be written, or a submission is invalid.
    """
    out = Path(out).resolve()
    _check_target(out)
    entries = rows(store, submissions)
    reports = 0
    try:
        with atomic_folder(out, existing="replace" if out.exists() else "refuse") as part:
            for i, row in enumerate(entries):
                if row.run and _write_report(row.run, store, out, part, report):
                    reports += 1
                    entries[i] = replace(row, report=row.report or f"{REPORTS}/{row.run}.html")
            tables = _tables(entries)
            (part / INDEX).write_text(_page(tables, entries), encoding="utf-8")
            marker = {"format": FORMAT, "laserlm": versions()["laserlm"], "rows": len(entries)}
            (part / MARKER_FILE).write_text(json.dumps(marker) + "\n", encoding="utf-8")
            _check_target(out)
    except OSError as error:
        raise ReportError(str(error)) from error
    return BuildResult(out, len(entries), sum(row.verified for row in entries), len(tables), reports)


def _check_target(out: Path) -> None:
    """Raise a ReportError if a folder must not be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ReportError(f"{out} is a file; give a folder")
    paths = [*out.iterdir(), *((out / REPORTS).iterdir() if (out / REPORTS).is_dir() else ())]
    if not paths:
        return
    if not (out / MARKER_FILE).is_file():
        raise ReportError(f"{out} was not built by 'laser leaderboard build' (it has no {MARKER_FILE}); give another folder")
    known = re.compile(rf"{INDEX}|{re.escape(MARKER_FILE)}|{REPORTS}|{REPORTS}/{ID.pattern}\.html")
    names = sorted(path.relative_to(out).as_posix() for path in paths)
    foreign = [name for name in names if not known.fullmatch(name)]
    if foreign:
        raise ReportError(
            f"{out} holds {', '.join(foreign[:5])}, which 'laser leaderboard build' did not write; move these files away, "
            "or give another folder"
        )


def _write_report(run: str, store: Store | None, out: Path, part: Path, write: ReportWriter | None) -> bool:
    """Write the report of a run, or keep the existing one; return whether there is a report."""
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
        raise ReportError(f"{run!r} is not the id of a run; an id has 12 hexadecimal digits")
    return run


def _files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    if not folder.is_dir():
        raise ReportError(f"there is no folder {folder}; create it with 'laser leaderboard add FILE --to {folder}'")
    return sorted(folder.glob("*.json"))


def _published_entry(p: Published) -> LeaderboardEntry:
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


def _submitted_entry(document: dict[str, Any]) -> LeaderboardEntry:
    credit = document.get("credit", "not named")
    return replace(_entry(document, origin="submitted", credit=credit), report=document.get("report", ""))


def _entry(document: dict[str, Any], *, origin: Origin, credit: str, run: str = "") -> LeaderboardEntry:
    """Return the entry of a submission, or of a run in that form."""
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
        harms=tuple(document.get("harm", ())),
    )


def _pair(values: list[float] | None) -> tuple[float, float] | None:
    return None if values is None else (values[0], values[1])


def _triple(r: Reduction) -> str:
    plain = Reduction(r.layers, r.matrix, r.size)
    return f"[{r.matrix}, {r.layers}, {r.size}]" if r == plain and r.size.rho is not None else str(r)


def _tables(entries: Iterable[LeaderboardEntry]) -> list[Table]:
    groups: dict[tuple[str, Metric], list[LeaderboardEntry]] = defaultdict(list)
    for row in entries:
        groups[row.task, row.metric].append(row)
    tables = [Table(*key, tuple(sorted(groups[key], key=_rank))) for key in sorted(groups)]
    return sorted(tables, key=lambda table: not any(row.is_own for row in table.rows))  # those with own runs come first


def _rank(row: LeaderboardEntry) -> tuple[bool, bool, float, str, str]:
    best = row.change if row.metric == "loss" else None if row.gain is None else -row.gain
    return (row.is_claim, not row.is_own, float("inf") if best is None else best, row.model, row.intervention)


def _page(tables: list[Table], entries: list[LeaderboardEntry]) -> str:
    return page(
        "leaderboard",
        tables=tables,
        rows=len(entries),
        verified=sum(row.verified for row in entries),
        choices={
            "model": sorted({row.model for row in entries}, key=str.casefold),
            "task": sorted({row.task for row in entries}, key=str.casefold),
            "method": sorted({row.method for row in entries}, key=str.casefold),
        },
        version=versions()["laserlm"],
        day=datetime.now(UTC).date().isoformat(),
    )
