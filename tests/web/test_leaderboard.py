"""The rows of the leaderboard are what was published, searched and submitted; a site is complete or not there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from laserlm.errors import ReportError
from laserlm.store import Store
from laserlm.studies.published import published
from laserlm.web.leaderboard import MARKER_FILE, LeaderboardEntry, build, rows
from laserlm.web.submissions import submission

Record = Callable[..., str]
NO_HARM = "not measured"
VOID = {"meta", "link", "input", "br", "col"}


class Parsed(HTMLParser):
    """The rows of a page's tables, as texts and attributes, and its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        elif "h2" in self.open:
            self.headings[-1] += data

    def table(self, heading: str) -> list[list[str]]:
        """Return the cells of a table, without white space beside and doubled within."""
        result = self.tables[[" ".join(h.split()) for h in self.headings].index(heading)]
        return [[" ".join(cell.split()) for cell in row] for row in result]

    def links(self) -> list[str | None]:
        return [attributes["href"] for tag, attributes in self.elements if tag == "a"]


def site(folder: Path) -> Parsed:
    return Parsed((folder / "index.html").read_text(encoding="utf-8"))


def submitted(store: Store, run: str, folder: Path, **options: str) -> Path:
    folder.mkdir(exist_ok=True)
    entry = submission(store.find(run), **options)
    (folder / f"{len(list(folder.iterdir()))}.json").write_text(json.dumps(entry))
    return folder


def test_every_published_row_is_there_with_its_figures_and_none_is_verified(tmp_path: Path) -> None:
    entries = rows()
    assert [(r.task, r.method, r.credit, r.base_loss, r.edited_loss) for r in entries] == [
        (p.task, p.method, p.source, p.base_loss, p.edited_loss) for p in published()
    ]
    assert not any(r.verified for r in entries)
    assert all(len(r.lacks) == 3 and r.intervention for r in entries)
    built = build(tmp_path / "site")
    assert (built.rows, built.verified, built.tables, built.reports) == (len(published()), 0, 9, 0)
    page = site(tmp_path / "site")
    assert sum(len(t) - 1 for t in page.tables) == len(published())
    assert page.table("counterfact") == [
        ["Model", "Base accuracy", "Base loss", "LASER accuracy", "LASER loss", "Gain, points", *page.table("fever")[0][6:]],
        ["EleutherAI/gpt-j-6b", "13.1%", "5.78", "24.0%", "5.05", "+10.9", NO_HARM, "[fc_in, 27, 0.01]", *of_authors],
        ["FacebookAI/roberta-base", "17.3%", "5.78", "19.3%", "5.43", "+2.0", NO_HARM, "[fc_in, 8, 0.8]", *of_authors],
        ["meta-llama/Llama-2-7b-hf", "35.6%", "3.61", "37.6%", "3.49", "+2.0", NO_HARM, "[fc_in, 28, 0.05]", *of_authors],
    ]
    programs = page.table("humaneval pass@1")
    assert programs[0][1] == "Base pass@1"
    assert programs[1][:5] == ["mistralai/Mistral-7B-Instruct-v0.1", "17.7%", "–", "21.9%", "–"]
    assert programs[1][5:8] == ["+4.3", NO_HARM, "[all, 28-31, 0.5]"]
    assert page.table("fever")[3][7] == "24.fc_in@r40"


of_authors = [
    "LASER",
    "LASER project pagepublished",
    "○ reported lacks a sha256 of the model's weights; a sha256 of the test split; a test split that had no part in the choice",
]


def test_a_search_of_ones_own_is_a_reported_row(store: Store, record: Record, tmp_path: Path) -> None:
    run = record("1.fc_in@0.5+2.fc_out@r3:bottom")
    built = build(tmp_path / "site", store)
    assert (built.rows, built.verified) == (len(published()) + 1, 0)
    page = site(tmp_path / "site")
    cells = page.table("worldfacts")[1]
    assert cells[:5] == ["some/model", "18.5%", "3.50", "21.5%", "3.25"]
    assert cells[5] == "+3.0 [+1.7, +4.5]n 1,000"
    assert cells[6] == NO_HARM
    assert cells[7] == "[fc_in, 1, 0.5] 2.fc_out@r3:bottom"
    assert cells[8] == "LASERscored by answer, race, 3,090 candidates"
    assert cells[9] == f"run {run}own run"
    repeatable = "○ reported has what a repetition needs, and was not measured again here"
    assert cells[10] == f"{repeatable} weights sha256 {'a' * 64} test split sha256 {'d' * 64} chosen on another split"
    assert page.links() == ["https://arxiv.org/abs/2312.13558"]


