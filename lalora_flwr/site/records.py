"""A site's records: read once, whatever state they are in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace

from lalora_flwr.data.data_set import DataSet, data_set
from lalora_flwr.data.own_records import own_records
from lalora_flwr.data.partition import site_rows
from lalora_flwr.data.records import RecordSet, bytes_of, no_records
from lalora_flwr.ground.cache import Cache, stamp_below
from lalora_flwr.ground.errors import ConfigError, SiteRefusal
from lalora_flwr.ledger.fingerprint import fingerprint_of_files, fingerprint_of_share
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import Settings, flatten

log = logging.getLogger("lalora_flwr.site")

NodeConfig = Mapping[str, bool | int | float | str]
ReadRecords = Callable[[Settings, NodeConfig, BaseModel], RecordSet]
Key = tuple[Hashable, ...]


ROOM = 2**29  # bytes of virtual sites' records that a process keeps


class RecordStore:
    """Encoded records of the last sites of a process. Files that have changed since are read again."""

    def __init__(self, room: int = ROOM) -> None:
        """``room``: bytes of virtual sites' records that are kept, however many sites there are; of a site's own files those of
        the last way to read them are kept."""
        self._kept: Cache[Key, tuple[RecordSet, object]] = Cache(room, lambda kept: bytes_of(kept[0]))
        self._splits: Cache[Key, tuple[list[list[int]], object]] = Cache(2)  # of all sites at once
        self._own: Cache[Key, RecordSet] = Cache(min(1, room))  # a run chooses how long texts are, and may choose anew each time

    def __call__(self, settings: Settings, node_config: NodeConfig, base: BaseModel) -> RecordSet:
        """The site's records: those under its own ``data-path``, or its share of the run's data set; possibly none.

        Raises:
            SiteRefusal: if the node-config names neither.
            ConfigError: if what it names does not exist, may not be opened or lacks a column.
        """
        if path := str(node_config.get("data-path", "")):
            data_keys = settings.data if settings.task != "image" else replace(settings.data, max_tokens=2)  # of texts alone
            key: Key = (path, stamp_below(path), data_keys, base.name, base.provenance.digest)
            return self._own.get(key, lambda: _own(settings, path, base))
        if "partition-id" not in node_config or "num-partitions" not in node_config:
            raise SiteRefusal("data: the site's node-config names no data-path")
        site, sites = int(node_config["partition-id"]), int(node_config["num-partitions"])
        data = data_set(settings)  # another object if its files have changed; kept with the records, so that its id stays its own

        def share() -> tuple[RecordSet, object]:
            rows, _ = self._splits.get(split, lambda: (_rows(settings, data, sites), data))
            return data.private(rows[site], base.encode), data

        split: Key = (id(data), sites, settings.data, settings.seed)
        return self._kept.get((*split, site, base.name, base.provenance.digest), share)[0]


def _rows(settings: Settings, data: DataSet, sites: int) -> list[list[int]]:
    """The rows of every virtual site."""
    return site_rows(data.classes(), settings.data, settings.seed, sites, data.owners())


def _own(settings: Settings, path: str, base: BaseModel) -> RecordSet:
    return own_records(settings, path, base.encode, base.vocabulary, base.segments).records


def owned_records(read: ReadRecords, settings: Settings, node_config: NodeConfig, base: BaseModel) -> RecordSet:
    """The records of a site with caps, whatever state they are in.

    Guarantee: whether this refuses depends on the node-config and on the layout of the files it names (that they are there, may
    be opened and have the columns), never on a record. Any other failure leaves no records, and the site answers with noise.

    Raises:
        SiteRefusal: with a fixed reason.
    """
    try:
        records = read(settings, node_config, base)
    except SiteRefusal:
        raise
    except ConfigError as fault:
        log.error("the site's records: %s", fault)
        raise SiteRefusal("data: the site cannot open what its node-config names; its own log says why") from None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of a Rust library is no Exception
        log.exception("the site's records cannot be read")
        records = no_records()
    if not len(records):
        log.error("THE SITE HAS NO USABLE RECORD: it answers with noise alone, which is counted; see `lalora site check`")
    return records


def counted_records(read: ReadRecords, settings: Settings, node_config: NodeConfig, base: BaseModel) -> tuple[RecordSet, str]:
    """As `owned_records`, with the fingerprint by which the ledger knows them.

    Guarantee: both are of one state of the owner's files; whether this refuses depends on whether they changed meanwhile,
    never on what is in them.
    """
    path = str(node_config.get("data-path", ""))
    before = stamp_below(path) if path else ()
    records, known_by = owned_records(read, settings, node_config, base), fingerprint(settings, node_config)
    if path and stamp_below(path) != before:
        raise SiteRefusal("data: the site's records changed while they were read; ask again")
    return records, known_by


def fingerprint(settings: Settings, node_config: NodeConfig) -> str:
    """What the ledger knows the site's records by; files that cannot be read are known by their place."""
    if path := str(node_config.get("data-path", "")):
        try:
            return fingerprint_of_files(path)
        except OSError:
            log.exception("the site's records cannot be read for their fingerprint")
            return fingerprint_of_share({"unreadable": path})
    share = {"site": int(node_config["partition-id"]), "sites": int(node_config["num-partitions"])}
    return fingerprint_of_share({**flatten(settings.data), "seed": settings.seed, **share})
