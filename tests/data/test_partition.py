"""Who holds what: every record has one owner, the same for a seed."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lalora_flwr.data.partition import equal_share, site_rows
from lalora_flwr.ground.cache import Cache
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import DataSettings

COUNT, LABELS = 203, 4
IID = DataSettings(partition="iid")


def sized(**values: Any) -> DataSettings:
    return DataSettings(**values)


def everything(count: int = COUNT) -> torch.Tensor:
    """The labels of all records."""
    return torch.randint(LABELS, (count,), generator=torch.Generator().manual_seed(0))


def split(settings: DataSettings, sites: int, seed: int = 0) -> list[list[int]]:
    """The rows of each site, drawn afresh."""
    return site_rows(everything().tolist(), settings, seed, sites, kept=Cache(0))


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
    labels = everything()
    whole = torch.bincount(labels, minlength=LABELS) / COUNT
    parts = [torch.bincount(labels[list(part)], minlength=LABELS) / len(part) for part in split(settings, sites)]
    return float(torch.stack([(part - whole).abs().sum() for part in parts]).mean())


def test_the_smaller_beta_the_more_the_sites_differ() -> None:
    assert unevenness(dirichlet(0.3)) > 2 * unevenness(dirichlet(3.0)) > 2 * unevenness(dirichlet(300.0))
    assert unevenness(IID) < 0.3


@pytest.mark.parametrize("beta", [0.3, 1.0, 100.0])
def test_every_site_of_a_dirichlet_split_has_enough_records(beta: float) -> None:
    assert min(len(part) for part in split(dirichlet(beta), 4)) >= 10


@pytest.mark.parametrize("seed", range(8))
def test_a_dirichlet_split_is_drawn_again_until_all_have_enough(seed: int) -> None:
    """The first draw of about half of these seeds leaves a site with fewer."""
    settings = DataSettings(partition="dirichlet", beta=0.3, min_records=25)
    assert min(len(part) for part in split(settings, 4, seed)) >= 25


@pytest.mark.parametrize("settings", [IID, dirichlet(1.0)], ids=["iid", "dirichlet"])
def test_more_sites_than_records_are_refused(settings: DataSettings) -> None:
    with pytest.raises(ConfigError, match="num-supernodes = 9: more sites than the 8 records"):
        site_rows(everything(8).tolist(), settings, 0, 9)
    with pytest.raises(ConfigError, match="num-supernodes"):
        equal_share(8, 9)


def test_as_many_sites_as_records_get_one_each() -> None:
    assert [len(part) for part in site_rows(everything(8).tolist(), IID, 0, 8)] == [1] * 8


@pytest.mark.filterwarnings("error:The specified min_partition_size")
def test_a_dirichlet_split_that_cannot_be_is_refused_with_what_to_change() -> None:
    with pytest.raises(ConfigError, match=r"data\.beta = 0\.001.*larger beta or fewer sites"):
        site_rows(everything().tolist(), dirichlet(0.001), 0, 15)


@pytest.mark.parametrize("kind", ["linear", "square"])
def test_size_skewed_sites_grow_and_are_complete(kind: str) -> None:
    parts = split(sized(partition="size-skewed", size_skew=kind, min_records=1), 4)
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert sorted(row for part in parts for row in part) == list(range(COUNT))


def test_pathological_sites_hold_so_many_classes() -> None:
    labels = everything()
    for part in split(sized(partition="pathological", classes_per_site=2), 4):
        assert len(set(labels[list(part)].tolist())) == 2


def test_shards_give_each_site_few_classes() -> None:
    parts = split(sized(partition="shards", shards_per_site=1), 4)
    assert all(len(set(everything()[list(part)].tolist())) <= 3 for part in parts)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_shards_are_equal_runs_of_the_sorted_records(labels: list[int], sites: int, each: int, seed: int) -> None:
    settings = sized(partition="shards", shards_per_site=each, min_records=1)
    if sites * each > len(labels):
        with pytest.raises(ConfigError, match=r"more sites than|data\.shards-per-site"):
            site_rows(labels, settings, seed, sites)
        return
    parts = site_rows(labels, settings, seed, sites)
    assert sorted(row for part in parts for row in part) == list(range(len(labels)))
    place = {row: i for i, row in enumerate(sorted(range(len(labels)), key=lambda row: labels[row]))}
    for part in parts:
        places = sorted(place[row] for row in part)
        gaps = sum(b - a > 1 for a, b in itertools.pairwise(places))
        assert gaps < each and each * (len(labels) // (sites * each)) <= len(part) <= each * -(-len(labels) // (sites * each))


COMPLETE = {
    "iid": sized(partition="iid", name="file:x", min_records=1),
    "digits": sized(partition="iid", min_records=1),
    "dirichlet": sized(partition="dirichlet", beta=1.0, min_records=2),
    "pathological": sized(partition="pathological", classes_per_site=LABELS, min_records=1),
    "linear": sized(partition="size-skewed", name="file:x", size_skew="linear", min_records=1),
    "square": sized(partition="size-skewed", name="file:x", size_skew="square", min_records=1),
    "exponential": sized(partition="size-skewed", name="file:x", size_skew="exponential", min_records=1),
    "shards": sized(partition="shards", min_records=1),
    "natural": sized(partition="natural", site="ward", min_records=1),
}


def shared(labels: list[int], settings: DataSettings, seed: int, sites: int) -> list[list[int]]:
    """The split, drawn afresh, of records whose owners take turns."""
    np.random.seed(len(labels))
    owners = [f"ward {row % sites}" for row in range(len(labels))] if settings.partition == "natural" else None
    return site_rows(labels, settings, seed, sites, owners, Cache(0))


@pytest.mark.parametrize("kind", COMPLETE)
@given(labels=st.lists(st.integers(0, LABELS - 1), min_size=40, max_size=80), seed=st.integers(0, 9), sites=st.integers(1, 4))
@hypothesis_settings(max_examples=15)
def test_every_record_has_one_owner_the_same_for_a_seed(kind: str, labels: list[int], seed: int, sites: int) -> None:
    settings = COMPLETE[kind]
    labels = [*(label for label in range(LABELS) for _ in range(4)), *labels]  # enough of each class to be shared out
    parts = shared(labels, settings, seed, sites)
    assert len(parts) == sites
    assert sorted(row for part in parts for row in part) == list(range(len(labels)))
    assert min(len(part) for part in parts) >= settings.min_records
    assert shared(labels, settings, seed, sites) == parts


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("sites", [1, 2, 5])
def test_pathological_sites_leave_out_whole_classes_only(classes: int, sites: int) -> None:
    labels = everything().tolist()
    parts = shared(labels, sized(partition="pathological", classes_per_site=classes, min_records=1), 0, sites)
    held = [row for part in parts for row in part]
    left = set(range(COUNT)) - set(held)
    assert len(held) == len(set(held))
    assert not {labels[row] for row in left} & {labels[row] for row in held}


@pytest.mark.parametrize("settings", [COMPLETE["iid"], COMPLETE["linear"]], ids=["iid", "size-skewed"])
def test_files_that_are_sorted_by_class_are_mixed(settings: DataSettings) -> None:
    """Equal parts of the rows as they come would give each site classes of its own."""
    labels = sorted(everything(400).tolist())
    whole = Counter(labels)
    parts = shared(labels, settings, 0, 4)
    for part in parts:
        counts = Counter(labels[row] for row in part)
        assert all(abs(counts[label] / len(part) - whole[label] / 400) < 0.2 for label in range(LABELS))
    assert shared(labels, settings, 1, 4) != parts


def test_the_digits_are_mixed_already_and_keep_their_order() -> None:
    assert split(IID, 4, seed=0) == split(IID, 4, seed=1)
    assert [row for part in split(IID, 4) for row in part] == list(range(COUNT))


def test_owners_stay_with_their_records() -> None:
    owners = [f"ward {row * row % 3}" for row in range(COUNT)]
    parts = site_rows(everything().tolist(), sized(partition="natural", name="file:x", site="ward"), 5, 2, owners)
    assert parts == [[row for row in range(COUNT) if owners[row] == name] for name in ("ward 0", "ward 1")]


def test_natural_sites_are_the_owners() -> None:
    owners = [f"ward {i % 3}" for i in range(COUNT)]
    settings = sized(partition="natural", site="ward")
    parts = site_rows(everything().tolist(), settings, 0, 3, owners)
    assert [{owners[row] for row in part} for part in parts] == [{f"ward {i}"} for i in range(3)]
    with pytest.raises(ConfigError, match=r"num-supernodes = 4.*'ward' tells 3 sites apart"):
        site_rows(everything().tolist(), settings, 0, 4, owners)


def test_a_site_with_too_few_records_is_refused() -> None:
    owners = ["a"] * (COUNT - 3) + ["b"] * 3
    with pytest.raises(ConfigError, match=r"site 1 with 3 records, fewer than data\.min-records = 10"):
        site_rows(everything().tolist(), sized(partition="natural", site="ward"), 0, 2, owners)


def test_more_classes_a_site_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.classes-per-site = 5: the data set has 4 classes"):
        split(sized(partition="pathological", classes_per_site=5), 4)