def test_own_runs_come_first_and_claims_last(store: Store, record: Record, tmp_path: Path) -> None:
    other = record("3.fc_in@0.5", task="fever", numbers=(1000, 185, 400, 10), seed=1)
    claimed = submitted(store, other, tmp_path / "subs")
    store.delete(other)
    runs = {record(task="worldfacts"), record(task="fever", numbers=(1000, 185, 10, 40))}
    page = site(build(tmp_path / "site", store, submissions=claimed).folder)
    assert page.headings[:2] == ["fever", "worldfacts"]
    credits = [row[9] for row in page.table("fever")[1:]]
    assert credits[0] in {f"run {run}own run" for run in runs}
    assert [c.endswith(("published", "submitted")) for c in credits[1:]] == [True] * (len(credits) - 1)
    assert credits[-1].endswith("submitted")
    sorted_heads = [attributes for tag, attributes in page.elements if tag == "th" and "aria-sort" in attributes]
    assert len(sorted_heads) == len(page.tables) - 1  # the order of fever's rows is not that of the gain


def test_a_row_shows_its_harm_next_to_its_gain(store: Store, record: Record, tmp_path: Path) -> None:
    comparison = {"n": 64, "base_loss": 2.0, "edited_loss": 2.006}
    harm = {"kind": "text", "ratio": 1.006, "interval": [1.003, 1.0101], "comparison": comparison}
    result = {"harms": [harm | {"guard": "self"}, harm | {"guard": "/home/ann/letters.txt", "ratio": 1.2, "interval": None}]}
    run = record(result=result)
    build(tmp_path / "site", store)
    page = site(tmp_path / "site").table("worldfacts")
    assert page[0][6] == "Harm"
    assert page[1][6] == "×1.006 [1.003, 1.010] own text, n 64 ×1.200 a text, n 64"
    folder = submitted(store, run, tmp_path / "subs")
    build(tmp_path / "other", submissions=folder)
    assert "as stated" in site(tmp_path / "other").table("worldfacts")[1][6]
    assert "ann" not in (folder / "0.json").read_text()


def test_only_finished_searches_that_found_something_are_rows(store: Store, record: Record) -> None:
    record("", key="nothing")
    record(finish=False)
    record(kind="scores")
    assert len(rows(store)) == len(published())


@pytest.mark.parametrize(
    ("changed", "lacks"),
    [
        ({"intervention": ""}, "an intervention"),
        ({"model_hash": ""}, "a sha256 of the model's weights"),
        ({"test_hash": ""}, "a sha256 of the test split"),
        ({"held_out": False}, "a test split that had no part in the choice"),
    ],
)
def test_a_row_says_what_it_lacks_to_be_repeated(store: Store, record: Record, changed: dict[str, str], lacks: str) -> None:
    record()
    row = rows(store)[-1]
    assert (row.verified, row.lacks) == (False, ())
    assert replace(row, **changed).lacks == (lacks,)


@pytest.mark.parametrize(("name", "value"), [("validation", None), ("validation", "d" * 64), ("test", None)])
def test_a_submission_measured_on_what_it_was_chosen_on_says_so(
    store: Store, record: Record, tmp_path: Path, name: str, value: str | None
) -> None:
    entry = submission(store.find(record()))
    entry["task"][name] = value
    if value is None:
        del entry["task"][name]
    (tmp_path / "a.json").write_text(json.dumps(entry))
    row = rows(submissions=tmp_path)[-1]
    assert row.origin == "submitted"
    assert not row.verified
    assert "a test split that had no part in the choice" in row.lacks


