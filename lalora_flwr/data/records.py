"""A set of labelled records, and the data sets that the package knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lalora_flwr.data import digits
from lalora_flwr.data.inputs import Inputs, rows
from lalora_flwr.errors import ConfigError


@dataclass(frozen=True)
class Records:
    """Inputs (n, *input_shape), or a dict of such tensors for text, and labels (n, …)."""

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Records:
        return Records(rows(self.inputs, indices), self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """A data set: its public facts, and functions that load its parts.

    Attributes:
        private_records: how many records all sites hold together; public, so that a run can be planned without the data.
        num_classes: how many labels there are.
        input_shape: shape of one record.
        private: loads what the sites share out; test: loads the public records the server evaluates on.
    """

    private_records: int
    num_classes: int
    input_shape: tuple[int, ...]
    private: Callable[[], Records]
    test: Callable[[], Records]


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(
        private_records=digits.PRIVATE_RECORDS,
        num_classes=10,
        input_shape=(1, 8, 8),
        private=lambda: Records(*digits.private_part()),
        test=lambda: Records(*digits.test_part()),
    )
}


def dataset(name: str) -> Dataset:
    """The data set of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in DATASETS:
        raise ConfigError(f"data.name = {name!r}: must be one of {', '.join(DATASETS)}")
    return DATASETS[name]
