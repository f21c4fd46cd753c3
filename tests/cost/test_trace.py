"""What a traced pass says of itself, against what is known by hand."""

from __future__ import annotations

import torch

from lalora_flwr.adapter.lora import LORA
from lalora_flwr.adapter.slots import LORA_A, LORA_B
from lalora_flwr.cost.estimate import Model
from lalora_flwr.cost.trace import Like, Traced, traced
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings, settings_from

WIDE, CLASSES, RANK = 96, 3, 2  # wide enough for the product that `KERNELS` would give to oneDNN


def of_two_layers(records: int, device: str = "cpu") -> Traced:
    """A pass over Linear(96, 96), ReLU, Linear(96, 3) with LoRA on the first."""
    with torch.device(device):
        net = torch.nn.Sequential(torch.nn.Linear(WIDE, WIDE), torch.nn.ReLU(), torch.nn.Linear(WIDE, CLASSES))
    net.requires_grad_(False)
    base = BaseModel("two-layers", net, "", ("0",), (WIDE,), CLASSES)
    adapter = LORA.attach(base, LoraSettings(rank=RANK, targets="0"), seed=0)
    engine = PerSampleGradients(adapter.model, adapter.parameters)
    made_up = base.synthetic_batch(records, torch.Generator().manual_seed(0))
    return traced(base, adapter, engine, adapter.layout.of(LORA_B), made_up)


def test_the_products_of_a_pass_are_all_there() -> None:
    n = 8
    forward = n * WIDE * WIDE + n * WIDE * RANK + n * RANK * WIDE + n * WIDE * CLASSES
    backward = n * CLASSES * WIDE + n * WIDE * RANK  # through the last layer, and each record's gradient of B
    assert of_two_layers(n).flops == 2 * (forward + backward)


def test_twice_the_records_are_twice_the_products() -> None:
    assert of_two_layers(16).flops == 2 * of_two_layers(8).flops


def test_a_model_without_numbers_has_the_same_operations() -> None:
    real, numberless = of_two_layers(8), of_two_layers(8, "meta")
    assert (real.flops, real.calls) == (numberless.flops, numberless.calls)


def test_nothing_is_computed_and_the_adapter_stays() -> None:
    model = Model.of(settings_from({}), torch.float32)
    before = {name: value.detach().clone() for name, value in model.adapter.parameters.items()}
    model.traced(model.layout.of(LORA_A), 4, 0)
    assert all(torch.equal(before[name], value) for name, value in model.adapter.parameters.items())


def test_the_peak_holds_each_records_gradients_and_grows_with_them() -> None:
    model = Model.of(settings_from({}), torch.float32)
    of_b = model.layout.of(LORA_B)
    gradients = 4 * sum(torch.Size(slot.shape).numel() for slot in model.layout.only(of_b).values())
    peaks = [model.traced(of_b, records, 0).peak for records in (10, 20, 40)]
    assert all(peak > records * gradients for peak, records in zip(peaks, (10, 20, 40), strict=True))
    assert 1.7 < peaks[2] / peaks[1] < 2.3 and 1.7 < peaks[1] / peaks[0] < 2.3


def test_the_peak_is_that_of_the_real_pass() -> None:
    model = Model.of(settings_from({}), torch.float32)
    of_b = model.layout.of(LORA_B)
    inputs, labels = model.batch(32, 0)
    model.adapter.activate(of_b)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model.engine(32, lambda: model.adapter.losses(model.base, inputs, labels))
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    level = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    assert 0.8 * peak < model.traced(of_b, 32, 0).peak < 1.25 * peak


def test_a_stride_of_zero_is_memory_once() -> None:
    assert Like((64, 8, 8), (0, 8, 1), torch.float32).bytes == 8 * 8 * 4
    assert Like((64, 8, 8), (64, 8, 1), torch.bfloat16).bytes == 64 * 8 * 8 * 2
