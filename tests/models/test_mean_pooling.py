"""The mean over tokens against a loop over them, and when it is taken."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lalora_flwr.data.data_set import Facts
from lalora_flwr.models import load_base_model
from lalora_flwr.models.mean_pooling import MeanPooledClassifier
from lalora_flwr.settings import ModelSettings
from tests.models.folders import save_hf

WIDTH = 5


class Table(nn.Module):
    """An encoder that looks each token up."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.rows = nn.Embedding(30, WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.rows(input_ids))


@given(texts=st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=9), min_size=1, max_size=6), left=st.booleans())
def test_the_vector_of_a_text_is_the_mean_of_its_own_tokens(texts: list[list[int]], left: bool) -> None:
    torch.manual_seed(0)
    model = MeanPooledClassifier(Table(), 3).double()
    longest = max(map(len, texts))
    ids, mask = torch.full((len(texts), longest), 7), torch.zeros(len(texts), longest, dtype=torch.long)
    for i, text in enumerate(texts):
        place = slice(longest - len(text), None) if left else slice(len(text))
        ids[i, place], mask[i, place] = torch.tensor(text), 1
    found = model(input_ids=ids, attention_mask=mask).logits
    for logits, text in zip(found, texts, strict=True):
        vector = torch.zeros(WIDTH, dtype=torch.float64)
        for token in text:
            vector += model.encoder.rows.weight[token] / len(text)
        assert torch.allclose(logits, model.classifier.weight @ vector + model.classifier.bias)


def test_a_text_without_any_token_is_zero_and_not_nan() -> None:
    model = MeanPooledClassifier(Table(), 3)
    logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long), attention_mask=torch.zeros(1, 2, dtype=torch.long)).logits
    assert torch.equal(logits[0], model.classifier.bias)


def pooled(folder: Path, pooling: str, task: str = "text") -> bool:
    facts = Facts(task, ("a", "b") if task == "text" else ())
    base = load_base_model(ModelSettings(name=f"hf/{folder}", pooling=pooling), facts)
    return isinstance(base.module, MeanPooledClassifier)


def says(folder: Path, mean: bool) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": mean}))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama"])
def test_the_setting_decides(tmp_path: Path, family: str) -> None:
    save_hf(tmp_path, family, "base")
    assert [pooled(tmp_path, pooling) for pooling in ("auto", "model", "mean")] == [False, False, True]


@pytest.mark.parametrize("mean", [True, False])
def test_auto_follows_the_folder(tmp_path: Path, mean: bool) -> None:
    save_hf(tmp_path, "bert", "base")
    says(tmp_path, mean)
    assert [pooled(tmp_path, pooling) for pooling in ("auto", "model", "mean")] == [mean, False, True]


@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_a_language_model_is_never_pooled(tmp_path: Path, pooling: str) -> None:
    save_hf(tmp_path, "llama", "causal")
    says(tmp_path, True)
    assert not pooled(tmp_path, pooling, "language")


def test_the_encoder_keeps_its_weights_and_the_head_is_fresh(tmp_path: Path) -> None:
    saved = save_hf(tmp_path, "bert", "base")
    facts = Facts("text", ("a", "b", "c"))
    base = load_base_model(ModelSettings(name=f"hf/{tmp_path}", pooling="mean"), facts)
    for name, tensor in base.module.encoder.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name]), name
    assert (base.head, base.fresh_head, base.module.classifier.out_features) == ("classifier", True, 3)
