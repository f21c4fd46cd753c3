"""The tables that ``data.name`` and ``data.test`` name: splits of local files or of a data set of the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from datasets import Dataset

from lalora_flwr.data.readers import TextForm
from lalora_flwr.data.tables import files_of, folder_of, from_files, from_hub
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import DataSettings

ReadFiles = Callable[[str, str], Mapping[str, Dataset]]  # the setting and its file, glob or folder -> splits
ReadHub = Callable[[str, str], Dataset | None]  # name and split -> the records, if there is such a split


class StoredTables:
    """Private and public tables of ``hub:…`` and ``file:…``; files are read once."""

    labels: tuple[str, ...] = ()  # they have no other names than those in the tables

    def __init__(self, settings: DataSettings, read_files: ReadFiles | None = None, read_hub: ReadHub = from_hub) -> None:
        form = TextForm(settings.encoding, settings.separator)
        self._settings, self._read_hub = settings, read_hub
        self._read_files = read_files or (lambda key, pattern: from_files(key, pattern, form))
        self._read: dict[str, Mapping[str, Dataset]] = {}  # by the setting that names the files
        self.folder = _folder(settings.name)

    def private(self) -> Dataset:
        """The private table.

        Raises:
            ConfigError: it cannot be read, or there is no such split.
        """
        table = self._split(self._settings.split)
        if table is None:
            raise ConfigError(f"data.split = {self._settings.split!r}: {self._settings.name} has no such split")
        return table

    def public(self) -> tuple[Dataset, Path | None]:
        """The table of the server's records, and where relative paths in it start.

        Raises:
            ConfigError: it cannot be read, there is none, or its records are the private ones.
        """
        settings = self._settings
        kind, _, name = settings.test.partition(":")
        table: Dataset | None = None
        if kind == "file":
            splits = self._files("data.test", name)
            split = next((split for split in ("test", "validation") if split in splits), next(iter(splits)))
            table, source, wanted = splits[split], settings.test, [split]
            private_again = self._same_files(name, split, table)
        else:
            source = settings.name
            wanted = [name] if name else [split for split in ("test", "validation") if split != settings.split]
            for split in wanted:
                table = self._split(split) if table is None else table
            private_again = settings.split in wanted
        if private_again:
            raise ConfigError(f"data.test = {settings.test!r}: these are the private records; take hold-out:0.1 of them")
        if table is None:
            raise ConfigError(
                f"data.test = {settings.test!r}: {settings.name} has no split for it; name one with split:<name>, files with "
                "file:<path>, or take hold-out:0.1 of the private records"
            )
        return table, _folder(source)

    def _split(self, split: str) -> Dataset | None:
        kind, _, name = self._settings.name.partition(":")
        return self._read_hub(name, split) if kind == "hub" else self._files("data.name", name).get(split)

    def _files(self, key: str, pattern: str) -> Mapping[str, Dataset]:
        if key not in self._read:
            self._read[key] = self._read_files(key, pattern)
        return self._read[key]

    def _same_files(self, public: str, split: str, table: Dataset) -> bool:
        """Whether test records lie in files of the private ones, whatever the two settings call them."""
        kind, _, name = self._settings.name.partition(":")
        own = self._files("data.name", name).get(self._settings.split) if kind == "file" else None
        return own is not None and not files_of(public, split, table).isdisjoint(files_of(name, self._settings.split, own))


def _folder(source: str) -> Path | None:
    """Where relative paths in files start; None for the hub."""
    kind, _, name = source.partition(":")
    return folder_of(name) if kind == "file" else None
