from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import laserlm


def modules() -> list[str]:
    return sorted(m.name for m in pkgutil.walk_packages(laserlm.__path__, "laserlm.") if ".migrations" not in m.name)


def test_all_is_sorted_and_every_name_in_it_is_there() -> None:
    assert laserlm.__all__ == sorted(laserlm.__all__)
    assert set(laserlm.__all__) <= set(dir(laserlm))
    for name in laserlm.__all__:
        assert getattr(laserlm, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = laserlm.nothing


@pytest.mark.parametrize("name", modules())
def test_every_module_documents_what_it_offers(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public, value in vars(module).items():
        if not public.startswith("_") and getattr(value, "__module__", "") == name and callable(value):
            assert value.__doc__, f"{name}.{public}"


def test_no_submodule_hides_a_public_function() -> None:
    # Importing laserlm.search would make it an attribute of the package, in the place of the function.
    assert not {m.name for m in pkgutil.iter_modules(laserlm.__path__)} & set(laserlm.__all__)


def test_a_name_of_the_first_version_is_still_found() -> None:
    with pytest.warns(DeprecationWarning, match=r"laserlm\.Found is now laserlm\.SearchResult"):
        assert laserlm.Found is laserlm.SearchResult


def test_the_functions_that_the_guide_for_contributors_names_are_there() -> None:
    package = Path(str(laserlm.__file__)).parent
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)`\s+`(\w+)`", guide)
    assert len(named) > 14
    for file, name in named:
        assert re.search(rf"^ *def {name}\(", (package / file).read_text(encoding="utf-8"), re.MULTILINE), f"{file} {name}"
