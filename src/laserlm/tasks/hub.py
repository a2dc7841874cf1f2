"""Read data sets of the hub through the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from laserlm.errors import TaskError
from laserlm.tasks.files import Record

__all__ = ["Hub", "hub_records"]


@dataclass(frozen=True)
class Hub:
    """A data set on the hub.

    Args:
        path: the id of the data set, or a folder with the same layout.
        revision: the commit to read.
        splits: splits to read, in this order.
        name: configuration, or None.
        files: the file of each split, if the data set does not name it.
    """

    path: str
    revision: str | None
    splits: tuple[str, ...]
    name: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)


def hub_records(hub: Hub) -> list[list[Record]]:
    """Read each split of a data set. The ``datasets`` library keeps downloads in its cache.

    Raises:
        TaskError: if it cannot be downloaded or read.
    """
    from datasets import load_dataset

    tables: list[list[Record]] = []
    for split in hub.splits:
        try:
            rows = load_dataset(hub.path, hub.name, split=split, revision=hub.revision, data_files=dict(hub.files) or None)
        # The library raises any of these if the hub, a split or a file cannot be reached.
        except (OSError, ValueError, LookupError, RuntimeError) as error:
            raise TaskError(
                f"cannot read {hub.path} ({split}) from the hub: {error}. Fetch the published file and give it with --data "
                "(data=...)."
            ) from error
        tables.append([(f"{hub.path}, {split}, row {number}", dict(row)) for number, row in enumerate(rows, start=1)])
    return tables