def test_equal_results_are_one_row_and_different_ones_are_not(store: Store, record: Record) -> None:
    first, second = record(seed=0), record(seed=1)
    record(model_hash="e" * 64)
    record(test="f" * 64)
    record("2.fc_in@0.5")
    record(numbers=(1000, 185, 40, 9))
    own = rows(store)[len(published()) :]
    assert len(own) == 5
    assert second in {r.run for r in own}
    assert first not in {r.run for r in own}


def test_a_submission_of_ones_own_run_is_one_row_with_both_links(store: Store, record: Record, tmp_path: Path) -> None:
    run, linked = record(), record("2.fc_in@0.5")
    folder = submitted(store, run, tmp_path / "subs", credit="Ann")
    submitted(store, linked, folder, report="https://example.org/a?b=1&c=2")
    assert [(r.credit, r.run) for r in rows(store, folder)[len(published()) :]] == [
        (f"run {linked}; not named", linked),
        (f"run {run}; Ann", run),
    ]
    build(tmp_path / "site", store, submissions=folder, report=write_report)
    assert set(site(tmp_path / "site").links()) == {
        "https://arxiv.org/abs/2312.13558",
        f"reports/{run}.html",
        "https://example.org/a?b=1&c=2",
    }


def test_a_wrong_submission_stops_the_build_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "wrong.json").write_text('{"format": 1}')
    with pytest.raises(ReportError, match=r"wrong\.json is no submission: .*method: is missing"):
        build(tmp_path / "site", submissions=tmp_path)
    assert not (tmp_path / "site").exists()
    with pytest.raises(ReportError, match=r"no folder .*nowhere"):
        rows(submissions=tmp_path / "nowhere")


def test_rows_are_sorted_by_gain_and_those_of_a_perplexity_by_loss(store: Store, record: Record, tmp_path: Path) -> None:
    record("1.fc_in@0.5", numbers=(1000, 185, 10, 40))
    record("2.fc_in@0.5", numbers=(1000, 185, 40, 10))
    record("3.fc_in@0.5", numbers=(1000, 185, 10, 10))
    losses = {"base_loss": 3.5, "best_loss": 3.0, "loss_interval": [-0.6, -0.4], "n": 20}
    record("4.fc_in@0.5", task="perplexity:text", scorer="perplexity")
    record("5.fc_in@0.5", task="perplexity:text", scorer="perplexity", result={"test": losses})
    build(tmp_path / "site", store)
    page = site(tmp_path / "site")
    assert [r[7] for r in page.table("worldfacts")[1:]] == ["[fc_in, 2, 0.5]", "[fc_in, 3, 0.5]", "[fc_in, 1, 0.5]"]
    table = page.table("perplexity:text loss")
    assert table[0][:6] == ["Model", "Base loss", "LASER loss", "Change of loss", "Harm", "Intervention"]
    assert [r[1:6] for r in table[1:]] == [
        ["3.50", "3.00", "-0.500 [-0.600, -0.400]n 20", NO_HARM, "[fc_in, 5, 0.5]"],
        ["3.50", "3.25", "-0.250 [-0.300, -0.200]n 1,000", NO_HARM, "[fc_in, 4, 0.5]"],
    ]
    marks = {text: attributes.get("class") for text, attributes in reversed(spans(tmp_path / "site"))}
    assert (marks["+3.0"], marks["-3.0"], marks["+0.0"], marks["-0.500"]) == ("good", "bad", None, "good")


def spans(folder: Path) -> list[tuple[str, dict[str, str]]]:
    text = (folder / "index.html").read_text()
    return [(m[2], {"class": m[1]} if m[1] else {}) for m in re.finditer(r'<span(?: class="(\w+)")?>([^<]*)</span>', text)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("27.fc_in@0.01", ["[fc_in, 27, 0.01]"]),
        ("20-27.mlp@0.1", ["[mlp, 20-27, 0.1]"]),
        ("all.fc_out@0", ["[fc_out, all, 0]"]),
        ("24.fc_in@r40", ["24.fc_in@r40"]),
        ("1.fc_in@0.5:bottom", ["1.fc_in@0.5:bottom"]),
        ("1.fc_in@0.5:reference", ["1.fc_in@0.5:reference"]),
        ("1.fc_in@0.5:split4", ["1.fc_in@0.5:split4"]),
        ("encoder.1.fc_in@0.5", ["encoder.1.fc_in@0.5"]),
        ("1.fc_in@0.5+2.fc_in@0.5", ["[fc_in, 1, 0.5]", "[fc_in, 2, 0.5]"]),
        ("", []),
    ],
)
def test_an_intervention_is_shown_as_published_ones_are(text: str, shown: list[str]) -> None:
    assert replace(rows()[0], intervention=text).reductions == shown


