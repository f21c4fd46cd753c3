"""What travels between server and sites: the only names a message may hold.

    train      down  arrays    adapter tensors the site cannot derive itself
                     config    server-round, schedule, filter, share, adapter-digest, model-digest, counted-steps
               up    arrays    adapter tensors, as the method shares them
                     counters  steps, epsilon, noise-multiplier, sample-rate, seeded
    evaluate   down  arrays    adapter tensors the site cannot derive itself
                     config    server-round, model-digest
               up    site-metrics  accuracy and noise-multiplier, of the noise that the site's ledger counts; in a simulation
                                   exact accuracy and loss, a leak (only with evaluate-sites)
    identity   up    identity  site, sites (-1 outside of a simulation)

Counters are public: they follow from public constants and from how often the site was asked. Nothing that depends on
the records travels but the tensors, and those only after clipping and noise, unless a run evaluates on the sites.
What a reply says is checked for form here, and against what the server itself knows in `lalora_flwr.server.counts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

ARRAYS, CONFIG, COUNTERS, IDENTITY, SITE_METRICS = "arrays", "config", "counters", "identity", "site-metrics"
ARRAY_HEADER = 128  # bytes before the values of a ``.npy``
MOST_HEADER = 1024  # the same at most, whoever wrote it
LARGEST = 1e4  # of a tensor's values; factors of a useful adapter are below 10, and one reply above this ruins a mean
IDENTITY_QUERY = "query.identity"


class BadReply(Exception):
    """A reply that does not keep to the contract; never averaged."""


@dataclass(frozen=True)
class TrainOrder:
    """What the server asks of a site in one round; it names choices, not the method."""

    server_round: int
    schedule: str
    filter: str
    share: str
    adapter_digest: str  # of the whole adapter the site must start from
    model_digest: str  # of the frozen weights below it
    counted_steps: int = 0  # most steps the site can have taken in the run before; it counts them, or more by its own ledger

    def to_record(self) -> ConfigRecord:
        return ConfigRecord(
            {
                "server-round": self.server_round,
                "schedule": self.schedule,
                "filter": self.filter,
                "share": self.share,
                "adapter-digest": self.adapter_digest,
                "model-digest": self.model_digest,
                "counted-steps": self.counted_steps,
            }
        )

    @staticmethod
    def from_record(record: ConfigRecord) -> TrainOrder:
        return TrainOrder(
            int(record["server-round"]),  # type: ignore[arg-type]
            str(record["schedule"]),
            str(record["filter"]),
            str(record["share"]),
            str(record["adapter-digest"]),
            str(record["model-digest"]),
            int(record["counted-steps"]),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Counters:
    """Public counters of one site after a round: steps in all, ε in all, and the constants behind them."""

    steps: int
    epsilon: float
    noise_multiplier: float
    sample_rate: float
    seeded: bool

    def to_record(self) -> MetricRecord:
        return MetricRecord(
            {
                "steps": self.steps,
                "epsilon": self.epsilon,
                "noise-multiplier": self.noise_multiplier,
                "sample-rate": self.sample_rate,
                "seeded": int(self.seeded),
            }
        )

    @staticmethod
    def from_record(record: MetricRecord) -> Counters:
        if set(record) != {"steps", "epsilon", "noise-multiplier", "sample-rate", "seeded"}:
            raise BadReply("its counters are not the declared ones")
        if not all(isinstance(value, int | float) and value >= 0 for value in record.values()):  # NaN is not >= 0
            raise BadReply("its counters are not numbers of at least 0")
        if not all(math.isfinite(value) for name, value in record.items() if name != "epsilon"):  # type: ignore[arg-type]
            raise BadReply("its counters are not finite")
        if record["steps"] != int(record["steps"]) or record["seeded"] not in (0, 1):  # type: ignore[arg-type]
            raise BadReply("its counters are no whole number of steps, seeded or not")
        values = {name: float(value) for name, value in record.items()}  # type: ignore[arg-type]
        return Counters(
            int(values["steps"]),
            values["epsilon"],
            values["noise-multiplier"],
            values["sample-rate"],
            bool(values["seeded"]),
        )


def to_arrays(state: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Adapter tensors as float32 arrays, in sorted order of names."""
    import torch  # a site that is only asked who it is needs no torch

    return ArrayRecord({name: state[name].detach().to("cpu", torch.float32) for name in sorted(state)})


