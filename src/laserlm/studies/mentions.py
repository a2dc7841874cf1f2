"""How often facts occur in a text corpus: documents that mention a subject, its answer, or both."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

from laserlm.errors import AnalysisError, MissingExtraError
from laserlm.provenance import provenance
from laserlm.scoring.identity import digest
from laserlm.store import Store
from laserlm.studies.corpora import open_corpus
from laserlm.tasks import Example

__all__ = ["Mentions", "count_mentions"]

METHOD = 1
"""Goes up when a change moves counts."""
BLOCK = 1 << 20
"""Characters, of whole documents, that a process counts at once."""
ALONE = 256
"""Blocks that are counted before other processes are started, which takes as long as these do."""
AHEAD = 4
"""Blocks that wait for each process."""
NOTE_SECONDS = 10.0
"""What an interruption loses at most."""


@dataclass(frozen=True)
class Mentions:
    """Documents of a corpus that mention what examples are about, by the example's id.

    Args:
        documents: their number.
        subject: those that mention the subject.
        answer: those that mention the answer or one of its aliases.
        both: those that mention subject and answer.
    """

    documents: int
    subject: dict[str, int]
    answer: dict[str, int]
    both: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Patterns:
    """What is looked for, folded and in an order that does not depend on that of the examples.

    Args:
        subjects: each once.
        answers: each with its aliases.
        pairs: places of a subject and of an answer.
    """

    subjects: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    pairs: tuple[tuple[int, int], ...]


@dataclass
class Tally:
    """Documents so far.

    Args:
        documents: their number.
        subjects: those that mention each subject.
        answers: likewise.
        pairs: those that mention both.
    """

    documents: int
    subjects: list[int]
    answers: list[int]
    pairs: list[int]

    def add(self, found: SearchResult) -> None:
        """Add the documents of a block."""
        documents, *counts = found
        self.documents += documents
        for mine, more in zip((self.subjects, self.answers, self.pairs), counts, strict=True):
            for place, n in more.items():
                mine[place] += n


SearchResult = tuple[int, Counter[int], Counter[int], Counter[int]]
"""Documents of a block, and those that mention each subject, answer and pair."""


class Finder:
    """Finds all patterns in one pass over a text.

    Args:
        patterns: what is looked for.
    """

    def __init__(self, patterns: Patterns) -> None:
        words = sorted({*patterns.subjects, *chain.from_iterable(patterns.answers)})
        place = {word: i for i, word in enumerate(words)}
        self._lengths = [len(word) for word in words]
        self._automaton = _ahocorasick().Automaton()
        for word, i in place.items():
            self._automaton.add_word(word, i)
        self._automaton.make_automaton()
        self._subject_of = {place[subject]: s for s, subject in enumerate(patterns.subjects)}
        self._answers_of: dict[int, list[int]] = {}
        for a, texts in enumerate(patterns.answers):
            for text in texts:
                self._answers_of.setdefault(place[text], []).append(a)
        self._pairs_of: dict[int, list[tuple[int, int]]] = {}
        for p, (s, a) in enumerate(patterns.pairs):
            self._pairs_of.setdefault(s, []).append((p, a))

    def count(self, documents: Sequence[str]) -> SearchResult:
        """Return how many documents mention each subject, answer and pair."""
        counts: tuple[Counter[int], Counter[int], Counter[int]] = (Counter(), Counter(), Counter())
        for document in documents:
            words = self._mentioned(document)
            subjects = [self._subject_of[w] for w in words if w in self._subject_of]
            answers = {a for w in words for a in self._answers_of.get(w, ())}
            counts[0].update(subjects)
            counts[1].update(answers)
            counts[2].update(p for s in subjects for p, a in self._pairs_of[s] if a in answers)
        return len(documents), *counts

    def _mentioned(self, document: str) -> set[int]:
        text = f" {folded(document)} "
        found: set[int] = set()
        for end, word in self._automaton.iter(text):
            if word not in found and not _in_word(text[end + 1]) and not _in_word(text[end - self._lengths[word]]):
                found.add(word)
        return found


def count_mentions(
    corpus: str,
    examples: Sequence[Example],
    store: Store,
    *,
    workers: int = 1,
    on_progress: Callable[[int, int | None, int], None] | None = None,
) -> Mentions:
    """Count the documents that mention the subject, the answer, and both, of every example that names its subject.

    Case and the kind of white space do not matter; no letter or digit may stand directly before or after a mention, so that
    languages written without spaces give few. The counts are kept in the results database: an interrupted count goes on,
    and a finished one is not made again for as long as the corpus is the same.

    Args:
        corpus: see ``laserlm.studies.corpora.open_corpus``.
        examples: those without a subject are left out.
        store: the results database.
        workers: processes that count; a script that asks for several must be importable (``if __name__ == "__main__":``).
        on_progress: called with the documents done, their number where it is known, and those of them that were read now.

    Raises:
        AnalysisError: if no example names a subject, or the corpus cannot be read or is empty.
        MissingExtraError: if pyahocorasick is not installed.
        RunBusyError: if another process counts the same at the moment.
    """
    if workers < 1:
        raise AnalysisError(f"{workers} processes count nothing; write 1 or more workers")
    patterns, pair_of = _patterns(examples)
    _ahocorasick()
    source = open_corpus(corpus)
    identity = {"kind": "mentions", "corpus": source.identity, "patterns": digest(asdict(patterns)), "method": METHOD}
    settings = {"model": "corpus", "task": corpus, "pairs": len(patterns.pairs), **identity}
    made_by = provenance(device="cpu", dtype="none")
    with store.run(kind="mentions", key=digest(identity), settings=settings, provenance=made_by) as run:
        if run.outcome is None:
            tally = Tally(**run.notes["so far"]) if "so far" in run.notes else _nothing(patterns)
            begun, noted = tally.documents, time.monotonic()
            total = None if on_progress is None else source.count()
            with closing(_counted(_blocks(source.documents(begun)), patterns, workers)) as blocks:
                for found in blocks:
                    tally.add(found)
                    if time.monotonic() - noted >= NOTE_SECONDS:
                        run.note("so far", asdict(tally))
                        noted = time.monotonic()
                    if on_progress is not None:
                        on_progress(tally.documents, total, tally.documents - begun)
            if not tally.documents:
                raise AnalysisError(f"the corpus {corpus} holds no document; give one with texts")
            run.finish(asdict(tally))
        done = Tally(**(run.outcome or {}))
    pairs = {id_: patterns.pairs[p] for id_, p in pair_of.items()}
    return Mentions(
        documents=done.documents,
        subject={id_: done.subjects[s] for id_, (s, _) in pairs.items()},
        answer={id_: done.answers[a] for id_, (_, a) in pairs.items()},
        both={id_: done.pairs[p] for id_, p in pair_of.items()},
    )


def folded(text: str) -> str:
    """Return a text without what does not tell mentions apart: case, the kind of white space, how accents are encoded."""
    text = text.casefold()
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def _in_word(character: str) -> bool:
    """Return whether a character is a letter, a digit, or a mark on one."""
    return character.isalnum() or (not character.isascii() and unicodedata.category(character).startswith("M"))


def _patterns(examples: Sequence[Example]) -> tuple[Patterns, dict[str, int]]:
    """Return what is looked for, and by the id of each example the place of its pair."""
    of = {
        e.id: (folded(e.subject), tuple(sorted({folded(text) for text in (e.answer, *e.aliases)} - {""})))
        for e in examples
        if e.subject.strip()
    }
    if not of:
        raise AnalysisError(
            "no example names its subject, so that its fact cannot be looked for in a corpus; leave the corpus out where the "
            "task gives popularity, or give the field 'subject' in your own questions (jsonl:FILE)"
        )
    subjects = {text: i for i, text in enumerate(sorted({s for s, _ in of.values()}))}
    answers = {texts: i for i, texts in enumerate(sorted({a for _, a in of.values()}))}
    pairs = {pair: i for i, pair in enumerate(sorted({(subjects[s], answers[a]) for s, a in of.values()}))}
    found = Patterns(tuple(subjects), tuple(answers), tuple(pairs))
    return found, {id_: pairs[subjects[s], answers[a]] for id_, (s, a) in of.items()}


def _nothing(patterns: Patterns) -> Tally:
    return Tally(0, [0] * len(patterns.subjects), [0] * len(patterns.answers), [0] * len(patterns.pairs))


def _blocks(documents: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document) + 1
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _counted(blocks: Iterator[list[str]], patterns: Patterns, workers: int) -> Generator[SearchResult, None, None]:
    """Yield what is found in each block, in their order."""
    yield from map(Finder(patterns).count, islice(blocks, ALONE if workers > 1 else None))
    first = next(blocks, None)
    if first is None:
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(patterns,)) as pool:
        waiting: deque[Future[SearchResult]] = deque()
        try:
            for block in chain([first], blocks):
                waiting.append(pool.submit(_count, block))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise AnalysisError(
                "a process that counts mentions ended by itself: memory may be short, or a script asks for several processes "
                "outside of 'if __name__ == \"__main__\":'; count with one (workers=1, --workers 1)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_finder: Finder | None = None


def _start(patterns: Patterns) -> None:
    """Prepare a process that counts."""
    global _finder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that waits for this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _finder = Finder(patterns)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _count(block: list[str]) -> SearchResult:
    assert _finder is not None
    return _finder.count(block)


def _ahocorasick() -> Any:
    try:
        return importlib.import_module("ahocorasick")
    except ImportError:
        raise MissingExtraError("counting mentions needs pyahocorasick; pip install 'laserlm[analysis]'") from None
