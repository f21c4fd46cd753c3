"""Runs on a base in four bits: what they leave fits the published weights, whole or in four bits as transformers makes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from lalora_flwr.adapter.lora import LORA
from lalora_flwr.data.data_set import data_set, facts
from lalora_flwr.models import load_base_model
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.four_bits import FourBitLinear
from lalora_flwr.training.learner import cast_base
from tests.conftest import Finished, Spy, run_spied, small
from tests.models.files import save_rows, texts
from tests.models.folders import save_hf

RUN: dict[str, Any] = {
    "strategy": "dp-lora",
    "num_rounds": 1,
    "num_supernodes": 2,
    "train__batch_size": 8,
    "train__lr": 2.0,
    "lora__targets": "auto",
    "lora__head": "trained",
    "data__max_tokens": 24,
    "data__min_records": 1,
    "privacy__epsilon": 100.0,
    "privacy__accountant": "rdp",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_hf(folder, "bert", "classifier", hidden_size=64, intermediate_size=128, num_labels=2)
    return folder


def finished(folder: Path, model: Path, **more: Any) -> Finished:
    folder.mkdir(exist_ok=True)
    data = {"data__name": save_rows(folder / "train.jsonl", texts(40)), "data__test": "hold-out:0.3"}
    settings = small(folder, **{**RUN, **data, "model__name": f"hf/{model}", "model__dtype": "nf4", **more})
    spy = Spy()
    return Finished(run_spied(settings, spy), settings, spy)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished(tmp_path_factory.mktemp("run"), model)


@pytest.fixture(scope="module")
def base(run: Finished) -> BaseModel:
    """The run's own, with all that is not in four bits in float32 on any machine, and wrapped in the adapter."""
    loaded = load_base_model(run.settings.model, facts(run.settings), run.settings.data.max_tokens)
    loaded.module.requires_grad_(False)
    made = cast_base(loaded, torch.device("cpu"), torch.float32, four_bits=True)
    adapter = LORA.attach(made, run.settings.lora, 0)
    adapter.load(run.checkpoint)
    return replace(made, module=adapter.model.eval())


def said(base: BaseModel, run: Finished, module: nn.Module) -> torch.Tensor:
    """Logits of the public records."""
    records = data_set(run.settings).public(base.encode)
    inputs, _ = records.batch(torch.arange(len(records)))
    with torch.no_grad():
        return base.logits(module, inputs)


def test_the_base_is_in_four_bits_and_the_server_says_the_digest_of_the_published_weights(
    run: Finished, base: BaseModel, model: Path, tmp_path: Path
) -> None:
    assert sum(isinstance(module, FourBitLinear) for module in base.module.modules()) == 13
    assert finished(tmp_path, model, model__dtype="float32").summary["model_digest"] == run.summary["model_digest"]


def test_the_adapter_fits_a_base_that_transformers_has_in_four_bits(run: Finished, base: BaseModel, model: Path) -> None:
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"])
    plain = AutoModelForSequenceClassification.from_pretrained(model, quantization_config=four, device_map="cpu")
    loaded = PeftModel.from_pretrained(plain, str(run.path / "adapter")).eval()
    assert sum(isinstance(module, Linear4bit) for module in loaded.modules()) == 13
    own = dict(base.module.named_modules())
    for name, module in loaded.named_modules():
        if isinstance(module, Linear4bit):
            bits = module.weight.data, module.weight.quant_state
            assert torch.equal(dequantize_4bit(*bits), own[name].weight), name
    # bitsandbytes multiplies in bfloat16 on some processors
    assert torch.allclose(said(base, run, loaded), said(base, run, base.module), atol=5e-3)


def test_and_the_published_weights_into_which_it_can_be_merged(run: Finished, base: BaseModel, model: Path) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(model)
    loaded = PeftModel.from_pretrained(plain, str(run.path / "adapter")).eval()
    whole, four = said(base, run, loaded), said(base, run, base.module)
    assert 1e-4 < (whole - four).abs().max() < 0.5 * four.abs().max()
    merged = loaded.merge_and_unload()
    assert torch.allclose(said(base, run, merged), whole, atol=1e-4)


def test_the_model_card_makes_the_four_bits(run: Finished) -> None:
    card = (run.path / "adapter" / "README.md").read_text()
    assert "Linear4bit(" in card and "not name.endswith(('classifier',))" in card


def test_sites_that_share_a_pass_have_the_bits_of_sites_alone(model: Path, tmp_path: Path) -> None:
    found = [finished(tmp_path / word, model, train__share_passes=word).checkpoint for word in ("exact", "off")]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_site_may_keep_four_bits_where_others_keep_all(model: Path, tmp_path: Path) -> None:
    plain = finished(tmp_path / "plain", model, model__dtype="float32")
    mixed = finished(tmp_path / "mixed", model, model__dtype="float32", profiles="precision=nf4;")
    for name in ("epsilon", "noise_multiplier", "sites"):
        assert mixed.summary[name] == plain.summary[name]
    assert any(not torch.equal(value, mixed.checkpoint[name]) for name, value in plain.checkpoint.items())
