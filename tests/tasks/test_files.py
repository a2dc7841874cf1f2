"""Data files and downloads, and errors that say where."""

from __future__ import annotations

import gc
import gzip
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from laserlm.errors import TaskError
from laserlm.tasks import task
from laserlm.tasks.files import field as value_at
from laserlm.tasks.files import json_lines, local_file, read_records

QUESTIONS = b'{"prompt": "The capital of Freedonia is", "answer": "Firefly"}\n{"prompt": "Two and two is", "answer": "four"}\n'


@dataclass
class Site:
    """A web server on this machine that counts what it is asked for."""

    url: str
    pages: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Serve ``/questions.jsonl``, half of ``/half.jsonl`` and no HTTP at ``/noise``, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.asked.append(self.path)
            if self.path == "/noise":
                self.wfile.write(b"this is no reply\r\n\r\n")
            elif self.path == "/half.jsonl":
                self.send_response(200)
                self.send_header("Content-Length", str(len(QUESTIONS)))
                self.end_headers()
                self.wfile.write(QUESTIONS[: len(QUESTIONS) // 2])
            elif self.path in served.pages:
                self.send_response(200)
                self.send_header("Content-Length", str(len(served.pages[self.path])))
                self.end_headers()
                self.wfile.write(served.pages[self.path])
            else:
                self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        served = Site(f"http://127.0.0.1:{server.server_port}", {"/questions.jsonl": QUESTIONS, "/other.jsonl": b"other"})
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield served
        server.shutdown()
        thread.join()


def files_below(folder: Path) -> list[Path]:
    """Return the files at any depth, hidden ones included."""
    return [p for p in folder.rglob("*") if p.is_file()]


def test_a_download_is_kept_and_asked_for_once(site: Site, tmp_path: Path) -> None:
    first = local_file(f"{site.url}/questions.jsonl", tmp_path)
    second = local_file(f"{site.url}/questions.jsonl", tmp_path)
    assert site.asked == ["/questions.jsonl"]
    assert first == second
    assert first.read_bytes() == QUESTIONS
    assert files_below(tmp_path) == [first]
    assert first.name.endswith("questions.jsonl")


def test_two_urls_with_one_file_name_are_two_files(site: Site, tmp_path: Path) -> None:
    site.pages |= {"/a/facts.json": b"a", "/b/facts.json": b"b"}
    contents = [local_file(f"{site.url}/{folder}/facts.json", tmp_path).read_bytes() for folder in "abab"]
    assert contents == [b"a", b"b", b"a", b"b"]
    assert site.asked == ["/a/facts.json", "/b/facts.json"]


def test_a_page_that_is_not_there_is_an_error_with_the_next_step_and_leaves_no_file(site: Site, tmp_path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        local_file(f"{site.url}/missing.json", tmp_path)
    assert f"cannot download {site.url}/missing.json" in str(caught.value)
    assert "404" in str(caught.value)
    assert "Fetch it yourself" in str(caught.value)
    assert files_below(tmp_path) == []


def test_a_failed_download_is_tried_again(site: Site, tmp_path: Path) -> None:
    with pytest.raises(TaskError):
        local_file(f"{site.url}/late.json", tmp_path)
    site.pages["/late.json"] = b"[]"
    assert local_file(f"{site.url}/late.json", tmp_path).read_bytes() == b"[]"


def test_a_server_that_does_not_answer_is_an_error(site: Site, tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    with pytest.raises(TaskError, match=rf"cannot download http://127.0.0.1:{port}/x"):
        local_file(f"http://127.0.0.1:{port}/x", tmp_path)


def test_a_download_that_breaks_off_is_an_error_and_leaves_no_file(site: Site, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot download"):
        local_file(f"{site.url}/half.jsonl", tmp_path)
    assert files_below(tmp_path) == []


# The standard library drops its socket unclosed where a reply does not begin as HTTP.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("url", ["{}/noise", "{}x/questions.jsonl", "{}/with a space.json"], ids=["no reply", "port", "space"])
def test_a_reply_or_url_that_is_no_http_is_an_error(site: Site, tmp_path: Path, url: str) -> None:
    with pytest.raises(TaskError, match="cannot download"):
        local_file(url.format(site.url), tmp_path)
    gc.collect()


def test_a_task_takes_a_url_and_keeps_it_in_the_users_cache(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laserlm.tasks.files.cache_folder", lambda: tmp_path)
    first = task("jsonl", data=f"{site.url}/questions.jsonl")
    again = task(f"jsonl:{site.url}/questions.jsonl")
    assert [e.answer for e in first.every] == ["Firefly", "four"]
    assert first.every.hash == again.every.hash
    assert site.asked == ["/questions.jsonl"]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_local_file_is_itself(tmp_path: Path, kind: type[str | Path]) -> None:
    file = tmp_path / "facts.json"
    file.write_text("[]")
    assert local_file(kind(file)) == file


def test_the_users_home_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "facts.json").write_text("[]")
    assert local_file("~/facts.json") == tmp_path / "facts.json"


def test_a_file_that_is_not_there_is_named_with_the_next_step(tmp_path: Path) -> None:
    for missing in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(TaskError) as caught:
            local_file(missing)
        assert f"no data file {str(missing)!r}" in str(caught.value)
        assert "a URL that starts with https://" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n{"a": 1},\n{"a": }\n]', "line 3: not valid JSON"),
        (b'[{"a": 1}', "line 1: not valid JSON"),
        (b"", "line 1: not valid JSON"),
        (b'[{"a": "\xff"}]', "is not UTF-8 text"),
        (b"[]", "holds an empty list; a list of records is needed"),
        (b"{}", "holds no list; a list of records is needed"),
        (b'"text"', "holds no list; a list of records is needed"),
        (b"null", "holds no list; a list of records is needed"),
    ],
)
def test_a_file_that_is_no_json_list_says_so_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "facts.json"
    file.write_bytes(content)
    with pytest.raises(TaskError) as caught:
        read_records(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_a_json_list_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text('[{"name": "Ceará"}, {"n": 2}]', encoding="utf-8")
    assert read_records(file) == [(f"{file}, record 1", {"name": "Ceará"}), (f"{file}, record 2", {"n": 2})]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"name": "Ceará", "n": "1"}, {"name": "a, b", "n": "2"}]
    texts = {
        "rows.json": json.dumps(rows),
        "rows.jsonl": "".join(json.dumps(r) + "\n" for r in rows),
        "rows.csv": 'name,n\nCeará,1\n"a, b",2\n',
        "rows.tsv": "name\tn\nCeará\t1\na, b\t2\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert [row for _, row in read_records(tmp_path / name)] == rows
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(text.encode()))
        assert [row for _, row in read_records(packed)] == rows
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_records(tmp_path / "rows.parquet")[1] == (f"{tmp_path / 'rows.parquet'}, record 2", rows[1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.xml", b"<a/>", "has an unknown format; there are .json, .jsonl, .csv, .tsv, .parquet"),
        ("rows.jsonl.gz", b"no gzip", "cannot be unpacked"),
        ("rows.json.gz", gzip.compress(b"[{}]" * 99, mtime=0)[:-9], "cannot be unpacked"),
        ("rows.parquet", b"no table", "is not a Parquet file"),
    ],
)
def test_a_file_of_another_format_says_so(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=re.escape(message)):
        read_records(tmp_path / name)


def test_json_lines_are_numbered_from_one_and_blank_ones_count_but_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"n": 1}\n\n   \n{"n": "é"}\r\n{"n": 3}', encoding="utf-8")
    assert list(json_lines(file)) == [(1, {"n": 1}), (4, {"n": "é"}), (5, {"n": 3})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"n": 2', "line 3: not valid JSON"),
        (b"[1, 2]", "line 3: an object is needed, got [1, 2]"),
        (b"7", "line 3: an object is needed, got 7"),
        (b'{"n": "\xe9"}', "is not UTF-8 text"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"n": 1}\n\n' + line + b"\n")
    with pytest.raises(TaskError) as caught:
        list(json_lines(file))
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_a_value_is_found_at_its_dotted_path() -> None:
    row = {"a": {"b": {"c": "text"}}, "n": 3}
    assert value_at(row, "a.b.c", str, "here") == "text"
    assert value_at(row, "a.b", dict, "here") == {"c": "text"}
    assert value_at(row, "n", int, "here") == 3


@pytest.mark.parametrize(
    ("row", "path", "kind", "message"),
    [
        ({}, "a", str, "here: the field 'a' is missing"),
        ({"a": {}}, "a.b", str, "here: the field 'a.b' is missing"),
        ({"a": "b"}, "a.b", str, "here: the field 'a.b' is missing"),
        (["a"], "a", str, "here: the field 'a' is missing"),
        ({"a": None}, "a", str, "here: the field 'a' must be text that is not empty, got None"),
        ({"a": "  "}, "a", str, "here: the field 'a' must be text that is not empty, got '  '"),
        ({"a": 3}, "a", str, "here: the field 'a' must be text that is not empty, got 3"),
        ({"a": "3"}, "a", int, "here: the field 'a' must be of type int, got '3'"),
        ({"a": {}}, "a", list, "here: the field 'a' must be of type list, got {}"),
    ],
)
def test_a_field_that_is_missing_or_of_another_kind_is_named(row: Any, path: str, kind: type[Any], message: str) -> None:
    with pytest.raises(TaskError) as caught:
        value_at(row, path, kind, "here")
    assert str(caught.value) == message
