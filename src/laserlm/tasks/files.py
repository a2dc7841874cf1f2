"""Read data files of users and of public data sets. Errors name the line or the record."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import http.client
import io
import json
import re
import shlex
import shutil
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from laserlm.errors import TaskError
from laserlm.paths import atomic_file, cache_folder

Record = tuple[str, dict[str, Any]]
"""The origin of a row, for error messages, and the row."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""How a text that Excel saves as Unicode begins."""
NO_TEXTS = {
    b"PK\x03\x04": "an Excel workbook or a zip archive. Save it as 'CSV UTF-8', or unpack it",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook. Save it as 'CSV UTF-8'",
    b"PAR1": "a Parquet file. Give it a name that ends in .parquet",
    b"\x1f\x8b": "packed by gzip. Give it a name that ends in .gz",
}
"""How files begin that are no text, what they are, and the next step."""
DATA_SET_FILES = ("dataset_dict.json", "state.json")
"""Files that say that the ``datasets`` library saved a folder."""
DELIMITERS = ",;|\t"
SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n")
"""A first line that tells Excel what separates columns."""
FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".ndjson")


def local_file(data: str | Path, cache: Path | None = None) -> Path:
    """Return a local path for a path or a download URL. Downloads stay in the cache.

    Raises:
        TaskError: if there is no such file, or the download fails.
    """
    if str(data).startswith(("http://", "https://")):
        url = str(data)
        folder = (cache or cache_folder()) / "data"
        file = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rpartition('/')[2] or 'data'}"
        if not file.is_file():
            try:
                with urllib.request.urlopen(url, timeout=60) as reply, atomic_file(file) as part:
                    with part.open("wb") as out:
                        shutil.copyfileobj(reply, out)
                    expected_size = reply.headers.get("Content-Length")
                    if expected_size is not None and part.stat().st_size != int(expected_size):
                        raise OSError(f"the connection ended after {part.stat().st_size} of {expected_size} bytes")
            except (OSError, ValueError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()  # it holds the connection
                raise TaskError(
                    f"cannot download {url}: {error}. Fetch it yourself and give it with --data (data=...)."
                ) from error
        return file
    file = Path(data).expanduser()
    if not file.is_file():
        raise TaskError(f"no data file {str(data)!r}. Give the path of a file, or a URL that starts with https://.")
    return file


def unreadable(path: Path) -> str:
    """Return why a file or a folder that is there holds no questions that can be read, and the next step."""
    if path.is_dir():
        if any((path / name).is_file() for name in DATA_SET_FILES):
            return f"{path} is a data set that the datasets library saved. Give it as hub:{path}"
        files = sorted(f.name for f in path.iterdir() if kind_of(f))
        which = f"one of its files, such as {path / files[0]}" if files else "a file"
        return f"{path} is a folder. Give {which}, or a folder with a data set as hub:{path}"
    kind = path.suffix.lower()
    if kind in (".xlsx", ".xls", ".ods"):
        return f"{path} is a workbook. Save its sheet as 'CSV UTF-8', and give that file"
    if kind in (".zip", ".bz2", ".xz", ".zst", ".tar", ".tgz"):
        return f"{path} is packed. Unpack it, and give the file in it"
    return (
        f"{path} has none of the endings {', '.join(FORMATS)}. Give JSON lines as jsonl:{path}, and a text as perplexity:{path}"
    )


def kind_of(name: str | Path) -> str:
    """Return the format that a file's name tells, such as ``.csv``, or an empty text."""
    kind = Path(str(name).removesuffix(".gz")).suffix.lower()
    return kind if kind in FORMATS else ""


def read_records(file: Path) -> list[Record]:
    """Read the rows of a data file: a JSON list, JSON lines, CSV, TSV (each may be compressed, ``.gz``) or Parquet.

    Raises:
        TaskError: if its content does not match its name; the message names the line or the record.
    """
    kind = kind_of(file)
    if kind == ".json":
        rows = json_document(file)
        if not isinstance(rows, list) or not rows:
            raise TaskError(f"{file} holds {'an empty list' if rows == [] else 'no list'}; a list of records is needed")
        return [(f"{file}, record {number}", row) for number, row in enumerate(rows, start=1)]
    if kind in (".jsonl", ".ndjson"):
        return [(f"{file}, line {number}", row) for number, row in json_lines(file)]
    if kind in (".csv", ".tsv"):
        return table_records(file, read_text(file))
    if kind == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            rows = parquet.read_table(file).to_pylist()
        except (ArrowException, OSError) as error:
            raise TaskError(f"{file} is not a Parquet file: {error}") from None
        return [(f"{file}, record {number}", row) for number, row in enumerate(rows, start=1)]
    raise TaskError(f"{file.name} has an unknown format; there are {', '.join(FORMATS)}")


def table_records(file: Path, text: str, *, strict: bool = False) -> list[Record]:
    """Read the rows of a table that a text is, with the names of columns in its first line.

    Args:
        file: where it is from, for messages.
        text: the table.
        strict: whether a double quote that is not closed, or not doubled, is an error.

    Raises:
        TaskError: if it is none, or two columns have one name.
    """
    named = SEPARATOR_LINE.match(text)
    text = text[named.end() :] if named else text
    delimiter = named[1] if named else _delimiter(text, DELIMITERS[::-1] if kind_of(file) == ".tsv" else DELIMITERS)
    header = _header(text, delimiter)
    twice = [name for name, count in Counter(name for name in header if name.strip()).items() if count > 1]
    if twice:
        raise TaskError(f"{file} has {header.count(twice[0])} columns named {twice[0]!r}. Rename or take out all but one.")
    spaced = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    table = csv.DictReader(
        io.StringIO(text, newline=""), restval="", delimiter=delimiter, skipinitialspace=spaced, strict=strict
    )
    try:
        return [(f"{file}, record {number}", row) for number, row in enumerate(table, start=1)]
    except csv.Error as error:
        raise TaskError(
            f"{file}, line {table.line_num}: {error}. A cell with double quotes has one at its start and at its end, and those "
            "within it twice."
        ) from None


def _header(text: str, delimiter: str) -> list[str]:
    """Return the cells of the first line of a table that is not empty."""
    try:
        return next(filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)), [])
    except csv.Error:
        return []  # which the reading of all lines reports


