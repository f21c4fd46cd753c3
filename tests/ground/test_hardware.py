from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lalora_flwr.ground import hardware
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.hardware import choose_device, choose_dtype
from lalora_flwr.settings import settings_from
from lalora_flwr.training.learner import ModelStore


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    return monkeypatch


def hide_gpu(machine: pytest.MonkeyPatch) -> None:
    """What Flower's simulation does to a site that reserves no GPU, on a machine that has one."""
    machine.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.setattr(Path, "exists", lambda self: str(self) == "/proc/driver/nvidia")


def test_without_a_gpu_a_site_trains_on_the_cpu(machine: pytest.MonkeyPatch) -> None:
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"


def test_a_usable_gpu_is_taken_unless_the_cpu_is_asked_for(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert choose_device("cpu").type == "cpu"


def test_a_gpu_that_is_asked_for_and_missing_is_refused(machine: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="sees none"):
        choose_device("cuda")


def test_a_hidden_gpu_is_named_with_the_key_that_shows_it(machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    hide_gpu(machine)
    with pytest.raises(ConfigError, match=r"train\.num-gpus"):
        choose_device("cuda")
    with caplog.at_level(logging.WARNING, logger=hardware.log.name):
        assert choose_device("auto").type == "cpu"
    assert "train.num-gpus" in caplog.text


@pytest.mark.parametrize(("amx", "avx"), [(False, False), (True, False), (False, True)])
def test_auto_takes_bfloat16_only_where_the_cpu_computes_in_it(machine: pytest.MonkeyPatch, amx: bool, avx: bool) -> None:
    machine.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    machine.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == (torch.bfloat16 if amx or avx else torch.float32)
    assert choose_dtype("float32", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16


def test_a_device_that_is_none_is_refused(machine: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="device = 'gpu'"):
        choose_device("gpu")


def test_a_sites_own_word_on_the_device_wins(machine: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cuda"):
        ModelStore().learner(settings_from({}), "cuda")
    assert ModelStore().learner(settings_from({"train.device": "cuda"}), "cpu").adapter.device.type == "cpu"