def test_many_reductions_are_all_there(store: Store, record: Record, tmp_path: Path) -> None:
    record("+".join(f"{i}.fc_in@0.5" for i in range(10, 30)))
    build(tmp_path / "site", store)
    cell = site(tmp_path / "site").table("worldfacts")[1][7]
    assert cell.count("[fc_in") == 20
    assert "20 reductions" in cell


def test_a_forged_row_is_below_what_is_published_or_measured_here(store: Store, record: Record, tmp_path: Path) -> None:
    record("2.fc_in@0.5", task="counterfact", numbers=(1000, 185, 40, 39))
    forged = submission(store.find(record(numbers=(1000, 0, 900, 0))), credit="Mallory")
    forged["task"]["name"] = "counterfact"
    (tmp_path / "forged.json").write_text(json.dumps(forged))
    entries = rows(store, tmp_path)
    assert [row.is_claim for row in entries if row.credit == "Mallory"] == [True]
    build(tmp_path / "site", store, submissions=tmp_path)
    table = site(tmp_path / "site").table("counterfact")[1:]
    assert [row[5][:5] for row in table] == ["+0.1 ", "+10.9", "+2.0", "+2.0", "+90.0"]
    assert "reported" in table[-1][10]


def test_people_who_hand_in_one_result_are_all_named_and_another_name_is_another_row(
    store: Store, record: Record, tmp_path: Path
) -> None:
    document = submission(store.find(record()), credit="Ann")
    renamed = document | {"model": document["model"] | {"name": "Mallory/model"}}
    for i, d in enumerate((document | {"credit": "Mallory"}, document, renamed)):
        (tmp_path / f"{i}.json").write_text(json.dumps(d))
    assert [(r.model, r.credit) for r in rows(submissions=tmp_path)[len(published()) :]] == [
        ("some/model", "Mallory; Ann"),
        ("Mallory/model", "Ann"),
    ]


HOSTILE = "<script>alert(1)</script>'\"><img src=x onerror=alert(2)>{{7*7}}</td>&amp;"


def test_what_looks_like_html_is_text(store: Store, record: Record, tmp_path: Path) -> None:
    plain = build(tmp_path / "plain", store).folder
    before = {tag for tag, _ in site(plain).elements}
    run = record(model="some/model", task=HOSTILE[:100])
    entry = submission(store.find(run), credit=HOSTILE)
    entry["model"]["name"] = entry["method"] = HOSTILE
    (tmp_path / "a.json").write_text(json.dumps(entry))
    build(tmp_path / "site", store, submissions=tmp_path)
    page = site(tmp_path / "site")
    assert {tag for tag, _ in page.elements} == before
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    cells = page.table(HOSTILE[:100])[-1]
    assert (cells[0], cells[9]) == (HOSTILE, f"{HOSTILE}submitted")
    row = [attributes for _, attributes in page.elements if attributes.get("data-task") == HOSTILE[:100]][-1]
    assert (row["data-model"], row["data-method"]) == (HOSTILE, HOSTILE)


@pytest.mark.parametrize(
    "link",
    ["javascript:alert(1)", "http://example.org", "//example.org", "reports/../../x.html", "reports/0123456789ab.html\n",
     "data:text/html,x", "https://example.org/ x", "reports/0123456789AB.html", " https://example.org"],
)  # fmt: skip
def test_a_row_links_to_reports_and_https_alone(link: str) -> None:
    with pytest.raises(ReportError, match="is not an https:// address"):
        replace(rows()[0], report=link)
    assert replace(rows()[0], report="reports/0123456789ab.html").report
    assert replace(rows()[0], report="https://example.org/a").report


def write_report(store: Store, run: str, out: Path) -> Path:
    out.write_text(f"report of {store.find(run).id}")
    return out


