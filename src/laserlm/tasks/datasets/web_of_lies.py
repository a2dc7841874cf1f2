"""Web of lies: who tells the truth, if each person says whether the one before lies? laserlm makes these questions."""

from __future__ import annotations

import random
from itertools import pairwise

from laserlm.tasks.example import Example

NAMES = (
    "Abel Agnes Alma Amos Astrid Basil Bruno Carla Celia Clara Dalia Dora Edgar Edith Elias Ella Emil Enid Ezra Fabian "
    "Fiona Gideon Greta Hanna Hector Hilda Hugo Ida Igor Irma Ivan Jonas Julia Karl Klara Lars Leona Linus Mabel Magnus "
    "Marta Milo Nadia Nora Olaf Olga Oscar Otto Paula Petra Quentin Rita Rosa Rufus Selma Silas Sonja Stella Tessa Theo "
    "Ulla Vera Viktor Wanda"
).split()
N_EXAMPLES = 1000
N_PEOPLE = 5


def examples() -> list[Example]:
    """Return questions about five people each. They are always the same, and half of the answers are yes."""
    rows: list[Example] = []
    draw = random.Random(0)
    while len(rows) < N_EXAMPLES:
        people = draw.sample(NAMES, N_PEOPLE)
        honest = draw.random() < 0.5
        statements = [f"{people[0]} {'tells the truth' if honest else 'lies'}."]
        for before, person in pairwise(people):
            says_honest = draw.random() < 0.5
            statements.append(f"{person} says {before} {'tells the truth' if says_honest else 'lies'}.")
            honest = says_honest == honest
        wanted = len(rows) % 2 == 0
        if honest == wanted:
            rows.append(
                Example(
                    id=str(len(rows) + 1),
                    prompt=f"Question: {' '.join(statements)} Does {people[-1]} tell the truth? Answer:",
                    answer="Yes" if honest else "No",
                    choices=("Yes", "No"),
                )
            )
    return rows
