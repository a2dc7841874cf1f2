from __future__ import annotations

import gzip
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from laserlm.errors import AnalysisError, MissingExtraError
from laserlm.jsonable import to_json
from laserlm.store import Store
from laserlm.studies import mentions
from laserlm.studies.corpora import open_corpus, texts_of
from laserlm.studies.mentions import Mentions, count_mentions, folded
from laserlm.tasks import Example, task

PARIS = Example("paris", "The capital of France is", "Paris", subject="France")
ROME = Example("rome", "The capital of Italy is", "Rome", subject="Italy", aliases=("Roma", "the Eternal City"))
DOCUMENTS = [
    "Paris is in France. France is large.",  # a document counts once
    "FRANCE and italy; Roma.",
    "Parisian Francely: Romeo, 2Paris, France2",
    "the eternal\n  city, and Rome",
    "",
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "runs.db") as store:
        yield store


def write(file: Path, documents: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return str(file)


def counts(matches: Mentions, id_: str) -> tuple[int, int, int]:
    return matches.subject[id_], matches.answer[id_], matches.both[id_]


def test_counts_worked_out_by_hand(store: Store, tmp_path: Path) -> None:
    result = count_mentions(write(tmp_path / "c.jsonl", DOCUMENTS), [PARIS, ROME], store)
    assert result.documents == 5
    assert counts(result, "paris") == (2, 1, 1)
    assert counts(result, "rome") == (1, 2, 1)  # an alias is the answer, and two of them in one document are one mention
    assert to_json(result)["both"] == {"paris": 1, "rome": 1}


@pytest.mark.parametrize(
    ("text", "mentioned"),
    [
        ("Côte d'Ivoire", True),
        ("CÔTE D'IVOIRE's", True),
        ("Co\u0302te d'Ivoire", True),  # the same letters, encoded in another way
        ("(Côte\u00a0d'Ivoire)", True),
        ("_Côte d'Ivoire_", True),
        ("aCôte d'Ivoire", False),
        ("Côte d'Ivoire7", False),
        ("Côte d'Ivoire\u0316", False),  # a mark makes it another letter
        ("Cote d'Ivoire", False),
        ("Côte d'", False),
    ],
)
def test_a_mention_is_alone_in_any_case(store: Store, tmp_path: Path, text: str, mentioned: bool) -> None:
    example = Example("1", "p", "Yamoussoukro", subject="Côte d'Ivoire")
    assert count_mentions(write(tmp_path / "c.jsonl", [text]), [example], store).subject["1"] == mentioned


def test_counts_are_those_of_a_search_for_each_pattern_alone(store: Store, tmp_path: Path) -> None:
    source = random.Random(1)
    letters = ["a", "b", "A", "é", "1", " ", " ", "\n", "-", "."]
    texts = ["".join(source.choices(letters, k=source.randrange(60))) for _ in range(400)]
    words = ["a", "b", "ab", "a b", "ba", "é", "aé", "1", "b-a", "a1", "aa", "a.b"]
    examples = [
        Example(str(i), "p", source.choice(words), aliases=tuple(source.sample(words, i % 3)), subject=source.choice(words))
        for i in range(60)
    ]
    result = count_mentions(write(tmp_path / "c.jsonl", texts), examples, store)

    def holds(text: str, word: str) -> bool:
        pattern = re.escape(word).replace(r"\ ", r"\s+")
        return re.search(rf"(?<![^\W_]){pattern}(?![^\W_])", text, re.IGNORECASE) is not None

    for e in examples:
        subject = [holds(text, e.subject) for text in texts]
        answer = [any(holds(text, a) for a in (e.answer, *e.aliases)) for text in texts]
        both = sum(s and a for s, a in zip(subject, answer, strict=True))
        assert counts(result, e.id) == (sum(subject), sum(answer), both)
    assert len({result.both[e.id] for e in examples}) > 10


@pytest.mark.slow
def test_several_processes_count_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mentions, "BLOCK_CHARACTERS", 200)
    monkeypatch.setattr(mentions, "SERIAL_BLOCKS", 4)
    corpus = write(tmp_path / "c.jsonl", [f"{text} {i}" for i in range(60) for text in DOCUMENTS])
    results = []
    for workers in (1, 2):
        done: list[tuple[int, int | None, int]] = []
        with Store.open(tmp_path / f"{workers}.db") as store:

            def on_progress(*values: int | None, done: list[tuple[int, int | None, int]] = done) -> None:
                done.append(values)  # type: ignore[arg-type]

            results.append(count_mentions(corpus, [PARIS, ROME], store, workers=workers, on_progress=on_progress))
        assert done[-1] == (300, 300, 300)
        assert done == sorted(done)  # in the order of the corpus
    assert results[0] == results[1]
    assert counts(results[0], "paris") == (120, 60, 60)


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_an_interrupted_count_goes_on_and_counts_nothing_twice(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(mentions, "BLOCK_CHARACTERS", 1)
    monkeypatch.setattr(mentions, "NOTE_SECONDS", 0.0)
    texts = [f"France {i}" + " and Paris" * (i % 3 == 0) for i in range(20)]
    corpus = write(tmp_path / "c.jsonl", texts)
    if ending == "txt":
        corpus = str(tmp_path / "c.txt")
        Path(corpus).write_text("\n\n".join(texts))

    class Stop(Exception):
        pass

    def stop_at(n: int) -> None:
        def on_progress(done: int, total: int | None, read: int) -> None:
            assert total == 20
            if done == n:
                raise Stop

        with pytest.raises(Stop):
            count_mentions(corpus, [PARIS], store, on_progress=on_progress)

    stop_at(7)
    (run,) = store.runs()
    assert (run.kind, run.status, run.task) == ("mentions", "failed", corpus)
    stop_at(12)
    read: list[int] = []
    result = count_mentions(corpus, [PARIS], store, on_progress=lambda done, total, now: read.append(now))
    assert read == list(range(1, 9))  # 12 were done
    assert counts(result, "paris") == (20, 7, 7)
    assert [r.id for r in store.runs()] == [run.id]
    # What is finished is not counted again.
    again = count_mentions(corpus, [PARIS], store, on_progress=lambda *_: pytest.fail("it reads again"))
    assert again == result


def test_a_count_is_of_its_patterns_and_of_the_corpus_as_it_is(store: Store, tmp_path: Path) -> None:
    corpus = write(tmp_path / "c.jsonl", DOCUMENTS)
    first = count_mentions(corpus, [PARIS, ROME], store)
    assert count_mentions(corpus, [ROME, PARIS], store) == first  # in any order
    assert len(store.runs()) == 1
    assert count_mentions(corpus, [ROME], store).both == {"rome": 1}
    assert len(store.runs()) == 2
    # Other ids of the same patterns need no new count.
    renamed = Example("other", "p", "rome", subject="ITALY", aliases=("the eternal city", "roma"))
    assert count_mentions(corpus, [renamed], store).both == {"other": 1}
    assert len(store.runs()) == 2
    write(tmp_path / "c.jsonl", [*DOCUMENTS, "Rome, Italy"])
    assert count_mentions(corpus, [ROME], store).both == {"rome": 2}
    stat = os.stat(corpus)
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    count_mentions(corpus, [ROME], store)
    assert len(store.runs()) == 4


def test_a_corpus_is_a_folder_or_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffone\n\nstill one".encode())
    (folder / "below" / "b.MD").write_text("two")
    (folder / "c.jsonl").write_text('{"text": "three"}\n\n{"text": ""}\n')
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five", "more": 1}'))
    (folder / "e.csv").write_text("no,document")
    full = open_corpus(str(folder))
    assert list(full.documents()) == ["one\n\nstill one", "two", "three", "", "five"]
    assert full.count() == 5
    for start in range(6):
        assert list(full.documents(start)) == list(full.documents())[start:]
    assert list(open_corpus(str(folder / "a.txt")).documents()) == ["one\n", "still one"]
    assert list(open_corpus(str(folder / "d.jsonl.gz")).documents()) == ["five"]
    paragraphs = tmp_path / "p.txt"
    paragraphs.write_bytes(b"\n \nx\r\ny\r\n \t\r\n\r\nz\n\n")
    assert [folded(text) for text in open_corpus(str(paragraphs)).documents()] == ["x y", "z"]


def test_what_is_done_is_left_out_without_being_decoded(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('not JSON\n{"text": "second"}\n')
    assert list(open_corpus(str(corpus)).documents(1)) == ["second"]


def test_a_streamed_data_set(store: Store, tmp_path: Path) -> None:
    from datasets import load_dataset

    folder = tmp_path / "set"
    folder.mkdir()
    file = write(folder / "train.jsonl", DOCUMENTS)
    rows = load_dataset("json", data_files=file, split="train", streaming=True)
    assert list(texts_of(rows, "set")) == DOCUMENTS
    assert list(texts_of(rows, "set", 3)) == DOCUMENTS[3:]
    corpus = open_corpus(f"hub:{folder}")
    assert list(corpus.documents(2)) == DOCUMENTS[2:]
    assert corpus.count() is None  # files tell no number of rows
    assert corpus.identity == open_corpus(f"hub:{folder}::train").identity
    messages: list[int | None] = []
    result = count_mentions(f"hub:{folder}", [PARIS], store, on_progress=lambda done, total, now: messages.append(total))
    assert counts(result, "paris") == (2, 1, 1)
    assert messages == [None]
    write(folder / "train.jsonl", [*DOCUMENTS, "one more"])
    assert open_corpus(f"hub:{folder}").identity != corpus.identity
    with pytest.raises(AnalysisError, match="'valid'"):
        list(open_corpus(f"hub:{folder}::valid").documents())
    (folder / "train.jsonl").write_text('{"body": "France"}\n')
    with pytest.raises(AnalysisError, match="row 1: the field 'text' must be a text, got an object with body"):
        list(open_corpus(f"hub:{folder}").documents())


def test_a_stream_that_breaks_off_says_how_to_go_on() -> None:
    class Rows:
        def __iter__(self) -> Iterator[dict[str, str]]:
            yield {"text": "one"}
            raise ConnectionError("gone")

    texts = texts_of(Rows(), "set")
    assert next(texts) == "one"
    with pytest.raises(AnalysisError, match="broke off: gone; start the same again"):
        next(texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", b'{"text": "a"}\n{"words": "b"}', r"c.jsonl, line 2: the field 'text' must be a text, got an object with"),
        ("c.jsonl", b'{"text": 3}', "line 1: the field 'text'"),
        ("c.jsonl", b'["text"]', r"line 1: the field 'text' must be a text, got \['text'\]"),
        ("c.jsonl", b"\ntext", "line 2: not valid JSON"),
        ("c.jsonl", b'{"text": "\xff"}', "line 1: not UTF-8 text"),
        ("c.txt", b"fine\n\n\xff\n\n", "before line 4: not UTF-8 text"),
        ("c.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-4], "cannot be unpacked"),
        ("c.txt", b"\n \n", "holds no document"),
        ("c.csv", b"a", r"is no corpus; give a file that ends in .txt, .md, .jsonl"),
    ],
)
def test_what_is_no_corpus_is_reported(store: Store, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AnalysisError, match=message):
        count_mentions(str(tmp_path / name), [PARIS], store)


@pytest.mark.parametrize(
    ("corpus", "message"), [("nowhere.txt", "no corpus"), ("hub:", "write hub:NAME"), ("hub:/no/such", "cannot reach")]
)
def test_a_corpus_that_is_not_there_is_reported(store: Store, corpus: str, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        count_mentions(corpus, [PARIS], store)


def test_a_folder_without_documents_and_no_workers_are_reported(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnalysisError, match="no file below"):
        count_mentions(str(tmp_path / "empty"), [PARIS], store)
    with pytest.raises(AnalysisError, match="0 workers"):
        count_mentions(str(tmp_path), [PARIS], store, workers=0)


def test_examples_without_a_subject_are_left_out_or_reported(store: Store, tmp_path: Path) -> None:
    corpus = write(tmp_path / "c.jsonl", DOCUMENTS)
    bare = Example("bare", "p", "Paris", subject=" ")
    assert count_mentions(corpus, [bare, PARIS], store).both == {"paris": 1}
    with pytest.raises(AnalysisError, match="no example names its subject"):
        count_mentions(corpus, [bare], store)


def test_a_package_that_is_missing_is_named(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ahocorasick", None)
    with pytest.raises(MissingExtraError, match=r"laserlm\[analysis\]"):
        count_mentions(write(tmp_path / "c.jsonl", DOCUMENTS), [PARIS], store)


@pytest.mark.realdata
def test_real_facts_in_a_real_text(store: Store, real_data: Path) -> None:
    facts = [e for e in task("counterfact", data=real_data).every if e.id.endswith("/rewrite")][:300]
    result = count_mentions(str(real_data / "wikitext2" / "test.txt"), facts, store)
    assert len(result.both) == 300
    assert result.documents > 1000
    for e in facts:
        assert result.both[e.id] <= min(result.subject[e.id], result.answer[e.id])
    assert 0 < max(result.both.values()) < max(result.answer.values())
