"""Put known faults into copies of the source, one at a time, and tell which test catches each of them.

    .venv/bin/python scripts/inject_faults.py --tier quick
    .venv/bin/python scripts/inject_faults.py --tier full --only "rank is one too small" --json faults.json

The faults are in ``faults.toml``. Each is put into a copy of ``src``; the files of the tree stay as they are. The tests of
the tree then run on the copy until one fails: those that the fault names first, the rest of the tier with ``--everything``.
At the end the tests that failed run once more on a copy without a fault, where they have to pass.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("faults.toml")
TIMEOUT = 300.0
"""Seconds of one run of pytest; a fault that makes the tests take longer is caught by that."""
TIERS = {"quick": (("quick", "not slow"),), "full": (("quick", "not slow"), ("full", "slow"))}
"""For each tier the markers that it runs, one after another, and the tier that these tests belong to."""
PASSED, FAILED, INTERRUPTED, NO_TESTS = 0, 1, 2, 5
"""Exit statuses of pytest; every other one is an error of the run itself."""
PLUGIN = """
import importlib.util
from pathlib import Path

import pytest


def pytest_configure():
    at = importlib.util.find_spec("laserlm").origin
    if Path(at).parent.parent != Path(__file__).parent:
        raise pytest.UsageError(f"the tests would run on {at}, not on the copy")
"""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: what is wrong, in plain English.
        file: the file it is in, below ``src/laserlm``.
        old: text that occurs exactly once in the file.
        new: what stands in its place.
        tests: files, folders or single tests that are likely to catch it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def put_into(self, source: str) -> str:
        """Return the text of the file with the fault.

        Raises:
            ValueError: if the old text does not occur exactly once, or nothing changes.
        """
        if self.old == self.new or (times := source.count(self.old)) != 1:
            problem = "the new text is the old one" if self.old == self.new else f"its old text occurs {times} times"
            raise ValueError(f"fault {self.name!r} does not apply to {self.file}: {problem}; correct {TABLE.name}")
        return source.replace(self.old, self.new)


@dataclass(frozen=True)
class Result:
    """What became of a fault.

    Args:
        fault: its name.
        file: the file it was in.
        caught_by: id of the first test that failed, ``timeout``, or empty where no test failed.
        tier: the tier of that test; empty with ``--marker``.
        seconds: wall time.
    """

    fault: str
    file: str
    caught_by: str
    tier: str
    seconds: float

    def __str__(self) -> str:
        by = self.caught_by.replace("|", "\\|")
        caught = f"`{by}`" if by else "**not caught**"
        return f"| {self.fault} | {self.file} | {caught} | {self.tier} |"


def faults() -> list[Fault]:
    """Return all faults of the table."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["fault"]
    return [Fault(row["name"], row["file"], row["old"], row["new"], tuple(row["tests"])) for row in rows]


@contextmanager
def copied(tree: Path, fault: Fault | None) -> Iterator[Path]:
    """Copy the source of a tree, with a fault or without one; yield the folder and delete it at the end."""
    with tempfile.TemporaryDirectory(prefix="fault-") as temporary:
        folder = Path(temporary).resolve() / "src"
        shutil.copytree(tree / "src", folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "inside_fault.py").write_text(PLUGIN, encoding="utf-8")
        if fault is not None:
            file = folder / "laserlm" / fault.file
            file.write_text(fault.put_into(file.read_text(encoding="utf-8")), encoding="utf-8")
        yield folder


def run_tests(tree: Path, source: Path, arguments: Sequence[str], timeout: float = TIMEOUT) -> list[str]:
    """Run tests of a tree on a copy of its source; return the ids of those that failed, or ``timeout``.

    Raises:
        SystemExit: if pytest cannot run them, or would not run them on the copy.
    """
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "inside_fault", *arguments]
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return ["timeout"]
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that the tests started
    failed = [line.split(" ", 1)[1].partition(" - ")[0] for line in out.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if process.returncode in (PASSED, NO_TESTS) or (process.returncode in (FAILED, INTERRUPTED) and failed):
        return failed
    raise SystemExit(f"pytest ended with status {process.returncode}: {' '.join(command)}\n{out[-3000:]}")


def inject(tree: Path, fault: Fault, markers: Sequence[tuple[str, str]], *, everything: bool) -> Result:
    """Put a fault into a copy, and run tests on it until one fails."""
    start = time.monotonic()
    named = [test for test in fault.tests if (tree / test.partition("::")[0]).exists()]
    selections = [named] if named else []
    if everything:
        selections.append(["tests", *(f"--deselect={test}" for test in named)])
    with copied(tree, fault) as source:
        for selection in selections:
            for tier, marker in markers:
                failed = run_tests(tree, source, ["-x", *(["-m", marker] if marker else []), *selection])
                if failed:
                    return Result(fault.name, fault.file, failed[0], tier, time.monotonic() - start)
    return Result(fault.name, fault.file, "", "", time.monotonic() - start)


def check_without_fault(tree: Path, results: Sequence[Result]) -> None:
    """Raise SystemExit where a test that caught a fault fails without any fault too, and so proves nothing."""
    ids = sorted({r.caught_by for r in results if "::" in r.caught_by})
    if ids:
        with copied(tree, None) as source:
            failed = run_tests(tree, source, ids, timeout=4 * TIMEOUT)
        if failed:
            raise SystemExit(f"these fail without a fault too, so they catch nothing: {', '.join(failed)}")


def main() -> None:
    """Read the arguments, try the faults one after another and print the table; end with status 1 if one is not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=TIERS, default="quick", help="tests to run: make test, or make test-all")
    parser.add_argument("--marker", help="run the tests of this marker instead, or all with an empty one")
    parser.add_argument("--tree", type=Path, default=TABLE.parents[1], help="the project, or another version of it")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="try this fault alone; may be repeated")
    parser.add_argument("--everything", action="store_true", help="run the rest of the tier where no named test fails")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copy and what runs on it go with this process
    tree: Path = given.tree.resolve()
    chosen = [fault for fault in faults() if not given.only or fault.name in given.only]
    if missing := set(given.only) - {fault.name for fault in chosen}:
        raise SystemExit(f"no fault is named {', '.join(sorted(missing))}; see {TABLE}")
    for fault in chosen:
        fault.put_into((tree / "src" / "laserlm" / fault.file).read_text(encoding="utf-8"))
    markers = TIERS[given.tier] if given.marker is None else (("", given.marker),)
    print("| fault | file | caught by | tier |\n|---|---|---|---|", flush=True)
    results: list[Result] = []
    for fault in chosen:
        results.append(inject(tree, fault, markers, everything=given.everything))
        print(results[-1], flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n", encoding="utf-8")
    check_without_fault(tree, results)
    lost = sum(not r.caught_by for r in results)
    print(f"\n{len(results) - lost} of {len(results)} faults are caught, in {sum(r.seconds for r in results):.0f} seconds")
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
