"""What a site answers, checked for form. Whether it can be true is checked in `lalora_flwr.server.counts`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from lalora_flwr.wire.npy import values_of
from lalora_flwr.wire.orders import ARRAYS, MEMORY
from lalora_flwr.wire.profile import NAME
from lalora_flwr.wire.tensors import MOST_HEADER, BadReply

COUNTERS, IDENTITY, PROFILE, SHARING, SITE_METRICS = "counters", "identity", "profile", "sharing", "site-metrics"
IDENTITY_QUERY = "query.identity"
LONGEST_WORDS = 1000  # letters of a profile
MOST_RECORDS = 10**9  # of one site


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
        values = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
        if not all(math.isfinite(value) for name, value in values.items() if name != "epsilon"):
            raise BadReply("its counters are not finite")
        if values["steps"] != int(values["steps"]) or values["seeded"] not in (0, 1):
            raise BadReply("its counters are no whole number of steps, seeded or not")
        return Counters(
            int(values["steps"]),
            values["epsilon"],
            values["noise-multiplier"],
            values["sample-rate"],
            bool(values["seeded"]),
        )


def read_arrays(
    content: RecordDict,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: type[np.generic],
    check: Callable[[str, NDArray[np.generic]], None],
    *,
    memory: bool = False,
) -> dict[str, NDArray[np.generic]]:
    """Check a training reply against the contract and take out its arrays.

    Args:
        content: the reply.
        shapes: names and shapes of the arrays that the site has to send.
        dtype: of their values.
        check: refuses values of the right shape and type.
        memory: whether the site's memory of its filter comes with them.

    Raises:
        BadReply: naming what is wrong: records, names, shapes, types, or values.
    """
    if set(content) != {ARRAYS, COUNTERS, *([MEMORY] if memory else [])}:
        raise BadReply("its records are not the declared ones")
    arrays, _ = content[ARRAYS], read_counters(content)
    if not isinstance(arrays, ArrayRecord):
        raise BadReply("its records have the wrong kind")
    if set(arrays) != set(shapes):
        raise BadReply("its tensors are not those asked for")
    values = {}
    for name in sorted(shapes):
        if len(arrays[name].data) > MOST_HEADER + np.dtype(dtype).itemsize * math.prod(shapes[name]):
            raise BadReply(f"{name} holds more bytes than its values need")
        try:
            value = values_of(arrays[name])
        except Exception:  # whatever numpy makes of bytes that are no array
            raise BadReply(f"{name} cannot be read") from None
        if value.shape != shapes[name] or value.dtype != dtype:
            raise BadReply(f"{name} has the wrong shape or type")
        check(name, value)
        values[name] = value
    return values


def read_memory(content: RecordDict) -> ArrayRecord:
    """A virtual site's memory of its filter; empty if it sent none."""
    memory = content.get(MEMORY)
    return memory if isinstance(memory, ArrayRecord) else ArrayRecord()


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


@dataclass(frozen=True)
class Identity:
    """What a site says when it is greeted.

    Attributes:
        site, sites: a virtual site's number and how many there are; -1 twice from a real site.
        words: of its profile.
        name, records: in the owners' rosters and as declared, from a site that can take part in a secure sum.
    """

    site: int
    sites: int
    words: str = ""
    name: str = ""
    records: int = 0


def read_identity(content: RecordDict) -> Identity:
    """Check a greeting's reply and take it apart.

    Raises:
        BadReply: if they are missing or not of their types.
    """
    record = content.get(IDENTITY)
    if set(content) - {IDENTITY, PROFILE, SHARING} or not isinstance(record, MetricRecord) or set(record) != {"site", "sites"}:
        raise BadReply("its identity is not the declared one")
    site, sites = record["site"], record["sites"]
    if not isinstance(site, int) or not isinstance(sites, int):
        raise BadReply("its identity is not two whole numbers")
    return Identity(site, sites, _words(content), *_sharing(content))


def _sharing(content: RecordDict) -> tuple[str, int]:
    if SHARING not in content:
        return "", 0
    record = content[SHARING]
    known = isinstance(record, ConfigRecord) and set(record) == {"name", "records"}
    name, records = (record["name"], record["records"]) if known and isinstance(record, ConfigRecord) else (None, None)
    named = isinstance(name, str) and NAME.fullmatch(name) is not None
    if not named or type(records) is not int or not 1 <= records <= MOST_RECORDS:
        raise BadReply("its name and its number of records are not the declared ones")
    return str(name), records


def _words(content: RecordDict) -> str:
    if PROFILE not in content:
        return ""
    record = content[PROFILE]
    words = record.get("words") if isinstance(record, ConfigRecord) and set(record) == {"words"} else None
    if not isinstance(words, str) or len(words) > LONGEST_WORDS:
        raise BadReply("its profile is not the declared one")
    return words
