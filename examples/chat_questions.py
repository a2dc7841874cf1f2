"""Write a CSV file of 800 questions for a chat model, made of the facts that come with laserlm.

python chat_questions.py qa.csv
laser search bundled --task qa.csv --scorer contains
"""

from __future__ import annotations

import csv
import random
import sys

import laserlm

QUESTIONS = {
    "country_capital": "What is the capital of {}?",
    "country_continent": "On which continent is {}?",
    "country_language": "What is the official language of {}?",
    "country_largest_city": "What is the largest city in {}?",
    "city_country": "In which country is the city of {}?",
    "us_city_state": "In which U.S. state is {}?",
    "element_symbol": "What is the chemical symbol for {}?",
    "symbol_element": "Which chemical element has the symbol {}?",
}
N = 800


def main(file: str) -> None:
    """Write the questions in a random order."""
    facts = laserlm.task("worldfacts", phrasings="rewrite").every
    asked = [e for e in facts if e.group in QUESTIONS]
    chosen = random.Random(0).sample(asked, N)
    with open(file, "w", encoding="utf-8", newline="") as out:
        table = csv.writer(out)
        table.writerow(("question", "answer", "group"))
        table.writerows((QUESTIONS[e.group].format(e.subject), e.answer, e.group) for e in chosen)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
