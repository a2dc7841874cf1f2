"""Sample evaluations, and what a second process does with a results database.

Run as ``python worker.py COMMAND URL [ARGUMENT]``: it says ready once all is imported, and starts on a line of input.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from laserlm.errors import RunBusyError
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.store import Store
from laserlm.tasks.example import Example

EXAMPLES = tuple(
    Example(
        id=f"capital-{i}",
        prompt=f"The capital of country {i} is",
        answer=f"City {i}",
        choices=("yes", "no") if i % 2 else (),
        group="P36",
        fact=f"fact-{i // 2}",
        popularity=1 / (i + 1) if i % 3 else None,
    )
    for i in range(10)
)
SPLITS = ("validation", "test")


def evaluation(
    intervention: str = "", split: str = "validation", examples: Sequence[Example] = EXAMPLES, **changes: Any
) -> Evaluation:
    """Return an evaluation whose figures follow from the name of the intervention."""
    seed = sum(intervention.encode()) + 1
    scores = tuple(
        ExampleScore(e.id, (seed + i) % 3 == 0, -seed / (i + 0.7), i % 3 + 1, f"p{i}", e.answer, e.group, fact=e.fact)
        for i, e in enumerate(examples)
    )
    values: dict[str, Any] = {
        "model": "tiny",
        "task": "capitals",
        "split": split,
        "scorer": "answer",
        "intervention": intervention,
        "scores": scores,
        "seconds": seed / 7,
    }
    return Evaluation(**(values | changes))


def work(key: str = "work", **more: Any) -> dict[str, Any]:
    """Return the arguments of ``Store.run``."""
    return {
        "kind": "search",
        "key": key,
        "settings": {"model": "tiny", "task": "capitals", "rho": [0.1, 0.01]},
        "provenance": {"seed": 3},
    } | more


def kill_self() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(command: str, url: str, argument: str = "") -> None:
    """Do what the test asks for."""
    print("ready", flush=True)
    sys.stdin.readline()
    with Store.open(url) as store:
        if command == "open":
            return
        try:
            with store.run(**work(argument or "work")) as run:
                if command == "claim":
                    print("claimed", flush=True)
                    sys.stdin.readline()
                if command == "trials":
                    for i in range(30):
                        run.record(evaluation(f"{argument}-{i}"), EXAMPLES)
                if command == "two":
                    run.record(evaluation(""), EXAMPLES)
                    run.record(evaluation("3.fc_in@0.1"), EXAMPLES)
                    kill_self()
                if command == "half":
                    run.record(evaluation("whole"), EXAMPLES)
                    event.listen(Session, "before_commit", lambda session: kill_self())
                    run.record(evaluation("half"), EXAMPLES)
                if command == "endless":
                    i = 0
                    while True:
                        if run.evaluation("validation", str(i)) is None:
                            run.record(evaluation(str(i)), EXAMPLES)
                            print(i, flush=True)
                        i += 1
                run.finish({"by": os.getpid()})
        except RunBusyError:
            print("busy", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
