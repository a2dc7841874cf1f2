"""The bundled facts about countries, cities and elements, in three phrasings each.

``scripts/build_worldfacts.py`` makes them. ``data/worldfacts.json`` has the sources and licences.
"""

from __future__ import annotations

import csv
import json
from importlib.resources import files

from laserlm.tasks.example import Example


def examples() -> list[Example]:
    """Return the facts, three phrasings each, in the order of the file."""
    data = files("laserlm.tasks") / "data"
    relations = json.loads((data / "worldfacts.json").read_text(encoding="utf-8"))["relations"]
    rows = csv.DictReader((data / "worldfacts.csv").read_text(encoding="utf-8").splitlines())
    return [
        Example(
            id=f"{row['id']}/{i}",
            prompt=(prompt := template.replace("{}", row["subject"]))[0].upper() + prompt[1:],
            answer=row["answer"],
            group=row["relation"],
            # "The capital of France is" and "Paris is the capital of" are one fact, which no split may separate.
            fact=" | ".join(sorted((row["subject"].lower(), row["answer"].lower()))),
            popularity=float(row["popularity"]) if row["popularity"] else None,
            subject=row["subject"],
        )
        for row in rows
        for i, template in enumerate(relations[row["relation"]]["templates"], start=1)
    ]


def source() -> str:
    """Return the sources of the facts, with the licence."""
    data = json.loads((files("laserlm.tasks") / "data" / "worldfacts.json").read_text(encoding="utf-8"))
    return f"{', '.join(s['name'] for s in data['sources'])}; {data['licence']}"