def test_reports_are_written_linked_and_kept(store: Store, record: Record, tmp_path: Path) -> None:
    run, out = record(), tmp_path / "site"
    assert build(out, store).reports == 0
    assert not (out / "reports").exists()
    built = build(out, store, report=write_report)
    assert built.reports == 1
    assert f"reports/{run}.html" in site(out).links()
    (out / "reports" / f"{run}.html").write_text("an older one")
    gone = "0" * 12
    (out / "reports" / f"{gone}.html").write_text("of a run that is no row any more")
    assert build(out, store).reports == 1
    assert [p.name for p in (out / "reports").iterdir()] == [f"{run}.html"]
    assert (out / "reports" / f"{run}.html").read_text() == "an older one"
    assert f"reports/{run}.html" in site(out).links()
    build(out, store, report=write_report)
    assert (out / "reports" / f"{run}.html").read_text() == f"report of {run}"


@pytest.mark.parametrize("name", ["../../../../x", "0123456789AB", "0123456789abc", "0123456789ab\n", "..........ab"])
def test_no_file_is_named_after_what_is_no_id(
    store: Store, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    record()
    info = replace(store.runs()[0], id=name)
    monkeypatch.setattr(store, "runs", lambda: [info])
    with pytest.raises(ReportError, match="is not the id of a run"):
        build(tmp_path / "deep" / "site", store, report=lambda *_: pytest.fail("called"))
    assert not (tmp_path / "deep" / "site").exists()


def test_a_build_that_fails_leaves_what_was_there(store: Store, record: Record, tmp_path: Path) -> None:
    record()
    out = build(tmp_path / "site", store).folder
    before = (out / "index.html").read_bytes()

    def broken(*_: object) -> None:
        raise ReportError("no report")

    with pytest.raises(ReportError, match="no report"):
        build(out, store, report=broken)
    assert (out / "index.html").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "site"))) == ["site"]


def test_only_what_was_built_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "site"
    (out / ".git").mkdir(parents=True)
    with pytest.raises(ReportError, match=f"was not built by 'laser leaderboard build' .it has no {MARKER_FILE}."):
        build(out)
    (out / ".git").rmdir()
    build(out)  # an empty folder may be taken
    (out / "index.html").write_text("older")
    build(out)
    assert (out / "index.html").read_text() != "older"
    for strange in (".git", "notes.txt", "reports/mine.html", "reports/0123456789ab.html.bak"):
        (out / strange).parent.mkdir(exist_ok=True)
        (out / strange).write_text("mine")
        with pytest.raises(ReportError, match=f"holds {re.escape(strange)}, which"):
            build(out)
        assert (out / strange).read_text() == "mine"
        (out / strange).unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ReportError, match="is a file"):
        build(tmp_path / "file")


def test_what_comes_while_it_is_built_is_not_lost(store: Store, record: Record, tmp_path: Path) -> None:
    record()
    out = build(tmp_path / "site", store).folder

    def late(store: Store, run: str, file: Path) -> None:
        file.write_text("x")
        (out / "notes.txt").write_text("mine")

    with pytest.raises(ReportError, match=r"holds notes\.txt"):
        build(out, store, report=late)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        build(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "index.html").is_file()
    assert len(list(tmp_path.iterdir())) == 2


def test_the_site_is_plain_files_that_ask_for_nothing(store: Store, record: Record, tmp_path: Path) -> None:
    record()
    out = build(tmp_path / "site", store).folder
    assert sorted(p.name for p in out.iterdir()) == ["index.html", MARKER_FILE]
    page = site(out)
    assert not any("src" in attributes for _, attributes in page.elements)
    assert [attributes["href"] for tag, attributes in page.elements if tag == "link"] == ["data:,"]
    # Without the script there is nothing to press that does nothing.
    assert not any(tag == "button" for tag, _ in page.elements)
    assert next(attributes for _, attributes in page.elements if attributes.get("id") == "filters").get("hidden", "no") is None
    assert str(tmp_path) not in (out / "index.html").read_text()


def test_a_row_knows_no_gain_where_a_figure_is_missing() -> None:
    row: LeaderboardEntry = replace(rows()[0], base=None, base_loss=None)
    assert (row.gain, row.change) == (None, None)
