"""The app's leaderboard: own searches first, then the published results, with a search over the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from laserlm.store import RunInfo, Store
from laserlm.studies.published import published
from laserlm.web.pages import page


@dataclass(frozen=True)
class BoardRow:
    """A result as texts; what is not known is empty.

    Args:
        source: the run, or the source of a published result.
        model: name of the model.
        task: name of the task.
        base: accuracy of the unchanged model.
        edited: accuracy of the edited model.
        gain: points of accuracy, with the 95 % interval where it is known.
        harm: perplexity ratio of each guard.
        n: number of test examples.
        intervention: canonical text.
        is_own: whether it is a run of the results database.
    """

    source: str
    model: str
    task: str
    base: str
    edited: str
    gain: str
    harm: str
    n: str
    intervention: str
    is_own: bool = False

    @property
    def text(self) -> str:
        """All texts of the row, for a search."""
        return " ".join(str(getattr(self, f.name)) for f in fields(self)).lower()


def board_rows(store: Store) -> list[BoardRow]:
    """Return the test results of a database's finished searches, then the published results."""
    rows = [_own(run) for run in store.runs() if run.kind == "search" and run.outcome is not None]
    for p in published():
        scale = 1 if p.metric.endswith("percent") else 100
        figures = (f"{scale * p.base:.1f}%", f"{scale * p.edited:.1f}%", f"{scale * (p.edited - p.base):+.1f}")
        rows.append(BoardRow(p.source, p.model, p.task, *figures, "", "", p.intervention))
    return rows


def board_html(rows: Sequence[BoardRow], words: str = "") -> str:
    """Return a table of the rows that hold all words. All data is escaped."""
    shown = [row for row in rows if all(word in row.text for word in words.lower().split())]
    return page("app_board", rows=shown, of=len(rows))


def _own(run: RunInfo) -> BoardRow:
    outcome = run.outcome or {}
    test, best = outcome["test"], outcome["best"]
    figures = ("", "", "")
    if run.settings.get("scorer") != "perplexity":
        low, high = (100 * x for x in test["interval"])
        figures = (f"{test['base']:.1%}", f"{test['best']:.1%}", f"{100 * test['gain']:+.1f} [{low:+.1f}, {high:+.1f}]")
    harm = ", ".join("×{:.3f} [{:.3f}, {:.3f}]".format(harm["ratio"], *harm["interval"]) for harm in outcome.get("harms", ()))
    source, n = f"run {run.id}", f"{test['n']:,}"
    return BoardRow(source, run.full_model, run.task, *figures, harm, n, best or "none", is_own=True)
