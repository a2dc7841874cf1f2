"""The result of a finished search, for the commands that go on with it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from laserlm.searching import SearchResult


def search_result(run: str, store: str) -> SearchResult:
    """Return the result of a finished search in the store, by id, start of an id, or ``last``.

    Raises:
        StoreError: if there is no such search, or it is not finished.
    """
    from laserlm.errors import StoreError
    from laserlm.searching import SearchResult
    from laserlm.store.store import Store

    with Store.open(store, create=False) as results:
        info = results.find(run, kind="search")
    if info.outcome is None:
        raise StoreError(f"run {info.id} is {info.status}, not finished; finish it with the same 'laser search' first")
    result = SearchResult.from_dict(info.outcome)
    return replace(result, settings=result.settings or info.settings)
