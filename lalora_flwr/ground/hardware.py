"""Which device and which precision this process computes with."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lalora_flwr.ground.errors import ConfigError

log = logging.getLogger("lalora_flwr.site")


@dataclass(frozen=True)
class Machine:
    """What there is to compute with, as torch and the system say.

    Attributes:
        gpu: whether this process may use a GPU.
        hidden_gpu: whether there is one that was hidden from this process.
        cpu_bfloat16: whether the CPU computes in bfloat16.
    """

    gpu: bool
    hidden_gpu: bool
    cpu_bfloat16: bool

    @staticmethod
    def this() -> Machine:
        gpu = torch.cuda.is_available()
        hidden = not gpu and os.environ.get("CUDA_VISIBLE_DEVICES") == "" and Path("/proc/driver/nvidia").exists()
        return Machine(gpu, hidden, torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_device(wanted: str, machine: Machine | None = None) -> torch.device:
    """The device for ``train.device``, or for ``device`` in a site's node-config.

    ``auto`` takes the GPU this process may use, else the CPU.

    Flower's simulation hides every GPU from sites that reserve none (``train.num-gpus = 0``); that is said in the log.

    Raises:
        ConfigError: if a GPU is asked for and none can be used.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device = {wanted!r}: must be one of auto, cpu, cuda")
    machine = machine or Machine.this()
    if wanted == "cuda" and not machine.gpu:
        hint = "it is hidden from this site: set train.num-gpus above 0" if machine.hidden_gpu else "this process sees none"
        raise ConfigError(f"train.device = 'cuda': no GPU can be used; {hint}")
    if wanted == "auto" and machine.hidden_gpu:
        log.warning("a GPU is present but hidden from this site, which trains on the CPU: set train.num-gpus above 0")
    return torch.device("cuda" if machine.gpu and wanted != "cpu" else "cpu")


def choose_dtype(wanted: str, device: torch.device, machine: Machine | None = None) -> torch.dtype:
    """The precision of the frozen weights for ``model.dtype``: ``auto`` takes bfloat16 where the hardware computes in it.

    So does ``nf4``, for products and for all that is not kept in four bits.
    """
    if wanted not in ("auto", "nf4"):
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = (machine or Machine.this()).cpu_bfloat16
    return torch.bfloat16 if fast else torch.float32
