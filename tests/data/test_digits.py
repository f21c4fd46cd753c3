"""The embedded digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lalora_flwr.data.data_set import data_set, facts, private_records
from lalora_flwr.data.digits import table
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import DataSettings, Settings
from tests.data.files import keep


def test_the_file_holds_what_scikit_learn_reads_from_it() -> None:
    digits = load_digits()
    assert np.array_equal(table(), np.column_stack([digits.data, digits.target]))


def test_the_embedded_digits() -> None:
    wanted = Settings()
    data = data_set(wanted)
    assert facts(wanted).labels == data.labels == tuple("0123456789") and len(data.classes()) == private_records(wanted)
    records = data.private([5, 3], keep)
    inputs, labels = records.batch(torch.arange(2))
    assert isinstance(inputs, Tensor) and inputs.shape == (2, *(facts(wanted).input_shape or ()))
    assert labels.tolist() == [data.classes()[5], data.classes()[3]]
    assert len(data.public(keep)) > 100 and data.owners() is None


@pytest.mark.parametrize("test", ["hold-out:0.1", "split:validation", "file:test.csv"])
def test_the_embedded_digits_have_their_own_test_records(test: str) -> None:
    wanted = Settings(data=DataSettings(test=test))
    with pytest.raises(ConfigError, match=rf"^data\.test = '{test}': digits has test records of its own; leave it auto$"):
        data_set(wanted)
    assert data_set(Settings(data=DataSettings(test="split:test"))).labels
