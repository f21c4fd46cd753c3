"""How the virtual sites of a simulation share a data set, by Flower Datasets' partitioners."""

from __future__ import annotations

import warnings

import torch

from lalora_flwr.config import DataSettings
from lalora_flwr.data.records import Records
from lalora_flwr.errors import ConfigError

SMALLEST_SITE = 10  # records; Dirichlet splits are drawn again until each site has as many


def equal_share(records: int, sites: int, site: int = 0) -> int:
    """How many records site number ``site`` gets in an equal split (the first sites get one more if it is uneven).

    Raises:
        ConfigError: if there are more sites than records.
    """
    if sites > records:
        raise ConfigError(f"num-supernodes = {sites}: more sites than the {records} records; use at most {records}")
    return records // sites + (site < records % sites)


def site_records(records: Records, settings: DataSettings, seed: int, site: int, sites: int) -> Records:
    """The records of one virtual site; the parts of all sites are disjoint and complete.

    Args:
        records: all private records.
        settings: the kind of split.
        seed: the run's seed; the same split on every worker.
        site: number of the site, from 0.
        sites: how many sites there are.

    Raises:
        ConfigError: more sites than records, or a Dirichlet split that leaves a site with almost nothing.
    """
    from datasets import Dataset as HfDataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    equal_share(len(records), sites)
    table = HfDataset.from_dict({"row": list(range(len(records))), "label": records.labels.tolist()})
    if settings.partition == "iid":
        partitioner = IidPartitioner(num_partitions=sites)
    else:
        partitioner = DirichletPartitioner(
            num_partitions=sites,
            partition_by="label",
            alpha=settings.beta,
            min_partition_size=SMALLEST_SITE,
            seed=seed,
        )
    partitioner.dataset = table
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each draw that was too small; the error below says it once
            rows = partitioner.load_partition(site)["row"]
    except ValueError:
        raise ConfigError(
            f"data.beta = {settings.beta:g}: no Dirichlet split leaves each of {sites} sites {SMALLEST_SITE} records; use a "
            "larger beta or fewer sites"
        ) from None
    return records.take(torch.tensor(list(rows), dtype=torch.long))
