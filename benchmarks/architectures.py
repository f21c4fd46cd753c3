"""The architectures the engine is held to, with random weights from their configurations: full size, or small for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers
from torch import nn

from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.targets import TIMM_TARGETS, TRANSFORMERS_TARGETS
from lalora_flwr.models.text import CausalLanguageModel, SequenceClassifier


@dataclass(frozen=True)
class Architecture:
    """``make(small)`` builds it; ``image``: whether its records are images."""

    make: Callable[[bool], BaseModel]
    image: bool = False


def _timm(name: str, size: int = 224, **small: Any) -> Architecture:
    def make(is_small: bool) -> BaseModel:
        options, side, classes = (small, small["img_size"], 10) if is_small else ({}, size, 100)
        module = timm.create_model(name, pretrained=False, num_classes=classes, **options)
        head = str(module.default_cfg["classifier"])
        return BaseModel(f"timm/{name}", module, head, TIMM_TARGETS, (3, side, side), classes)

    return Architecture(make, image=True)


def _transformers(
    config_class: Any, model_class: Any, head: str, full: dict[str, Any], small: dict[str, Any], *, causal: bool = False
) -> Architecture:
    def make(is_small: bool) -> BaseModel:
        config = config_class(**(small if is_small else full), pad_token_id=1)
        module: nn.Module = model_class(config)
        targets = TRANSFORMERS_TARGETS[config.model_type]
        kind = CausalLanguageModel if causal else SequenceClassifier
        classes = config.vocab_size if causal else config.num_labels
        return kind(f"hf/{config.model_type}", module, head, targets, (12 if is_small else 128,), classes)

    return Architecture(make)


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 64, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 2)}
_BERT = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_DISTIL = {"vocab_size": 60, "dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
_GPT2 = {"vocab_size": 60, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32}
_LLAMA = {**_BERT, "num_key_value_heads": 1}
_LLAMA_7B: dict[str, Any] = {}  # the configuration's defaults are Llama-2-7B's sizes
_ROBERTA_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}

ARCHITECTURES: dict[str, Architecture] = {
    "swin-tiny": _timm("swin_tiny_patch4_window7_224", **_SWIN),
    "swin-base": _timm("swin_base_patch4_window7_224", **_SWIN),
    "vit-base": _timm("vit_base_patch16_224", **_VIT),
    "deit-tiny": _timm("deit_tiny_patch16_224", **_VIT),
    "roberta-base": _transformers(
        transformers.RobertaConfig,
        transformers.RobertaForSequenceClassification,
        "classifier",
        {"vocab_size": 50265, "max_position_embeddings": 514},
        _BERT,
    ),
    "roberta-large": _transformers(
        transformers.RobertaConfig,
        transformers.RobertaForSequenceClassification,
        "classifier",
        {"vocab_size": 50265, "max_position_embeddings": 514, **_ROBERTA_LARGE},
        _BERT,
    ),
    "minilm": _transformers(transformers.BertConfig, transformers.BertForSequenceClassification, "classifier", _MINILM, _BERT),
    "distilbert": _transformers(
        transformers.DistilBertConfig, transformers.DistilBertForSequenceClassification, "classifier", {}, _DISTIL
    ),
    "gpt2": _transformers(transformers.GPT2Config, transformers.GPT2LMHeadModel, "", {}, _GPT2, causal=True),
    "gpt2-classifier": _transformers(transformers.GPT2Config, transformers.GPT2ForSequenceClassification, "score", {}, _GPT2),
    "llama": _transformers(transformers.LlamaConfig, transformers.LlamaForCausalLM, "", _LLAMA_7B, _LLAMA, causal=True),
    "llama-classifier": _transformers(
        transformers.LlamaConfig, transformers.LlamaForSequenceClassification, "score", _LLAMA_7B, _LLAMA
    ),
}


def build(name: str, *, small: bool, seed: int = 0) -> BaseModel:
    """The architecture of that name with random weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[name].make(small)