def to_tensors(arrays: ArrayRecord) -> dict[str, torch.Tensor]:
    """The tensors of an `ArrayRecord`, by name."""
    return dict(arrays.to_torch_state_dict())


def num_bytes(arrays: ArrayRecord) -> int:
    """Bytes of the arrays as they travel (each a ``.npy``: `ARRAY_HEADER` and the values)."""
    return sum(len(array.data) for array in arrays.values())


def read_reply(content: RecordDict, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, NDArray[np.float32]], Counters]:
    """Check a training reply against the contract and take it apart.

    Args:
        content: the reply.
        shapes: names and shapes of the tensors that the site has to send.

    Raises:
        BadReply: naming what is wrong: records, names, shapes, types, or values that are not finite or above `LARGEST`.
    """
    if set(content) != {ARRAYS, COUNTERS}:
        raise BadReply("its records are not the declared ones")
    arrays, counters = content[ARRAYS], read_counters(content)
    if not isinstance(arrays, ArrayRecord):
        raise BadReply("its records have the wrong kind")
    if set(arrays) != set(shapes):
        raise BadReply("its tensors are not those asked for")
    tensors = {}
    for name in sorted(shapes):
        if len(arrays[name].data) > MOST_HEADER + 4 * math.prod(shapes[name]):
            raise BadReply(f"{name} holds more bytes than its values need")
        try:
            value = arrays[name].numpy()
        except Exception:  # whatever numpy makes of bytes that are no array
            raise BadReply(f"{name} cannot be read") from None
        if value.shape != shapes[name] or value.dtype != np.float32:
            raise BadReply(f"{name} has the wrong shape or type")
        if not np.isfinite(value).all():
            raise BadReply(f"{name} holds values that are not finite")
        if (np.abs(value) > LARGEST).any():
            raise BadReply(f"{name} holds values above {LARGEST:g}")
        tensors[name] = value
    return tensors, counters


def read_counters(content: RecordDict) -> Counters:
    """The public counters of a training reply.

    Raises:
        BadReply: if they are missing or not the declared ones.
    """
    record = content.get(COUNTERS)
    if not isinstance(record, MetricRecord):
        raise BadReply("its records have the wrong kind")
    return Counters.from_record(record)


@dataclass(frozen=True)
class SiteMetrics:
    """What a site says of the shared model on its own records.

    Attributes:
        accuracy: in [0, 1].
        noise_multiplier: σ of the noise on the number of records that the model gets right (one record moves it by at most
            1), added before the division; None if the accuracy is exact.
    """

    accuracy: float
    noise_multiplier: float | None = None


def read_site_metrics(content: RecordDict) -> SiteMetrics:
    """Check an evaluation reply and take it apart. An exact loss may come with it and is dropped.

    Raises:
        BadReply: if the metrics are missing, not the declared ones, not finite, or no accuracy and noise.
    """
    record = content.get(SITE_METRICS)
    declared = ({"accuracy"}, {"accuracy", "loss"}, {"accuracy", "noise-multiplier"})
    if set(content) != {SITE_METRICS} or not isinstance(record, MetricRecord) or set(record) not in declared:
        raise BadReply("its metrics are not the declared ones")
    values: dict[str, float] = {}
    for name, value in record.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise BadReply("its metrics are not finite numbers")
        values[name] = float(value)
    if not 0 <= values["accuracy"] <= 1 or not values.get("noise-multiplier", 1.0) > 0:
        raise BadReply("its metrics are no accuracy from 0 to 1 and noise above 0")
    return SiteMetrics(values["accuracy"], values.get("noise-multiplier"))


def read_identity(content: RecordDict) -> tuple[int, int]:
    """A virtual site's number and how many there are; -1 twice from a real site.

    Raises:
        BadReply: if they are missing or not whole numbers.
    """
    record = content.get(IDENTITY)
    if not isinstance(record, MetricRecord) or set(record) != {"site", "sites"}:
        raise BadReply("its identity is not the declared one")
    site, sites = record["site"], record["sites"]
    if not isinstance(site, int) or not isinstance(sites, int):
        raise BadReply("its identity is not two whole numbers")
    return site, sites
