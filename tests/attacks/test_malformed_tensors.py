"""Tensors that no honest server sends are refused in one line before anything is counted, and leave the site as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from numpy.typing import NDArray

from lalora_flwr.settings import Settings
from lalora_flwr.wire.npy import MAGIC
from lalora_flwr.wire.orders import ARRAYS
from tests.attacks.attacker import RUN, Draws, Site, table, text_model
from tests.attacks.orders import order
from tests.conftest import small
from tests.ledger.site_ledgers import owned
from tests.sites import REAL, train_order

Change = Callable[[NDArray[np.float32]], NDArray[Any]]
OTHERS = "adapter: the tensors sent are not those that the run's method sends"
NOT_FINITE = "adapter: the tensors sent hold values that are not finite"
CHANGES: dict[str, tuple[Change, str]] = {
    "float64": (lambda x: x.astype(np.float64), OTHERS),
    "float16": (lambda x: x.astype(np.float16), OTHERS),
    "whole numbers": (lambda x: x.astype(np.int32), OTHERS),
    "truths": (lambda x: x.astype(np.bool_), OTHERS),
    "complex numbers": (lambda x: x.astype(np.complex64), OTHERS),
    "no rows": (lambda x: x[:0], OTHERS),
    "one number": (lambda x: x.reshape(-1)[0:1].reshape(()), OTHERS),
    "one axis more": (lambda x: x[None], OTHERS),
    "a row more": (lambda x: np.concatenate([x, x[:1]]), OTHERS),
    "all NaN": (lambda x: np.full_like(x, np.nan), NOT_FINITE),
    "one infinity": (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, -np.inf, x).astype(np.float32), NOT_FINITE),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    return Site(table(folder / "records.csv"), text_model(folder / "model"))


def changed(message: Message, change: Change) -> Message:
    """The order with its last tensor changed."""
    arrays = message.content[ARRAYS]
    assert isinstance(arrays, ArrayRecord)
    name = max(arrays)
    message.content[ARRAYS] = ArrayRecord({**arrays, name: Array(change(arrays[name].numpy()))})
    return message


@pytest.mark.parametrize("strategy", ["dp-lora", "hetlora", "fedex-lora", "fed-sb", "ridge-head"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_tensor_that_no_server_sends_is_refused_and_changes_nothing(name: str, strategy: str, target: Site) -> None:
    run = {**RUN, "strategy": strategy}
    change, reason = CHANGES[name]
    before = target.serve(order(run, Path(target.model)), run, draws=Draws())
    served = target.serve(changed(order(run, Path(target.model)), change), run, draws=Draws())
    assert served.reason == reason and not served.reserved and not served.steps
    after = target.serve(order(run, Path(target.model)), run, draws=Draws())
    assert not after.reason and all(torch.equal(after.tensors[n], value) for n, value in before.tensors.items())


HEADER = b"{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000,), }"
NO_BYTES = MAGIC + (118).to_bytes(2, "little") + HEADER.ljust(117) + b"\n"  # 10^12 values of no bytes each in 128 bytes

JUNK = [
    Array("float32", (2, 3), "numpy.ndarray", b"no array"),
    Array("float32", (2, 3), "other", b""),
    Array(np.zeros(3, dtype=np.uint16)),
    Array(np.array(["text"])),
    Array("float32", (2, 3), "numpy.ndarray", NO_BYTES),
]


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: f"{junk.stype}-{junk.dtype}")
def test_an_array_that_is_none_is_refused(junk: Array, tmp_path: Path, context: Callable[[Settings], Context]) -> None:
    """Of an order whose arrays travel one by one, as another server of the same protocol might send them."""
    settings = small(tmp_path)
    message = train_order(settings)
    arrays = message.content[ARRAYS]
    assert isinstance(arrays, ArrayRecord)
    message.content[ARRAYS] = ArrayRecord({**arrays, max(arrays): junk})
    reply = REAL(message, owned(context(settings), tmp_path))
    assert reply.has_error() and str(reply.error.reason) in ("order: its tensors cannot be read", OTHERS)
