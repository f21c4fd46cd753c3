"""The engine on full-size architectures with random weights.

    python -m benchmarks.full_size [NAME …]     all but Llama by default; `llama` needs 16 GB, `llama-nf4` 7 GB

Each is built, adapted, and put through the check before training: the gradients of three made-up records together and
alone. Llama (the sizes of Llama-2-7B) is built in bfloat16 and takes one step's gradients of B on two examples of 32 tokens.
`llama-nf4` is the same in four bits, made layer by layer, and goes through the check as well, with texts of up to 32 tokens.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace

import torch
from torch import nn

from benchmarks.architectures import ARCHITECTURES, build
from lalora_flwr.adapter.lora import LORA
from lalora_flwr.adapter.slots import LORA_B
from lalora_flwr.gradients.engine import PerSampleGradients
from lalora_flwr.gradients.self_check import self_check
from lalora_flwr.models.four_bits import in_four_bits
from lalora_flwr.settings import LoraSettings

TOKENS = 32


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


def four_bits() -> str:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        base = build("llama", small=False)
    base = replace(base, max_tokens=TOKENS)
    network, begun = base.module.model, time.perf_counter()
    for layer in network.layers:
        materialise(layer)
        in_four_bits(replace(base, module=layer))
    network.rotary_emb = type(network.rotary_emb)(base.module.config)
    materialise(base.module)
    base = replace(base, whole=("lm_head",))
    base.module.requires_grad_(False)
    base.checkpoint_activations()
    made = time.perf_counter() - begun
    adapter = LORA.attach(base, LoraSettings(rank=8, alpha=8.0), seed=0)
    torch.set_default_dtype(torch.float32)
    engine, begun = PerSampleGradients(adapter.model, adapter.parameters), time.perf_counter()
    adapter.activate(adapter.layout.of(LORA_B))
    inputs, labels = base.synthetic_batch(2, torch.Generator().manual_seed(0))
    gradients = engine(2, lambda: adapter.losses(base, inputs, labels))
    finite = all(bool(torch.isfinite(g).all()) for g in gradients.values())
    a_step, begun = time.perf_counter() - begun, time.perf_counter()
    after_step = peak()
    self_check(base, adapter, engine)
    return (
        f"packed in {made:.0f} s; a step {a_step:.0f} s, {len(gradients)} tensors, finite: {finite}, peak {after_step:.1f} GB; "
        f"check passed in {time.perf_counter() - begun:.0f} s, peak {peak():.1f} GB"
    )


def materialise(module: nn.Module) -> None:
    """Random numbers for all parameters that have none yet, ones for norms."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16)
                setattr(part, name, nn.Parameter(value.fill_(1) if value.dim() == 1 else value.normal_(0, 0.02)))


def peak() -> float:
    """Of this process's memory so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    for name in sys.argv[1:] or [n for n in ARCHITECTURES if not n.startswith("llama")]:
        begun = time.perf_counter()
        result = four_bits() if name == "llama-nf4" else step(name) if name.startswith("llama") else check(name)
        print(f"{name}: {result}, {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
