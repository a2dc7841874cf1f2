"""Text corpora, one document at a time: files of this machine, and streams of data sets."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from laserlm.errors import AnalysisError
from laserlm.scoring.identity import digest

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
HUB_PREFIX = "hub:"
RESTART_HINT = "start the same again, which goes on after the documents that are done"


class Corpus(Protocol):
    """An ordered set of documents."""

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values: equal values mean that the documents are the same."""

    def count(self) -> int | None:
        """Return the number of documents, or None where it is not known before they are read."""

    def documents(self, start: int = 0) -> Iterator[str]:
        """Yield the documents after the first ``start``."""


@dataclass(frozen=True)
class Files:
    """The documents of files, in the order of their paths.

    Args:
        folder: what the files are below.
        files: their paths.
        one_document: whether a text file is one document; otherwise blank lines separate its documents.
    """

    folder: Path
    files: tuple[Path, ...]
    one_document: bool

    @property
    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of the files."""
        known = [(file, file.stat()) for file in self.files]
        rows = [(file.relative_to(self.folder).as_posix(), stat.st_size, stat.st_mtime_ns) for file, stat in known]
        return {"files": digest(rows), "whole": self.one_document}  # the key is in stored results

    def count(self) -> int:
        """Return the number of documents, for which the files are read without what is in them."""
        return sum(1 for _ in self._pieces())

    def documents(self, start: int = 0) -> Iterator[str]:
        """Yield the documents after the first ``start``, which are not decoded.

        Raises:
            AnalysisError: if a file is not what its name says, or a line has no text.
        """
        for piece in islice(self._pieces(), start, None):
            yield piece()

    def _pieces(self) -> Iterator[Callable[[], str]]:
        """Yield what makes each document."""
        for file in self.files:
            if _format(file) == ".jsonl":
                yield from (partial(_record, file, n, line) for n, line in enumerate(_lines(file), start=1) if line.strip())
            elif self.one_document:
                yield partial(_document, file)
            else:
                yield from _paragraphs(file)


@dataclass(frozen=True)
class Stream:
    """The rows of a data set of the ``datasets`` library, read as they come, without keeping them.

    Args:
        name: of the data set.
        split: that is read.
        builder: a ``datasets.DatasetBuilder``.
    """

    name: str
    split: str
    builder: Any = field(repr=False)

    @property
    def identity(self) -> dict[str, Any]:
        """Name, configuration, split, and the commit or the fingerprint of the files."""
        return {"name": self.name, "config": self.builder.config_id, "split": self.split, "revision": self.builder.hash}

    def count(self) -> int | None:
        """Return the number of rows where the data set tells it."""
        splits = self.builder.info.splits or {}
        return (splits[self.split].num_examples or None) if self.split in splits else None

    def documents(self, start: int = 0) -> Iterator[str]:
        """Yield the documents after the first ``start``.

        Raises:
            AnalysisError: if there is no such split, a row has no text, or the stream breaks off.
        """
        try:
            rows = self.builder.as_streaming_dataset(split=self.split)
        except (OSError, ValueError, LookupError, RuntimeError) as error:
            raise AnalysisError(f"cannot read the split {self.split!r} of {self.name}: {error}") from error
        yield from texts_of(rows, self.name, start)


def open_corpus(corpus: str) -> Corpus:
    """Return a corpus by its name.

    Args:
        corpus: a folder, of which every .txt and .md file is a document and every line of a .jsonl file; one .jsonl file,
            whose ``text`` fields are documents; one .txt or .md file, whose documents are separated by blank lines (each may
            be packed, ``.gz``); or ``hub:NAME[:CONFIG[:SPLIT]]``, the column ``text`` of a data set.

    Raises:
        AnalysisError: if there is no such corpus.
    """
    if corpus.startswith(HUB_PREFIX):
        return _stream(corpus)
    path = Path(corpus).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _format(file) in SUFFIXES and file.is_file())
        if not files:
            raise AnalysisError(f"no file below {path} ends in {', '.join(SUFFIXES)}; there is no document to read")
        return Files(path, tuple(files), one_document=True)
    if not path.is_file():
        raise AnalysisError(f"no corpus {corpus!r}; give a folder, a file, or {HUB_PREFIX}NAME[:CONFIG[:SPLIT]] for a data set")
    if _format(path) not in SUFFIXES:
        raise AnalysisError(f"{path} is no corpus; give a file that ends in {', '.join(SUFFIXES)}, or a folder of them")
    return Files(path.parent, (path,), one_document=False)


def texts_of(rows: Any, name: str, start: int = 0) -> Iterator[str]:
    """Yield the texts of a streamed data set after the first ``start``.

    Args:
        rows: a ``datasets.IterableDataset``.
        name: of the data set, for errors.
        start: number of rows that are left out.

    Raises:
        AnalysisError: if a row has no text, or the stream breaks off.
    """
    try:
        for number, row in enumerate(rows.skip(start) if start else rows, start=start + 1):
            yield _text(row, f"{name}, row {number}")
    # Where a file is out of reach or not what it should be, the library's many parts raise one of these.
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise AnalysisError(f"the stream of {name} broke off: {error}; {RESTART_HINT}") from error


def _stream(corpus: str) -> Stream:
    from datasets import load_dataset_builder

    parts = corpus.removeprefix(HUB_PREFIX).split(":")
    if not parts[0] or len(parts) > 3:
        raise AnalysisError(f"cannot read the corpus {corpus!r}; write {HUB_PREFIX}NAME[:CONFIG[:SPLIT]]")
    name, config, split = [*parts, "", ""][:3]
    try:
        builder = load_dataset_builder(name, config or None)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise AnalysisError(f"cannot reach the data set {name}: {error}; fetch its texts and give their folder") from error
    return Stream(name, split or "train", builder)


def _format(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise AnalysisError(f"{file} cannot be unpacked: {error}; fetch it again") from None


def _paragraphs(file: Path) -> Iterator[Callable[[], str]]:
    paragraph: list[bytes] = []
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield partial(_decoded, b"".join(paragraph), f"{file}, before line {number}")
            paragraph = []
    if paragraph:
        yield partial(_decoded, b"".join(paragraph), f"{file}, its end")


def _document(file: Path) -> str:
    return _decoded(b"".join(_lines(file)), str(file))


def _record(file: Path, number: int, line: bytes) -> str:
    where = f"{file}, line {number}"
    try:
        row = json.loads(_decoded(line, where))
    except json.JSONDecodeError as error:
        raise AnalysisError(f"{where}: not valid JSON ({error.msg}); write an object with a 'text' on each line") from None
    return _text(row, where)


def _text(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        fields = f"an object with {', '.join(map(str, row))}" if isinstance(row, dict) else f"{row!r:.60}"
        raise AnalysisError(f"{where}: the field 'text' must be a text, got {fields}")
    return text


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnalysisError(f"{where}: not UTF-8 text ({error.reason}); convert the file") from None
