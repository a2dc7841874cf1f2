"""Read data sets of the hub through the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from laserlm.errors import TaskError
from laserlm.tasks.files import DATA_SET_FILES, Record


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


def _first_split(names: Sequence[str]) -> str:
    return next((name for name in ("test", "validation", "train") if name in names), names[0])


def user_records(path: str, *, split: str | None, config: str | None, revision: str | None) -> tuple[str, list[Record]]:
    """Read one split of a user's data set: the named one, or the first of test, validation and train that there is.

    Returns:
        The split's name, and its rows. Class labels are names.

    Raises:
        TaskError: if it cannot be downloaded or read.
    """
    from datasets import ClassLabel, DatasetDict, get_dataset_split_names, load_dataset, load_from_disk

    try:
        if any((Path(path).expanduser() / name).is_file() for name in DATA_SET_FILES):
            saved = load_from_disk(str(Path(path).expanduser()))
            splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
            split = split or _first_split(list(splits))
            rows = splits[split]
        else:
            split = split or _first_split(get_dataset_split_names(path, config, revision=revision))
            rows = load_dataset(path, config, split=split, revision=revision)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise TaskError(
            f"cannot read {path} from the hub: {error}. See --hub-split, --hub-config and --hub-revision (hub=...), or give "
            "a file."
        ) from error
    labels = {name: feature for name, feature in rows.features.items() if isinstance(feature, ClassLabel)}
    named = (row | {n: f.int2str(row[n]) for n, f in labels.items() if row[n] is not None and row[n] >= 0} for row in rows)
    return split, [(f"{path}, {split}, row {number}", row) for number, row in enumerate(named, start=1)]
