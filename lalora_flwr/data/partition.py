"""How the virtual sites of a simulation share a data set.

In equal shares or shards, which lose no record, or by the partitioners of Flower Datasets, which only a simulation installs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lalora_flwr.data.named import named_data_set
from lalora_flwr.ground.cache import Cache
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.extras import need
from lalora_flwr.ground.seeds import derive_seed
from lalora_flwr.settings import DataSettings

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def equal_share(records: int, sites: int, site: int = 0) -> int:
    """How many records site number ``site`` gets in an equal split (the first sites get one more if it is uneven).

    Raises:
        ConfigError: if there are more sites than records.
    """
    if sites > records:
        raise ConfigError(f"num-supernodes = {sites}: more sites than the {records} records; use at most {records}")
    return records // sites + (site < records % sites)


SplitKey = tuple[tuple[float, ...], DataSettings, int, int, tuple[str, ...] | None]  # all that decides a split
SPLITS: Cache[SplitKey, list[list[int]]] = Cache(4)  # of this process: its virtual sites take their rows from one split


def site_rows(
    labels: Sequence[float],
    settings: DataSettings,
    seed: int,
    sites: int,
    owners: Sequence[str] | None = None,
    kept: Cache[SplitKey, list[list[int]]] = SPLITS,
) -> list[list[int]]:
    """The rows of every virtual site; they are disjoint, and complete but for classes that a pathological split leaves out.

    Args:
        labels: the class or number of each private record (all the same where there is neither).
        settings: the kind of split.
        seed: the run's seed; the same split on every worker.
        sites: how many sites there are.
        owners: whose record it is, for ``natural``.
        kept: the splits that were made before, by everything that decides them.

    Raises:
        ConfigError: a split that cannot be made, or that leaves a site with fewer than ``data.min-records``.
    """
    key = tuple(labels), settings, seed, sites, None if owners is None else tuple(owners)
    return kept.get(key, lambda: _site_rows(*key))


def _site_rows(
    labels: tuple[float, ...], settings: DataSettings, seed: int, sites: int, owners: tuple[str, ...] | None
) -> list[list[int]]:
    equal_share(len(labels), sites)
    if settings.partition == "shards":
        parts = _shards(labels, settings, seed, sites)
    elif settings.partition == "iid":
        shares = np.array_split(_order(len(labels), settings, seed), sites)
        parts = [sorted(int(row) for row in share) for share in shares]
    else:
        parts = _by_flower(labels, settings, seed, sites, owners)
    small = min(range(sites), key=lambda site: len(parts[site]))
    if len(parts[small]) < min(settings.min_records, len(labels) // sites):
        raise ConfigError(
            f"data.partition = {settings.partition!r}: leaves site {small} with {len(parts[small])} records, fewer than "
            f"data.min-records = {settings.min_records}; use fewer sites or lower data.min-records"
        )
    return parts


def _by_flower(
    labels: tuple[float, ...], settings: DataSettings, seed: int, sites: int, owners: tuple[str, ...] | None
) -> list[list[int]]:
    from datasets import Dataset

    order = _order(len(labels), settings, seed)
    columns: dict[str, list[int] | list[float] | list[str]] = {"row": order, "label": [labels[row] for row in order]}
    if owners is not None:
        columns["site"] = [owners[row] for row in order]
    kind = settings.partition
    partitioner = _partitioner(settings, seed, sites, len(set(labels)))
    partitioner.dataset = Dataset.from_dict(columns)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each draw that was too small; the errors below say it once
            if partitioner.num_partitions != sites:
                raise ConfigError(
                    f"num-supernodes = {sites}: data.site = {settings.site!r} tells {partitioner.num_partitions} sites apart; "
                    f"set num-supernodes = {partitioner.num_partitions}"
                )
            return [sorted(partitioner.load_partition(site)["row"]) for site in range(sites)]
    except (ValueError, AssertionError) as error:
        if kind == "dirichlet":
            raise ConfigError(
                f"data.beta = {settings.beta:g}: no Dirichlet split leaves each of {sites} sites {settings.min_records} records; "
                "use a larger beta or fewer sites"
            ) from None
        raise ConfigError(f"data.partition = {kind!r}: impossible for {sites} sites: {str(error).splitlines()[0]}") from None


def _order(records: int, settings: DataSettings, seed: int) -> list[int]:
    """The rows as they are dealt out: iid and size-skewed shares are consecutive rows, and files are often sorted by class.

    Records that lie in a random order already, as the digits do, keep it.
    """
    named = named_data_set(settings.name)
    if settings.partition not in ("iid", "size-skewed") or (named is not None and named.mixed):
        return list(range(records))
    return [int(row) for row in np.random.default_rng(derive_seed(seed, "partition")).permutation(records)]


def _shards(labels: tuple[float, ...], settings: DataSettings, seed: int, sites: int) -> list[list[int]]:
    """Shards of equal size, give or take one record; Flower's are of exactly equal size and drop the records that are over."""
    count = sites * settings.shards_per_site
    if count > len(labels):
        raise ConfigError(f"data.shards-per-site = {settings.shards_per_site}: {count} shards of {len(labels)} records")
    shards = np.array_split(np.argsort(labels, kind="stable"), count)
    drawn = np.random.default_rng(derive_seed(seed, "partition")).permutation(count)
    return [sorted(int(row) for shard in drawn[site::sites] for row in shards[shard]) for site in range(sites)]


def _partitioner(settings: DataSettings, seed: int, sites: int, classes: int) -> Partitioner:
    need("flwr_datasets", f"data.partition = {settings.partition!r}")
    from flwr_datasets import partitioner as p

    match settings.partition:
        case "dirichlet":
            return p.DirichletPartitioner(sites, "label", alpha=settings.beta, min_partition_size=settings.min_records, seed=seed)
        case "pathological":
            if settings.classes_per_site > classes:
                raise ConfigError(f"data.classes-per-site = {settings.classes_per_site}: the data set has {classes} classes")
            return p.PathologicalPartitioner(
                sites, "label", settings.classes_per_site, class_assignment_mode="deterministic", seed=seed
            )
        case "size-skewed":
            kinds = {"linear": p.LinearPartitioner, "square": p.SquarePartitioner, "exponential": p.ExponentialPartitioner}
            return kinds[settings.size_skew](sites)
        case "natural":
            return p.NaturalIdPartitioner("site")
        case other:
            raise ValueError(f"{other!r} is no partition of Flower Datasets")
