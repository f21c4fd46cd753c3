"""Which device and which precision this process computes with."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from lalora_flwr.ground.errors import ConfigError

log = logging.getLogger("lalora_flwr.site")


def choose_device(wanted: str) -> torch.device:
    """The device for ``train.device``, or for ``device`` in a site's node-config.

    ``auto`` takes the GPU this process may use, else the CPU.

    Flower's simulation hides every GPU from sites that reserve none (``train.num-gpus = 0``); that is said in the log.

    Raises:
        ConfigError: if a GPU is asked for and none can be used.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device = {wanted!r}: must be one of auto, cpu, cuda")
    usable = torch.cuda.is_available()
    hidden = not usable and os.environ.get("CUDA_VISIBLE_DEVICES") == "" and Path("/proc/driver/nvidia").exists()
    if wanted == "cuda" and not usable:
        hint = "it is hidden from this site: set train.num-gpus above 0" if hidden else "this process sees none"
        raise ConfigError(f"train.device = 'cuda': no GPU can be used; {hint}")
    if wanted == "auto" and hidden:
        log.warning("a GPU is present but hidden from this site, which trains on the CPU: set train.num-gpus above 0")
    return torch.device("cuda" if usable and wanted != "cpu" else "cpu")


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The precision of the frozen weights for ``model.dtype``: ``auto`` takes bfloat16 where the hardware computes in it."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
