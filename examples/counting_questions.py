"""Write a JSON Lines file of 1,000 questions of counting.

python counting_questions.py counting.jsonl
laser search bundled --task jsonl:counting.jsonl
"""

from __future__ import annotations

import json
import random
import sys

THINGS = (
    "a cup|a book|a lamp|a key|a spoon|a plate|a letter|a candle|a pen|a hat|a coin|a glove|a clock|a ring|a knife|a bottle|"
    "a map|a phone|a box|a bag|a fork|a ball|a stamp|a radio|a mirror|a brush|a bell|a basket|a rope|a stone"
).split("|")
PLACES = "On the table|In the drawer|On the shelf|In the bag|Under the bed|In the kitchen".split("|")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
N = 1000


def main(file: str) -> None:
    """Write the questions in a random order."""
    draw = random.Random(0)
    with open(file, "w", encoding="utf-8") as out:
        for _ in range(N):
            n = draw.randrange(len(NUMBERS)) + 2
            things, place = draw.sample(THINGS, n), draw.choice(PLACES)
            prompt = f"{place} there are {', '.join(things[:-1])} and {things[-1]}. The number of things there is"
            row = {"prompt": prompt, "choices": NUMBERS, "answer": NUMBERS[n - 2], "group": str(n)}
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
