"""How far one record's leaving moves the clipped sum, in units of C: its own part, and the rounding of all the others.

    python -W ignore -m benchmarks.batch_rounding [cpu | cuda]

Records of a batch are computed together, and a kernel may add in another order for another size of batch. Random weights,
gradients far above C, so that each record's part has norm C. The last column is what it costs to compute each record alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from benchmarks.machine import processor
from lalora_flwr.adapter.lora import LORA
from lalora_flwr.adapter.slots import LORA_B
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.models.base import BaseModel
from lalora_flwr.privacy.clip import clip
from lalora_flwr.settings import LoraSettings

BOUND = 1e-2  # C
BATCHES = (4, 16)
TOKENS = 64


def vit() -> tuple[nn.Module, str, tuple[str, ...]]:
    return timm.create_model("vit_tiny_patch16_224", num_classes=10), "head", ("attn.qkv", "attn.proj")


def swin() -> tuple[nn.Module, str, tuple[str, ...]]:
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=10), "head.fc", ("attn.qkv", "attn.proj")


def roberta() -> tuple[nn.Module, str, tuple[str, ...]]:
    config = RobertaConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, num_labels=10)
    return RobertaForSequenceClassification(config), "classifier", ("query", "key", "value", "dense")


MODELS: dict[str, Callable[[], tuple[nn.Module, str, tuple[str, ...]]]] = {
    "ViT-Ti/16": vit,
    "Swin-T": swin,
    "RoBERTa 6 x 384": roberta,
}


class Subject:
    """A model with an adapter off zero, and made-up records of it."""

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        module, head, targets = MODELS[name]()
        module.eval().requires_grad_(False).to(device, dtype)
        base = BaseModel(name, module, head, targets, (), 10)
        adapter = LORA.attach(base, LoraSettings(rank=4, alpha=8.0), seed=0)
        self._model = adapter.model.to(device)
        with torch.no_grad():
            for parameter_name in adapter.layout.of(LORA_B):
                adapter.parameters[parameter_name].normal_(std=0.3)
        self._engine = PerSampleGradients(self._model, adapter.parameters)
        adapter.activate(adapter.layout.names)
        self._text, self._dtype, self._device = name == "RoBERTa 6 x 384", dtype, device

    def records(self, count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count, device=self._device) % 10
        if self._text:
            return torch.randint(3, 50000, (count, TOKENS), device=self._device), labels
        return torch.randn(count, 3, 224, 224, device=self._device, dtype=self._dtype), labels

    def clipped(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        def losses() -> Tensor:
            output = self._model(input_ids=inputs).logits if self._text else self._model(inputs)
            return F.cross_entropy(output.float(), labels, reduction="none")

        return clip(self._engine(len(labels), losses), BOUND)[0]


def norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([t.square().sum() for t in tensors.values()]).sum().sqrt()) / BOUND


def seconds(subject: Subject, x: Tensor, y: Tensor, at_once: int) -> float:
    """The least time of three for all records, so many at once; a GPU is waited for."""

    def once() -> float:
        begun = time.perf_counter()
        for some, labels in zip(x.split(at_once), y.split(at_once), strict=True):
            subject.clipped(some, labels)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return min(once() for _ in range(3))


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    print(torch.cuda.get_device_name() if device.type == "cuda" else processor())
    print(f"{'model':<16} {'base':<9} {'batch':>5}  {'moved / C':>14}  {'others / C':>10}  {'alone, time':>11}")
    for name in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            subject = Subject(name, dtype, device)
            for count in BATCHES:
                x, y = subject.records(count)
                whole, rest, own = subject.clipped(x, y), subject.clipped(x[1:], y[1:]), subject.clipped(x[:1], y[:1])
                moved = norm({n: whole[n] - rest[n] for n in whole})
                others = norm({n: whole[n] - rest[n] - own[n] for n in whole})
                ratio = seconds(subject, x, y, 1) / seconds(subject, x, y, count)
                print(f"{name:<16} {str(dtype)[6:]:<9} {count:>5}  {moved:>14.10f}  {others:>10.1e}  {ratio:>11.2f}", flush=True)


if __name__ == "__main__":
    main()
