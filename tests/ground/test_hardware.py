"""Which device and precision a process takes, and what it says of a GPU that is missing or hidden."""

from __future__ import annotations

import logging

import pytest
import torch

from lalora_flwr.ground import hardware
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.hardware import Machine, choose_device, choose_dtype
from lalora_flwr.settings import settings_from
from lalora_flwr.training.learner import ModelStore

NO_GPU = Machine(gpu=False, hidden_gpu=False, cpu_bfloat16=False)
GPU = Machine(gpu=True, hidden_gpu=False, cpu_bfloat16=False)
HIDDEN = Machine(gpu=False, hidden_gpu=True, cpu_bfloat16=False)  # as Flower's simulation does to a site that reserves none


def test_without_a_gpu_a_site_trains_on_the_cpu() -> None:
    assert choose_device("auto", NO_GPU).type == choose_device("cpu", NO_GPU).type == "cpu"


def test_a_usable_gpu_is_taken_unless_the_cpu_is_asked_for() -> None:
    assert choose_device("auto", GPU).type == choose_device("cuda", GPU).type == "cuda"
    assert choose_device("cpu", GPU).type == "cpu"


def test_a_gpu_that_is_asked_for_and_missing_is_refused() -> None:
    with pytest.raises(ConfigError, match="sees none"):
        choose_device("cuda", NO_GPU)


def test_a_hidden_gpu_is_named_with_the_key_that_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"train\.num-gpus"):
        choose_device("cuda", HIDDEN)
    with caplog.at_level(logging.WARNING, logger=hardware.log.name):
        assert choose_device("auto", HIDDEN).type == "cpu"
    assert "train.num-gpus" in caplog.text


@pytest.mark.parametrize("fast", [False, True])
def test_auto_takes_bfloat16_only_where_the_cpu_computes_in_it(fast: bool) -> None:
    cpu, machine = torch.device("cpu"), Machine(gpu=False, hidden_gpu=False, cpu_bfloat16=fast)
    for wanted in ("auto", "nf4"):  # which is the rest's in four bits
        assert choose_dtype(wanted, cpu, machine) == (torch.bfloat16 if fast else torch.float32)
    assert choose_dtype("float32", cpu, machine) == torch.float32
    assert choose_dtype("bfloat16", cpu, machine) == torch.bfloat16


def test_this_machine_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = Machine.this()
    assert found.gpu == torch.cuda.is_available() and not found.hidden_gpu


def test_a_device_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="device = 'gpu'"):
        choose_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_sites_own_word_on_the_device_wins() -> None:
    with pytest.raises(ConfigError, match="cuda"):
        ModelStore().learner(settings_from({}), "cuda")
    assert ModelStore().learner(settings_from({"train.device": "cuda"}), "cpu").adapter.device.type == "cpu"
