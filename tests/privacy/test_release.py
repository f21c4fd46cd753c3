"""A sum is released once, counted before, and never without its noise."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lalora_flwr.ground.errors import BudgetExhausted
from lalora_flwr.privacy.counting import RunLedger
from lalora_flwr.privacy.events import Target
from lalora_flwr.privacy.mechanism import Mechanism, PrivateSum
from tests.privacy.sums import CPU, LARGE, MECHANISM, SHAPES, gradients
from tests.reference import OpenLedger, Replay


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_norm": 0.0},
        {"clip_norm": 1e-46},
        {"clip_norm": math.inf},
        {"clip_norm": math.nan},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": 1e-12},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"expected_batch": 0.0},
        {"expected_batch": math.inf},
    ],
    ids=str,
)
def test_constants_that_are_none_of_a_mechanism_are_refused(wrong: dict[str, float]) -> None:
    good = {"noise_multiplier": 1.0, "clip_norm": 1.0, "sample_rate": 0.5, "expected_batch": 2.0}
    with pytest.raises(ValueError, match="no constants"):
        Mechanism(**{**good, **wrong})


class Watched(Replay):
    """Notes when it is asked for noise."""

    def __init__(self, calls: list[tuple[object, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def normal(self, shape: object) -> Tensor:
        self.calls.append(("noise",))
        return super().normal(shape)  # type: ignore[arg-type]


def test_the_ledger_counts_the_step_before_any_noise_is_drawn() -> None:
    ledger = OpenLedger()
    PrivateSum(MECHANISM, LARGE, CPU).release(ledger, Watched(ledger.calls))
    assert ledger.calls == [("take",), *[("noise",)] * 4]  # two draws a tensor


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_if_the_ledger_refuses_nothing_is_released(sigma: float) -> None:
    calls: list[tuple[object, ...]] = []
    total = PrivateSum(Mechanism(sigma, 1.0, 0.5, 2.0), LARGE, CPU)
    total.add({n: torch.ones(2, *shape) for n, shape in LARGE.items()})
    with pytest.raises(BudgetExhausted):
        total.release(RunLedger(Target(8.0, 1e-4, 10, "rdp")), Watched(calls))  # no step was reserved
    assert calls == []


def test_a_sum_is_released_only_once() -> None:
    """Two releases of one sum would average half the noise away."""
    total = PrivateSum(MECHANISM, LARGE, CPU)
    total.add({n: torch.ones(2, *shape) for n, shape in LARGE.items()})
    total.release(OpenLedger(), Replay())
    assert total.release(OpenLedger(), Replay(1)) == {}


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensor, value)))


def test_no_public_attribute_or_return_value_holds_the_sum_without_noise() -> None:
    total = PrivateSum(MECHANISM, LARGE, CPU)
    assert total.add({n: torch.ones(2, *shape) for n, shape in LARGE.items()}) is None
    for _ in range(2):  # before and after the release
        public = [name for name in dir(total) if not name.startswith("_")]
        assert set(public) == {"add", "release", "release_share", "not_finite"}
        assert not any(_holds_tensor(getattr(total, name)) for name in public)
        total.release(OpenLedger(), Replay())


@pytest.mark.parametrize("change", ["missing", "extra", "other"])
def test_gradients_of_other_tensors_than_the_steps_are_refused(change: str) -> None:
    per_sample = {n: torch.ones(2, *shape) for n, shape in LARGE.items()}
    if change != "extra":
        del per_sample["x.lora_B.w"]
    if change != "missing":
        per_sample["y.lora_B.w"] = torch.ones(2, 101, 200)
    with pytest.raises(RuntimeError):
        PrivateSum(MECHANISM, LARGE, CPU).add(per_sample)


def test_without_privacy_the_release_is_the_plain_sum_over_the_expected_batch() -> None:
    mechanism = Mechanism(noise_multiplier=0.0, clip_norm=0.1, sample_rate=1.0, expected_batch=4.0)
    assert not mechanism.private and MECHANISM.private
    per_sample = gradients([[5.0, 2.0, 1.0], [0.1, 0.1, 0.1], [math.nan, 0.0, 0.0]])
    total = PrivateSum(mechanism, {n: torch.Size(s) for n, s in SHAPES.items()}, CPU)
    total.add(per_sample)
    ledger = OpenLedger()
    released = total.release(ledger, Replay())
    assert ledger.taken == 1 and total.not_finite == 1
    for n in SHAPES:
        torch.testing.assert_close(released[n], per_sample[n][:2].sum(0) / 4.0)
