"""Count the documents of a text corpus that mention the subject of a fact, its answer, or both."""

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

METHOD = 1
"""Raise it when a change of the code changes counts; stored counts of another number are not used."""
BLOCK_CHARACTERS = 1 << 20
"""Characters in a block of complete documents, the unit of work."""
SERIAL_BLOCKS = 256
"""Blocks that are counted in this process before workers start. Starting them takes about as long."""
QUEUED_BLOCKS = 4
"""Blocks in the queue for each worker."""
NOTE_SECONDS = 10.0
"""Seconds of work that an interruption loses at most."""


@dataclass(frozen=True)
class Mentions:
    """Numbers of documents that mention a fact, by the id of the example.

    Args:
        documents: number of documents in the corpus.
        subject: documents that mention the subject.
        answer: documents that mention the answer or one of its aliases.
        both: documents that mention subject and answer.
    """

    documents: int
    subject: dict[str, int]
    answer: dict[str, int]
    both: dict[str, int]


@dataclass(frozen=True)
class Patterns:
    """The texts to look for, case-folded, in an order that does not depend on the order of the examples.

    Args:
        subjects: each subject once.
        answers: each answer with its aliases.
        pairs: index of a subject and index of an answer.
    """

    subjects: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    pairs: tuple[tuple[int, int], ...]


@dataclass
class Tally:
    """Counts of the documents so far.

    Args:
        documents: number of documents.
        subjects: documents that mention each subject.
        answers: documents that mention each answer.
        pairs: documents that mention both texts of each pair.
    """

    documents: int
    subjects: list[int]
    answers: list[int]
    pairs: list[int]

    def add(self, block: BlockCounts) -> None:
        """Add the documents of a block."""
        documents, *counts = block
        self.documents += documents
        for mine, more in zip((self.subjects, self.answers, self.pairs), counts, strict=True):
            for place, n in more.items():
                mine[place] += n


BlockCounts = tuple[int, Counter[int], Counter[int], Counter[int]]
"""Number of documents in a block, and the documents that mention each subject, answer and pair."""


class Finder:
    """Finds all patterns in one pass over a text.

    Args:
        patterns: the texts to look for.
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

    def count(self, documents: Sequence[str]) -> BlockCounts:
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
        mentioned: set[int] = set()
        for end, word in self._automaton.iter(text):
            if word not in mentioned and not _in_word(text[end + 1]) and not _in_word(text[end - self._lengths[word]]):
                mentioned.add(word)
        return mentioned


def count_mentions(
    corpus: str,
    examples: Sequence[Example],
    store: Store,
    *,
    workers: int = 1,
    on_progress: Callable[[int, int | None, int], None] | None = None,
) -> Mentions:
    """Count the documents that mention the subject, the answer, and both, of every example that names its subject.

    Case and the kind of white space do not matter. A mention has no letter or digit directly before or after it, so languages
    written without spaces have few mentions. The counts are stored in the results database. An interrupted count resumes. A
    finished count is reused while the corpus stays the same.

    Args:
        corpus: see ``laserlm.studies.corpora.open_corpus``.
        examples: the examples; those without a subject are left out.
        store: the results database.
        workers: processes that count; a script that asks for several must be importable (``if __name__ == "__main__":``).
        on_progress: called with the documents done, their total if it is known, and the documents read in this call.

    Raises:
        AnalysisError: if no example names a subject, or the corpus cannot be read or is empty.
        MissingExtraError: if pyahocorasick is not installed.
        RunBusyError: if another process counts the same at the moment.
    """
    if workers < 1:
        raise AnalysisError(f"cannot count with {workers} workers; write 1 or more workers")
    patterns, pair_of = _patterns(examples)
    _ahocorasick()
    source = open_corpus(corpus)
    identity = {"kind": "mentions", "corpus": source.identity, "patterns": digest(asdict(patterns)), "method": METHOD}
    settings = {"model": "corpus", "task": corpus, "pairs": len(patterns.pairs), **identity}
    origin = provenance(device="cpu", dtype="none")
    with store.run(kind="mentions", key=digest(identity), settings=settings, provenance=origin) as run:
        if run.outcome is None:
            tally = Tally(**run.notes["so far"]) if "so far" in run.notes else _empty_tally(patterns)
            begun, noted = tally.documents, time.monotonic()
            total = None if on_progress is None else source.count()
            with closing(_count_blocks(_blocks(source.documents(begun)), patterns, workers)) as blocks:
                for block in blocks:
                    tally.add(block)
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
    """Return a text with case, white space and the encoding of accents normalised."""
    text = text.casefold()
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def _in_word(character: str) -> bool:
    """Return whether a character is a letter, a digit, or a mark on one."""
    return character.isalnum() or (not character.isascii() and unicodedata.category(character).startswith("M"))


def _patterns(examples: Sequence[Example]) -> tuple[Patterns, dict[str, int]]:
    """Return the texts to look for, and the index of each example's pair by its id."""
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
    patterns = Patterns(tuple(subjects), tuple(answers), tuple(pairs))
    return patterns, {id_: pairs[subjects[s], answers[a]] for id_, (s, a) in of.items()}


def _empty_tally(patterns: Patterns) -> Tally:
    return Tally(0, [0] * len(patterns.subjects), [0] * len(patterns.answers), [0] * len(patterns.pairs))


def _blocks(documents: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document) + 1
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _count_blocks(blocks: Iterator[list[str]], patterns: Patterns, workers: int) -> Generator[BlockCounts, None, None]:
    """Yield the counts of each block, in order."""
    yield from map(Finder(patterns).count, islice(blocks, SERIAL_BLOCKS if workers > 1 else None))
    first = next(blocks, None)
    if first is None:
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start, initargs=(patterns,)) as pool:
        waiting: deque[Future[BlockCounts]] = deque()
        try:
            for block in chain([first], blocks):
                waiting.append(pool.submit(_count, block))
                if len(waiting) >= QUEUED_BLOCKS * workers:
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


def _count(block: list[str]) -> BlockCounts:
    assert _finder is not None
    return _finder.count(block)


def _ahocorasick() -> Any:
    try:
        return importlib.import_module("ahocorasick")
    except ImportError:
        raise MissingExtraError("counting mentions needs pyahocorasick; pip install 'laserlm[analysis]'") from None
