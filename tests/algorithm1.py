"""LA-LoRA's local loop (arXiv 2602.19926, Algorithm 1) in the paper's words, one record and one number after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor

from lalora_flwr.data.records import Records
from tests.reference import Replay, joint_norm


def smooth(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """One signal convolved with (1 4 6 4 1)/16, the edge mirrored with the edge value repeated: … b a | a b c …"""
    n, out = len(signal), np.zeros(len(signal))
    for i in range(n):
        for offset, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
            at = i + offset
            while not 0 <= at < n:
                at = -1 - at if at < 0 else 2 * n - 1 - at
            out[i] += weight / 16 * signal[at]
    return out


@dataclass(frozen=True)
class Algorithm1:
    """The constants of a local loop, in the paper's notation; σ = 0 means neither clip nor noise."""

    steps: int
    q: float
    clip_norm: float
    sigma: float
    eta: float
    order: str = "BA"  # the factors of step k, by turns; "*" for both at once
    filtered: bool = True
    momentum: float = 0.0
    decay: float = 0.0
    adamw: bool = False
    head: bool = False
    damping: float = 0.0  # δ of Theorem 2's step; 0: it is not taken
    apart: float = 0.0  # of C for A, which is then clipped by itself; 0: all together
    slow: float = 1.0  # of the rate, for A
    gamma: float = 0.0  # AUTO-S (arXiv 2206.07136, Algorithm 1): divide by the norm plus this


def mlp_weights(model: PeftModel) -> dict[str, Tensor]:
    """Weights of an adapted `Mlp` in float64, as W, b, A and B of each layer."""
    short = {
        "base_layer.": "",
        "lora_A.default.weight": "A",
        "lora_B.default.weight": "B",
        "modules_to_save.default.": "",
    }
    weights = {}
    for name, value in model.base_model.model.state_dict().items():
        if "original_module" not in name:
            for long, new in short.items():
                name = name.replace(long, new)
            weights[name] = value.detach().double().clone()
    return weights


def mlp_loss(w: Mapping[str, Tensor], scale: float, x: Tensor, label: int) -> Tensor:
    """Cross-entropy of one record under W = W0 + (α/r) B A in both adapted layers."""
    for layer in ("first", "second"):
        x = torch.tanh((w[f"{layer}.weight"] + scale * w[f"{layer}.B"] @ w[f"{layer}.A"]) @ x + w[f"{layer}.bias"])
    logits = w["head.weight"] @ x + w["head.bias"]
    return torch.log(torch.exp(logits).sum()) - logits[label]


def descend(w: Tensor, g: Tensor, memory: dict[str, Any], run: Algorithm1) -> Tensor:
    """One optimizer step on one tensor, by hand; ``memory`` is the tensor's own, so a frozen tensor's stands still."""
    if not run.adamw:
        g = g + run.decay * w
        memory["v"] = run.momentum * memory["v"] + g if memory else g
        return w - run.eta * memory["v"]
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
    v = memory["s"] = 0.999 * memory.get("s", 0.0) + 0.001 * g * g
    return w - run.eta * run.decay * w - run.eta * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def algorithm_1(w: dict[str, Tensor], scale: float, data: Records, run: Algorithm1, source: Replay) -> Iterator[None]:
    """LA-LoRA's local loop (arXiv 2602.19926, Algorithm 1) on an `Mlp`; changes ``w`` in place, yields after a step."""
    memory: dict[str, dict[str, Any]] = {n: {} for n in w}
    for k in range(run.steps):
        turn = run.order[k % len(run.order)]
        active = [n for n in w if n[-2:] in ((".A", ".B") if turn == "*" else ("." + turn,))]
        active += [n for n in w if run.head and n.startswith("head.")]
        drawn = [j for j, u in enumerate(source.uniform(len(data)).tolist()) if u < run.q]
        total = {n: torch.zeros_like(w[n]) for n in active}
        for j in drawn:
            leaves = {n: w[n].clone().requires_grad_() for n in active}
            loss = mlp_loss({**w, **leaves}, scale, data.inputs[j].double(), int(data.labels[j]))
            g = dict(zip(active, torch.autograd.grad(loss, list(leaves.values())), strict=True))
            shrink = max(1.0, joint_norm(g) / run.clip_norm) if run.sigma else 1.0
            if run.gamma and run.sigma:
                shrink = (joint_norm(g) + run.gamma) / run.clip_norm
            shrinks = dict.fromkeys(active, shrink)
            of_a = {n: g[n] for n in active if n.endswith(".A")}
            if run.apart and run.sigma and 0 < len(of_a) < len(active):
                rest = {n: g[n] for n in active if n not in of_a}
                for group, share in ((of_a, run.apart), (rest, (1 - run.apart**2) ** 0.5)):
                    shrinks |= dict.fromkeys(group, max(1.0, joint_norm(group) / (share * run.clip_norm)))
            total = {n: total[n] + g[n] / shrinks[n] for n in active}
        found = {n: w[n].clone() for n in w}
        for n in active:
            noise = run.sigma * run.clip_norm * source.normal(w[n].shape).double()
            g_hat = (total[n] + noise) / (run.q * len(data))
            if run.filtered and n.endswith(".A"):  # each row, along the input features
                g_hat = torch.tensor(np.stack([smooth(row) for row in g_hat.numpy()]))
            elif run.filtered and n.endswith(".B"):  # each column, along the output features
                g_hat = torch.tensor(np.stack([smooth(column) for column in g_hat.numpy().T]).T)
            if run.damping and n[-2:] in (".A", ".B"):  # g_B (A Aᵀ + δ I)⁻¹ and (Bᵀ B + δ I)⁻¹ g_A
                A, B = found[n[:-1] + "A"], found[n[:-1] + "B"]
                square = (A @ A.T if n.endswith(".B") else B.T @ B) + run.damping * torch.eye(len(A), dtype=torch.float64)
                g_hat = g_hat @ torch.inverse(square) if n.endswith(".B") else torch.inverse(square) @ g_hat
            w[n] = descend(w[n], g_hat * (run.slow if n.endswith(".A") else 1.0), memory[n], run)
        yield
