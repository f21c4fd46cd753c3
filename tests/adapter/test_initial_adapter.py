"""Every site starts from the same adapter, whatever it computes with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lalora_flwr.adapter.slots import digest
from lalora_flwr.data.data_set import Facts
from lalora_flwr.models import load_base_model
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings, ModelSettings
from lalora_flwr.training.learner import ModelStore, cast_base
from tests.adapters import adapter_state, attach_adapter, factor_of
from tests.conftest import small
from tests.models.folders import save_hf, save_timm
from tests.reference import BASES, adapted

CPU = torch.device("cpu")


def text(folder: Path, classes: int) -> BaseModel:
    save_hf(folder, "roberta", "classifier", num_labels=3)
    return load_base_model(ModelSettings(name=f"hf/{folder}"), Facts("text", tuple("abcde"[:classes])))


def two_part_head(folder: Path, classes: int) -> BaseModel:
    save_hf(folder, "distilbert", "classifier", num_labels=3)  # pre_classifier and classifier
    return load_base_model(ModelSettings(name=f"hf/{folder}"), Facts("text", tuple("abcde"[:classes])))


def image(folder: Path, classes: int) -> BaseModel:
    save_timm(folder, "swin", classes=3)
    return load_base_model(ModelSettings(name=f"timm/{folder}"), Facts("image", tuple("abcde"[:classes])))


def initial(base: BaseModel, dtype: torch.dtype, head: str) -> dict[str, Tensor]:
    model = attach_adapter(cast_base(base, CPU, dtype), LoraSettings(rank=3, head=head), seed=2**63 + 5)
    assert next(p for p in model.parameters() if not p.requires_grad).dtype == dtype
    return adapter_state(model)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("classes", [3, 5])  # the published head, and a fresh one
@pytest.mark.parametrize("load", [text, two_part_head, image])
def test_a_low_precision_base_starts_with_the_same_bits(
    tmp_path: Path, load: Callable[[Path, int], BaseModel], classes: int, head: str
) -> None:
    full, low = (initial(load(tmp_path, classes), dtype, head) for dtype in (torch.float32, torch.bfloat16))
    assert digest(full) == digest(low)
    assert all(t.dtype == torch.float32 for t in low.values())


def test_a_published_head_is_trained_from_its_published_values(tmp_path: Path) -> None:
    base = text(tmp_path, 3)
    published = {name: t.clone() for name, t in base.module.classifier.state_dict().items()}
    state = initial(base, torch.bfloat16, "trained")
    head = {name.rpartition("classifier.")[2]: t for name, t in state.items() if factor_of(name) == "head"}
    assert head.keys() == published.keys()
    assert all(torch.equal(head[name], t) for name, t in published.items())


def test_a_is_kaiming_uniform_and_in_full_precision() -> None:
    scaled = []
    for seed in range(10):
        base = BASES["vit"]()
        base.module.bfloat16()
        for name, t in adapter_state(adapted(base, seed=seed, rank=8)).items():
            if factor_of(name) == "A":
                assert not torch.equal(t, t.bfloat16().float())
                scaled.append(t.flatten() * math.sqrt(t.shape[1]))
    drawn = torch.cat(scaled)
    assert float(drawn.abs().max()) <= 1 and float(drawn.std()) == pytest.approx(1 / math.sqrt(3), rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_starts_with_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    there = cast_base(text(tmp_path, 5), torch.device("cuda"), dtype)
    model = attach_adapter(there, LoraSettings(rank=3, head="trained"), seed=2**63 + 5)
    assert digest(adapter_state(model)) == digest(initial(text(tmp_path, 5), torch.float32, "trained"))


@pytest.mark.parametrize("strategy", ["ffa-lora", "la-lora"])
def test_a_run_sends_one_start_to_sites_of_either_precision(tmp_path: Path, strategy: str) -> None:
    def start(dtype: str) -> str:
        settings = small(tmp_path, strategy=strategy, model__dtype=dtype, lora__head="trained")
        return digest(ModelStore().learner(settings).initial)

    assert start("float32") == start("bfloat16")
