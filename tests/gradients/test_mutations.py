"""The exactness and sensitivity tests have teeth: each classic way to break the guarantee, put in on purpose, is caught."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from lalora_flwr.gradients import fused
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.privacy import mechanism
from tests.adapters import check
from tests.gradients import test_architectures as exactness

Patch = pytest.MonkeyPatch


def sensitivity_holds() -> None:
    """Adding one large record moves the clipped sum by at most C; the property the mechanism's noise is sized for."""
    generator = torch.Generator().manual_seed(0)
    records = {"A": torch.randn(5, 3, 4, generator=generator), "B": torch.randn(5, 4, 2, generator=generator)}
    records = {name: torch.cat([g, 1e3 * torch.ones(1, *g.shape[1:])]) for name, g in records.items()}
    with_it, _ = mechanism.clip(records, 1.0)
    without, _ = mechanism.clip({name: g[:-1] for name, g in records.items()}, 1.0)
    moved = torch.stack([(with_it[name] - without[name]).square().sum() for name in records]).sum().sqrt()
    assert moved <= 1 + 1e-5


def batch_level_clip(patch: Patch) -> None:
    """The sum is clipped, not each record."""

    def clip(per_sample: Mapping[str, Tensor], clip_norm: float, stability: float = 0.0) -> tuple[dict[str, Tensor], int]:
        sums = {name: g.sum(0) for name, g in per_sample.items()}
        norm = torch.stack([s.square().sum() for s in sums.values()]).sum().sqrt()
        return {name: s * min(1.0, clip_norm / float(norm)) for name, s in sums.items()}, 0

    patch.setattr(mechanism, "clip", clip)
    patch.setattr(exactness, "clip", clip)


def per_tensor_clip(patch: Patch) -> None:
    """Every tensor gets the whole of C."""
    joint = mechanism.clip

    def clip(per_sample: Mapping[str, Tensor], clip_norm: float, stability: float = 0.0) -> tuple[dict[str, Tensor], int]:
        return {name: joint({name: g}, clip_norm)[0][name] for name, g in per_sample.items()}, 0

    patch.setattr(mechanism, "clip", clip)
    patch.setattr(exactness, "clip", clip)


def window_level_gradients(patch: Patch) -> None:
    """Swin's windows are dealt out as if they were records: each record gets every fourth window."""
    honest = fused._of_each_record

    def dealt(left: Tensor, right: Tensor, records: int) -> Tensor:
        order = torch.arange(left.shape[0]).view(-1, records).t().flatten()
        return honest(left[order], right[order], records)

    patch.setattr(fused, "_of_each_record", dealt)


def missing_layer(patch: Patch) -> None:
    """One layer's gradient never reaches the norm."""
    honest = PerSampleGradients.__call__

    def without_one(self: PerSampleGradients, records: int, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
        gradients = honest(self, records, losses)
        gradients.pop(next(iter(gradients)))
        return gradients

    patch.setattr(PerSampleGradients, "__call__", without_one)


def stale_factor(patch: Patch) -> None:
    """A frozen factor keeps its view and brings a gradient of its own into the step."""
    honest = PerSampleGradients.__call__

    def with_stale(self: PerSampleGradients, records: int, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
        gradients = honest(self, records, losses)
        frozen = next(n for n, p in self._parameters.items() if "lora_" in n and not p.requires_grad)
        return {**gradients, frozen: torch.ones(records, *self._parameters[frozen].shape)}

    patch.setattr(PerSampleGradients, "__call__", with_stale)


def double_count(patch: Patch) -> None:
    """Every record is counted twice."""
    honest = fused._of_each_record
    patch.setattr(fused, "_of_each_record", lambda *parts: 2 * honest(*parts))


def exact(factors: str) -> Callable[[], None]:
    return lambda: exactness.assert_exact("swin-tiny", factors, "frozen")


def checked() -> None:
    base, model = exactness.prepared("swin-tiny", "frozen", dtype=torch.float32)
    check(base, model)


@pytest.mark.parametrize("holds", [exact("A"), exact("B"), exact("AB"), sensitivity_holds, checked])
def test_without_a_mutation_every_check_passes(holds: Callable[[], None]) -> None:
    holds()


@pytest.mark.parametrize(
    ("mutate", "holds"),
    [
        (batch_level_clip, exact("AB")),
        (batch_level_clip, sensitivity_holds),
        (per_tensor_clip, exact("AB")),
        (per_tensor_clip, sensitivity_holds),
        (window_level_gradients, exact("AB")),
        (window_level_gradients, checked),
        (missing_layer, exact("AB")),
        (stale_factor, exact("B")),
        (double_count, exact("A")),
        (double_count, checked),
    ],
)
def test_a_mutation_is_caught(mutate: Callable[[Patch], None], holds: Callable[[], None], monkeypatch: Patch) -> None:
    mutate(monkeypatch)
    with pytest.raises((AssertionError, ConfigError)):
        holds()
