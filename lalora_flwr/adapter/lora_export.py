"""What a run trained on adapted layers, as plain LoRA that stock PEFT loads, whatever form it had."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lalora_flwr.adapter.peft_folder import WRAPPED
from lalora_flwr.adapter.saved import CONFIG, WEIGHTS
from lalora_flwr.adapter.slots import LORA_A, LORA_B
from lalora_flwr.ground.files import PUBLIC, replace_file

OF_LORA = ".lora_"  # in the names of all that PEFT keeps of LoRA
Factors = tuple[Tensor, Tensor]  # A (r, n) and B (m, r)


def write_factors(folder: Path, factors: Mapping[str, Factors], scale: float, inside: str = "") -> None:
    """Put other factors into an adapter folder, each layer with a rank of its own.

    Args:
        folder: as ``PeftModel.save_pretrained`` has left it.
        factors: by the layer's name in the base model; all layers that it adapts.
        scale: α/r, what the product is multiplied with.
        inside: what names lose at their beginning before the folder is done, as in `finish_folder`.
    """
    tensors = {name: value for name, value in load_file(folder / WEIGHTS).items() if OF_LORA not in name}
    for layer, (A, B) in factors.items():
        tensors[f"{WRAPPED}{layer}.{LORA_A}.weight"] = A.contiguous()
        tensors[f"{WRAPPED}{layer}.{LORA_B}.weight"] = B.contiguous()
    ranks = {layer: len(A) for layer, (A, _) in factors.items()}
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["r"] = max(ranks.values())
    config["lora_alpha"] = scale * config["r"]
    others = {f"^{re.escape(name.removeprefix(inside))}": rank for name, rank in ranks.items() if rank < config["r"]}
    config["rank_pattern"] = others
    config["alpha_pattern"] = {name: scale * rank for name, rank in others.items()}
    replace_file(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}), mode=PUBLIC)
    replace_file(folder / CONFIG, json.dumps(config), mode=PUBLIC)


def factored(matrix: Tensor) -> Factors:
    """Factors A and B, float32, of which B A is the matrix up to the rounding of float32, of the least rank above 0.

    Args:
        matrix: of shape (m, n).
    """
    U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    least = float(S[0]) * max(matrix.shape) ** 0.5 * torch.finfo(torch.float32).eps / 8  # about what rounding the matrix makes
    rank = max(1, int((least < S).sum()))
    root = S[:rank].sqrt()
    return (root[:, None] * Vt[:rank]).float(), (U[:, :rank] * root).float()
