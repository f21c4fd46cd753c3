"""Prices of operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lalora_flwr.cost.prices import KNOWN, OVERHEAD, Hardware, Here, prices_of, seconds
from lalora_flwr.cost.trace import Like, Operation, Traced
from lalora_flwr.ground.errors import ConfigError


def product(n: int, dtype: torch.dtype = torch.float32) -> Operation:
    square = Like((n, n), (n, 1), dtype)
    return Operation(torch.ops.aten.mm.default, (square, square), {}, f"mm {n} {dtype}", 2 * n**3, 3 * square.bytes)


def test_a_data_sheet_prices_what_is_slower_computing_or_memory() -> None:
    card = Hardware("card", {2: 1e12, 4: 1e11}, bandwidth=1e11, memory=1e9, call=1e-6)
    large, small = product(1000), product(2)
    assert card.of(large) == pytest.approx(2e9 / (0.5 * 1e11))
    assert card.of(product(1000, torch.bfloat16)) == pytest.approx(2e9 / (0.5 * 1e12))
    assert card.of(small) == 1e-6
    copy = Operation(torch.ops.aten.clone.default, (Like((10**6,), (1,), torch.float32),), {}, "clone", 0, 8 * 10**6)
    assert card.of(copy) == pytest.approx(8e6 / (0.7 * 1e11))


def test_here_an_operation_is_run_and_its_fastest_run_counts() -> None:
    of_product = [0.0, 0.0, 0.005, 0.006, 0.006, 0.008, 0.009, 0.009, 0.012, 1.0]  # runs of 5, 2 and 3 ms, and a look after each
    of_call = [1.0, 1.0, 1.001, 2.0]  # a small kernel of 1 ms
    times: Iterator[float] = iter([*of_product, *of_call])
    here = Here(clock=lambda: next(times))
    assert here.of(product(8)) == pytest.approx(0.002 + OVERHEAD * 0.001)


def test_an_operation_is_measured_once() -> None:
    counted = []

    def clock() -> float:
        counted.append(1)
        return float(len(counted))

    here = Here(clock=clock)
    here.of(product(8))
    looked = len(counted)
    here.of(product(8))
    assert len(counted) == looked


def test_a_pass_costs_the_sum_of_its_calls() -> None:
    card = KNOWN["h100"]
    step = Traced(((product(512), 3), (product(64), 5)), 0, 1)
    assert seconds(step, card) == pytest.approx(3 * card.of(product(512)) + 5 * card.of(product(64)))


@pytest.mark.parametrize("name", ["h200", "H100", "gpu"])
def test_unknown_hardware_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--hardware {name}: must be one of this-machine, h100, a100, l4"):
        prices_of(name)