def _delimiter(text: str, delimiters: str) -> str:
    """Return what separates the columns of a table: what gives most of them. In some languages Excel writes semicolons."""
    return max(delimiters, key=lambda delimiter: len(_header(text, delimiter)))


def read_text(file: Path) -> str:
    """Read a UTF-8 text (or UTF-16 with a byte-order mark), compressed or not.

    Raises:
        TaskError: if it is not one.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        for start, what in NO_TEXTS.items():
            if content.startswith(start):
                raise TaskError(f"{file} is no text: it is {what}.")
        text = content.decode("utf-16" if content.startswith(UTF_16) else "utf-8-sig")
        if "\0" in text:
            raise TaskError(f"{file} holds zero bytes, as UTF-16 without a byte-order mark does. Save it as UTF-8.")
        return text
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8, in Excel as 'CSV UTF-8', or "
            f"convert it: iconv -f windows-1252 -t utf-8 {shlex.quote(str(file))}"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TaskError(f"{file} cannot be unpacked: {error}. Fetch it again.") from None


def json_document(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        TaskError: if it is not one; the message names the line.
    """
    try:
        return json.loads(read_text(file), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise TaskError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets within brackets
        raise TaskError(f"{file}: not valid JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, of which each name must be there once."""
    row = dict(pairs)
    if len(row) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the name {name!r} twice")
    return row


def json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number (from 1) and object of a JSON-lines file. Blank lines are skipped.

    Raises:
        TaskError: if a line is not a JSON object; the message names the line.
    """
    for number, line in enumerate(io.StringIO(read_text(file)), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise TaskError(f"{file}, line {number}: not valid JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{file}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise TaskError(f"{file}, line {number}: an object is needed, got {line.strip()[:60]}")
        yield number, row


def field(row: Any, path: str, kind: type[Any], origin: str) -> Any:
    """Return the value at a dotted path of a record, and check its type.

    Raises:
        TaskError: if it is missing or of another type; the message names the file, the record and the field.
    """
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            raise TaskError(f"{origin}: the field '{path}' is missing")
        value = value[name]
    if not isinstance(value, kind) or (kind is str and not value.strip()):
        wanted = "text that is not empty" if kind is str else f"of type {kind.__name__}"
        raise TaskError(f"{origin}: the field '{path}' must be {wanted}, got {value!r:.60}")
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise TaskError(f"{origin}: the field '{path}' holds half a surrogate pair, {value!r:.60}") from None
    return value
