"""The app's leaderboard as rows of text."""

from __future__ import annotations

from collections.abc import Callable

from laserlm.store import Store
from laserlm.studies.published import published
from laserlm.web.board import board_html, board_rows

Record = Callable[..., str]


def test_own_runs_come_first_with_sign_interval_and_harm(store: Store, record: Record) -> None:
    run = record(result={"harms": [{"ratio": 1.0141, "interval": [1.0102, 1.0181]}]})
    record("2.fc_in@0.5", scorer="perplexity")
    record("3.fc_in@0.5", finish=False)
    rows = board_rows(store)
    assert len(rows) == 2 + len(published())
    text, own = rows[:2]
    assert (own.source, own.base, own.edited, own.n) == (f"run {run}", "18.5%", "21.5%", "1,000")
    assert (own.gain, own.harm) == ("+3.0 [+1.7, +4.5]", "×1.014 [1.010, 1.018]")
    assert (text.base, text.gain, text.harm, text.is_own) == ("", "", "", True)
    assert {row.gain[0] for row in rows[2:]} <= {"+", "-"}
    assert not any(row.is_own for row in rows[2:])


def test_words_choose_rows_and_data_stays_text(store: Store, record: Record) -> None:
    record(task="<b>quiz</b>")
    rows = board_rows(store)
    page = board_html(rows, "QUIZ some/model")
    assert page.count('<td data-label="from">') == 1
    assert "&lt;b&gt;quiz&lt;/b&gt;" in page
    assert f"1 of {len(rows)} results" in page
    assert f"0 of {len(rows)} results" in board_html(rows, "nothing such")
