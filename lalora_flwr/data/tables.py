"""Tables of records from files or from the hub, through ``datasets``; nothing here knows what a column means."""

from __future__ import annotations

import csv
import glob
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

from lalora_flwr.errors import ConfigError

# Only an empty field is a missing value: the words "null", "NA" and "nan" are text that people write.
_PLAIN: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _PLAIN),
    ".tsv": ("csv", {**_PLAIN, "sep": "\t", "quoting": csv.QUOTE_NONE}),  # as GLUE and the IANA type: a quote is a character
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "testing"), "validation": ("validation", "valid", "val", "dev")}


def from_files(key: str, pattern: str, *, private: bool = False) -> DatasetDict:
    """The splits of local files: a file, a glob, or a folder.

    A folder of files is split by their names (train…, test…, dev…; other names count as train), and so is a folder of
    image folders. Files that a pattern names are all ``train``.

    Args:
        key: the setting that named them, for errors.
        pattern: file, glob or folder.
        private: leave no copy of the records in ``datasets``' cache on disk (they are kept in memory).

    Raises:
        ConfigError: nothing there, an unknown kind of file, or a file that cannot be read.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in READERS and not f.name.startswith("."))
        if not files:
            return _load(key, pattern, "imagefolder", private, data_dir=str(path))
        splits: dict[str, list[str]] = {}
        for file in files:
            splits.setdefault(_split_of(file.stem), []).append(str(file))
    else:
        files = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if Path(f).is_file()]
        splits = {"train": [str(f) for f in files]}
    if not files:
        raise ConfigError(f"{key} = {pattern!r}: no such file or folder")
    kinds = {f.suffix for f in files}
    if len(kinds) > 1 or not kinds <= set(READERS):
        raise ConfigError(f"{key} = {pattern!r}: {', '.join(sorted(kinds))} files; must be of one kind of {', '.join(READERS)}")
    reader, options = READERS[kinds.pop()]
    return _load(key, pattern, reader, private, data_files=splits, **options)


def _split_of(stem: str) -> str:
    words = stem.lower().replace("-", "_").replace(".", "_").split("_")
    return next((split for split, names in SPLIT_NAMES.items() if words[0] in names), "train")


def _load(key: str, pattern: str, reader: str, private: bool, **options: Any) -> DatasetDict:
    try:
        if not private:
            return load_dataset(reader, **options)
        with tempfile.TemporaryDirectory(prefix="lalora-") as scratch:
            return load_dataset(reader, **options, cache_dir=scratch, keep_in_memory=True)
    except DatasetGenerationError as error:
        reason = str(error.__cause__ or error)
    except Exception as error:  # empty folders, wrong encodings: each reader raises its own
        reason = str(error)
    raise ConfigError(f"{key} = {pattern!r}: cannot be read: {reason.splitlines()[0] if reason else 'unknown reason'}")


def from_hub(name: str, split: str) -> Dataset | None:
    """A split of a data set of the hub, through Flower Datasets; None if the data set has no such split.

    Args:
        name: ``dataset``, ``owner/dataset`` or ``owner/dataset/config``, with ``@revision`` behind it if wanted.
        split: its name there.

    Raises:
        ConfigError: out of reach, unknown, or only loadable by running its own code.
    """
    from flwr_datasets import FederatedDataset

    path, _, revision = name.partition("@")
    parts = path.split("/")
    repository, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        data = FederatedDataset(dataset=repository, subset=config, partitioners={}, shuffle=False, **options)
        return data.load_split(split)
    except ValueError as error:
        if "split" in str(error).lower():
            return None
        reason = str(error)
    except Exception as error:  # no network, no such data set, a data set that is a script
        reason = str(error)
    raise ConfigError(f"data.name = 'hub:{name}': cannot be loaded: {reason.splitlines()[0] if reason else 'unknown reason'}")
