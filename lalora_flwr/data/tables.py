"""Tables of records from files or from the hub, through ``datasets``; nothing here knows what a column means."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Callable, Collection
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.features.features import FeatureType
from pyarrow.parquet import ParquetFile

from lalora_flwr.data.image_folder import class_folders, read_image_folder
from lalora_flwr.data.readers import READERS, TextForm, read_texts
from lalora_flwr.ground.cache import Stamp, stamp
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import expanded

PARQUET = ".parquet"
KINDS = (*READERS, PARQUET)
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "testing"), "validation": ("validation", "valid", "val", "dev")}


def from_files(key: str, pattern: str, form: TextForm | None = None) -> DatasetDict:
    """The splits of local files: a file, a glob, or a folder.

    A folder of files is split by their names (train…, test…, dev…; other names count as train), and so is a folder of
    image folders. Files that a pattern names are all ``train``.

    Args:
        key: the setting that named them, for errors.
        pattern: file, glob or folder; also one that `datasets` saved (``save_to_disk``).
        form: how text files are written; default: found out.

    Raises:
        ConfigError: nothing there, an unknown kind of file, or a file that cannot be read.
    """
    try:
        return _from_files(key, pattern, form)
    except ConfigError:
        raise
    except DatasetGenerationError as error:
        reason = str(error.__cause__ or error)
    except Exception as error:  # wrong encodings, no permission, truncated files: each reader raises its own
        reason = str(error)
    raise ConfigError(f"{key} = {pattern!r}: cannot be read: {_first_line(reason)}")


def saved_by_datasets(path: Path) -> bool:
    """Whether a folder is what ``save_to_disk`` of `datasets` writes."""
    return (path / "dataset_dict.json").is_file() or ((path / "state.json").is_file() and (path / "dataset_info.json").is_file())


def folder_of(pattern: str) -> Path:
    """The folder that relative paths inside the files are relative to: that of the files, up to the first wildcard."""
    path = expanded(pattern).absolute()
    if path.is_dir():
        return path
    return next((above for above in path.parents if above.is_dir()), path.parent)


def _from_files(key: str, pattern: str, form: TextForm | None) -> DatasetDict:
    path = expanded(pattern)
    if saved_by_datasets(path):
        saved = load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
    splits = table_files(path)
    if not splits and path.is_dir():
        return read_image_folder(path, split_named, in_order)
    if not splits:
        raise ConfigError(f"{key} = {pattern!r}: no such file or folder")
    kinds = {Path(file).suffix.lower() for files in splits.values() for file in files}
    if len(kinds) > 1 or not kinds <= set(KINDS):
        found = ", ".join(sorted(kind or "nameless" for kind in kinds))
        raise ConfigError(f"{key} = {pattern!r}: {found} files; must be of one kind of {', '.join(KINDS)}")
    parquet = kinds == {PARQUET}
    return DatasetDict({split: _parquet(own) if parquet else read_texts(own, form) for split, own in splits.items()})


def table_files(path: Path) -> dict[str, list[str]]:
    """The files of each split; none if the path is a folder without tables, or names nothing."""
    if not path.is_dir():
        files = [path] if path.is_file() else [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if Path(f).is_file()]
        return {"train": [str(f) for f in files]} if files else {}
    splits: dict[str, list[str]] = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in KINDS and not file.name.startswith(".") and file.is_file():
            splits.setdefault(_split_of(file.stem), []).append(str(file))
    return splits


def files_of(pattern: str, split: str, table: Dataset) -> set[Path]:
    """The files that hold the records of a split, however they were named.

    Args:
        pattern, split: what was read.
        table: its records; those of an image folder are the files.
    """
    if splits := table_files(expanded(pattern)):
        return {Path(file).resolve() for file in splits[split]}
    if saved_by_datasets(expanded(pattern)):
        return {file.resolve() for file in (expanded(pattern) / split).rglob("*.arrow")}
    images = table.cast_column("image", Image(decode=False))["image"]
    return {Path(image["path"]).resolve() for image in images}


def stamp_of_files(pattern: str) -> Stamp:
    """What changes when one of the files that a pattern names comes, goes or is written; of an image folder, its names.

    Never raises: what cannot be looked at has a stamp too.
    """
    path = expanded(pattern)
    try:
        if splits := table_files(path):
            return stamp(*(Path(file) for files in splits.values() for file in files))
        kinds = class_folders(path, split_named) if path.is_dir() else {}
        return stamp(path, *(kind for folders in kinds.values() for kind in folders))
    except OSError:
        return stamp(path)


def _split_of(stem: str) -> str:
    words = stem.lower().replace("-", "_").replace(".", "_").split("_")
    return split_named(words[0]) or "train"


def split_named(name: str) -> str:
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), "")


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Numbers by value, anything else by letter."""
    numbers = all(re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", name) for name in names)
    return tuple(sorted(names, key=lambda name: (float(name) if numbers else 0.0, name)))


def _parquet(files: list[str]) -> Dataset:
    classes: dict[str, list[str]] = {}
    kinds: dict[str, FeatureType] = {}  # the type of a column is that of the first file with it
    own = [Features.from_arrow_schema(ParquetFile(file).schema_arrow) for file in files]
    for name, kind in itertools.chain.from_iterable(features.items() for features in own):
        kinds.setdefault(name, kind)  # datasets would also take the names of its classes, for all files
        if isinstance(kind, ClassLabel) and classes.setdefault(name, kind.names) != kind.names:
            raise ValueError(f"the files differ in the classes of column {name!r}")
    return load_dataset("parquet", data_files=[glob.escape(file) for file in files], split="train")  # it takes them for patterns


def _first_line(reason: str) -> str:
    return next((line.strip() for line in reason.splitlines() if line.strip()), "unknown reason")


def from_hub(name: str, split: str, load: Callable[..., DatasetDict] = load_dataset) -> Dataset | None:
    """A split of a data set of the hub; None if the data set has no such split.

    Args:
        name: ``dataset``, ``owner/dataset`` or ``owner/dataset/config``, with ``@revision`` behind it if wanted.
        split: its name there.
        load: as ``datasets.load_dataset``.

    Raises:
        ConfigError: out of reach, unknown, or only loadable by running its own code.
    """
    path, _, revision = name.partition("@")
    parts = path.split("/")
    repository, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    options = {"revision": revision} if revision else {}
    try:
        return load(path=repository, name=config, **options).get(split)
    except Exception as error:  # no network, no such data set, a data set that is a script
        raise ConfigError(f"data.name = 'hub:{name}': cannot be loaded: {_first_line(str(error))}") from None
