from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from lalora_flwr.config import DataSettings
from lalora_flwr.data.partition import SMALLEST_SITE, equal_share, site_records
from lalora_flwr.data.records import Records
from lalora_flwr.errors import ConfigError

COUNT, LABELS = 203, 4
IID = DataSettings(partition="iid")


def everything(count: int = COUNT) -> Records:
    """Records whose input is their own number."""
    draw = torch.Generator().manual_seed(0)
    return Records(torch.arange(count).float().unsqueeze(1), torch.randint(LABELS, (count,), generator=draw))


@lru_cache
def split(settings: DataSettings, sites: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """The numbers of each site's records, in the site's order."""
    whole = everything()
    parts = [site_records(whole, settings, seed, site, sites) for site in range(sites)]
    for part in parts:
        rows = part.inputs[:, 0].long()
        assert torch.equal(part.labels, whole.labels[rows])  # inputs and labels stay together
    return tuple(tuple(part.inputs[:, 0].long().tolist()) for part in parts)


def dirichlet(beta: float) -> DataSettings:
    return DataSettings(partition="dirichlet", beta=beta)


@pytest.mark.parametrize("sites", [1, 2, 5])
@pytest.mark.parametrize("settings", [IID, dirichlet(1.0), dirichlet(100.0)], ids=["iid", "1", "100"])
def test_parts_are_disjoint_and_complete(settings: DataSettings, sites: int) -> None:
    assert sorted(row for part in split(settings, sites) for row in part) == list(range(COUNT))


@pytest.mark.parametrize("settings", [IID, dirichlet(1.0)], ids=["iid", "dirichlet"])
def test_the_same_seed_gives_the_same_split_whatever_the_global_generators(settings: DataSettings) -> None:
    np.random.seed(1)
    first = split(settings, 3)
    np.random.seed(2)
    split.cache_clear()
    assert split(settings, 3) == first


def test_another_seed_gives_another_dirichlet_split() -> None:
    assert split(dirichlet(1.0), 3, seed=0) != split(dirichlet(1.0), 3, seed=1)


@pytest.mark.parametrize("sites", [1, 2, 4, 5, 7])
def test_iid_sizes_are_the_equal_shares(sites: int) -> None:
    sizes = [len(part) for part in split(IID, sites)]
    assert sizes == [equal_share(COUNT, sites, site) for site in range(sites)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("records", "sites"), [(10, 3), (9, 3), (3, 3), (1100, 7), (1, 1)])
def test_equal_shares_add_up_and_differ_by_one_at_most(records: int, sites: int) -> None:
    shares = [equal_share(records, sites, site) for site in range(sites)]
    assert sum(shares) == records
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)
    assert equal_share(records, sites) == shares[0]


def unevenness(settings: DataSettings, sites: int = 4) -> float:
    """Mean distance of the sites' label shares from those of all records together."""
    labels = everything().labels
    whole = torch.bincount(labels, minlength=LABELS) / COUNT
    parts = [torch.bincount(labels[list(part)], minlength=LABELS) / len(part) for part in split(settings, sites)]
    return float(torch.stack([(part - whole).abs().sum() for part in parts]).mean())


def test_the_smaller_beta_the_more_the_sites_differ() -> None:
    assert unevenness(dirichlet(0.3)) > 2 * unevenness(dirichlet(3.0)) > 2 * unevenness(dirichlet(300.0))
    assert unevenness(IID) < 0.3


@pytest.mark.parametrize("beta", [0.3, 1.0, 100.0])
def test_every_site_of_a_dirichlet_split_has_enough_records(beta: float) -> None:
    assert min(len(part) for part in split(dirichlet(beta), 4)) >= SMALLEST_SITE


@pytest.mark.parametrize("settings", [IID, dirichlet(1.0)], ids=["iid", "dirichlet"])
def test_more_sites_than_records_are_refused(settings: DataSettings) -> None:
    with pytest.raises(ConfigError, match="num-supernodes = 9: more sites than the 8 records"):
        site_records(everything(8), settings, 0, 0, 9)
    with pytest.raises(ConfigError, match="num-supernodes"):
        equal_share(8, 9)


def test_as_many_sites_as_records_get_one_each() -> None:
    assert [len(site_records(everything(8), IID, 0, site, 8)) for site in range(8)] == [1] * 8


@pytest.mark.filterwarnings("error:The specified min_partition_size")
def test_a_dirichlet_split_that_cannot_be_is_refused_with_what_to_change() -> None:
    with pytest.raises(ConfigError, match=r"data\.beta = 0\.001.*larger beta or fewer sites"):
        site_records(everything(), dirichlet(0.001), 0, 0, 15)
