"""The engine on full-size architectures with random weights.

    python -m benchmarks.full_size [NAME …]     all but Llama by default; `llama` needs 16 GB

Each is built, adapted, and put through the check before training: the gradients of three made-up records together and
alone. Llama (the sizes of Llama-2-7B) is built in bfloat16 and takes one step's gradients of B on two examples of 32 tokens.
"""

from __future__ import annotations

import sys
import time

import torch

from benchmarks.architectures import ARCHITECTURES, build
from lalora_flwr.adapter.lora import LORA
from lalora_flwr.adapter.slots import LORA_B
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.self_check import self_check
from lalora_flwr.settings import LoraSettings


def check(name: str) -> str:
    base = build(name, small=False)
    adapter = LORA.attach(base, LoraSettings(rank=8, alpha=8.0, head="trained" if base.head else "frozen"), seed=0)
    self_check(base, adapter, PerSampleGradients(adapter.model, adapter.parameters))
    return f"{sum(p.numel() for p in adapter.model.parameters()) / 1e6:.0f} M parameters: check passed"


def step(name: str) -> str:
    torch.set_default_dtype(torch.bfloat16)  # so that the weights are never float32
    base = build(name, small=False)
    adapter = LORA.attach(base, LoraSettings(rank=8, alpha=8.0), seed=0)
    torch.set_default_dtype(torch.float32)
    model, engine = adapter.model, PerSampleGradients(adapter.model, adapter.parameters)
    inputs, labels = base.synthetic_batch(2, torch.Generator().manual_seed(0))
    assert isinstance(inputs, dict)
    inputs = {key: value[:2, -32:] for key, value in inputs.items()}
    labels = labels[:, -32:] if labels.dim() > 1 else labels
    adapter.activate(adapter.layout.of(LORA_B))
    gradients = engine(2, lambda: base.losses(model, inputs, labels))
    finite = all(bool(torch.isfinite(g).all()) for g in gradients.values())
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters: {len(gradients)} tensors, finite: {finite}"


def main() -> None:
    for name in sys.argv[1:] or [n for n in ARCHITECTURES if not n.startswith("llama")]:
        begun = time.perf_counter()
        result = step(name) if name.startswith("llama") else check(name)
        print(f"{name}: {result}, {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
