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
from lalora_flwr.models.targets import TRANSFORMERS_TARGETS, timm_targets
from lalora_flwr.models.text import CausalLanguageModel, SequenceClassifier
from lalora_flwr.models.timm_models import through_modules


@dataclass(frozen=True)
class Architecture:
    """``make(small)`` builds it; ``image``: whether its records are images."""

    make: Callable[[bool], BaseModel]
    image: bool = False


def _timm(name: str, size: int = 224, **small: Any) -> Architecture:
    def make(is_small: bool) -> BaseModel:
        options, side, classes = (small, small["img_size"], 10) if is_small else ({}, size, 100)
        module = timm.create_model(name, pretrained=False, num_classes=classes, **options)
        through_modules(module)
        for parameter in module.parameters():
            if is_small and not parameter.any():  # SwinV2's norms, whose blocks then add nothing
                nn.init.normal_(parameter, std=0.2)
        head = str(module.default_cfg["classifier"])
        return BaseModel(f"timm/{name}", module, head, timm_targets(module), (3, side, side), classes)

    return Architecture(make, image=True)


def _transformers(
    config_class: Any, model_class: Any, head: str, full: dict[str, Any], small: dict[str, Any], *, causal: bool = False
) -> Architecture:
    def make(is_small: bool) -> BaseModel:
        config = config_class(**(small if is_small else full), pad_token_id=1)
        config._experts_implementation = "eager"  # as lalora_flwr.models.hf_models has it
        module: nn.Module = model_class(config)
        targets = TRANSFORMERS_TARGETS[config.model_type]
        kind = CausalLanguageModel if causal else SequenceClassifier
        classes = config.vocab_size if causal else config.num_labels
        tokens, longest = (12, 24) if is_small else (128, 128)
        return kind(f"hf/{config.model_type}", module, head, targets, (tokens,), classes, max_tokens=longest)

    return Architecture(make)


def _decoder(family: str, small: dict[str, Any]) -> dict[str, Architecture]:
    """A decoder of transformers as a language model and as a classifier, small only."""
    config_class = getattr(transformers, f"{family}Config")
    name = config_class.model_type.replace("_", "-")
    causal = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    classifier = getattr(transformers, f"{family}ForSequenceClassification")
    return {
        name: _transformers(config_class, causal, "", small, small, causal=True),
        f"{name}-classifier": _transformers(config_class, classifier, "score", small, small),
    }


def _encoder(family: str, small: dict[str, Any]) -> dict[str, Architecture]:
    """An encoder of transformers as a classifier, small only."""
    config_class = getattr(transformers, f"{family}Config")
    classifier = getattr(transformers, f"{family}ForSequenceClassification")
    return {config_class.model_type: _transformers(config_class, classifier, "classifier", small, small)}


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
_SWIN = {"img_size": 64, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (1, 2, 2)}
_BERT = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_DISTIL = {"vocab_size": 60, "dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
_GPT2 = {"vocab_size": 60, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "max_position_embeddings": 64}
_GEMMA = {**_LLAMA, "head_dim": 12}
_LOCAL = {"sliding_window": 6}  # shorter than the texts
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
_MOBILE = {"embedding_size": 12, "intra_bottleneck_size": 12, "num_feedforward_networks": 2}
_FALCON = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_OPT = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
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
_ENCODERS: dict[str, dict[str, Any]] = {
    "XLMRoberta": _BERT,
    "Albert": {**_BERT, "embedding_size": 12, "num_hidden_groups": 1},
    "Electra": {**_BERT, "embedding_size": 12},
    "MobileBert": {**_BERT, **_MOBILE},
    "ModernBert": {**_BERT, "local_attention": 6, "global_attn_every_n_layers": 2},
}
_DECODERS: dict[str, dict[str, Any]] = {
    "GPTNeoX": {**_BERT, "rotary_pct": 0.5},
    "Bloom": _FALCON,
    "Falcon": _FALCON,
    "OPT": {**_OPT, "word_embed_proj_dim": 24},
    "Mistral": {**_LLAMA, **_LOCAL},
    "Mixtral": {**_LLAMA, **_LOCAL, **_EXPERTS},
    "Qwen2": {**_LLAMA, **_LOCAL, **_LAYERS, "use_sliding_window": True},
    "Qwen3": {**_GEMMA, **_LOCAL, **_LAYERS, "use_sliding_window": True},
    "Qwen3Moe": {**_GEMMA, **_EXPERTS},
    "Gemma": _GEMMA,
    "Gemma2": _GEMMA,
    "Phi": {**_LLAMA, "partial_rotary_factor": 0.5},
    "Phi3": {**_LLAMA, "original_max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3},
    "Gemma3Text": {**_GEMMA, **_LOCAL, **_LAYERS},
}
_WIDER = {"hidden_size": 64, "intermediate_size": 64}


def _all(
    make: Callable[[str, dict[str, Any]], dict[str, Architecture]], families: dict[str, dict[str, Any]], **wider: int
) -> dict[str, Architecture]:
    """Those of all families, with other sizes if any are given."""
    return {name: one for family, config in families.items() for name, one in make(family, {**config, **wider}).items()}


SMALL_ONLY: dict[str, Architecture] = {  # admitted too; the engine is held to them at small size
    "swinv2-tiny": _timm("swinv2_tiny_window8_256", 256, **{**_SWIN, "depths": (2, 2), "num_heads": (1, 2)}),
    "beit-base": _timm("beit_base_patch16_224", **_VIT),
    "beitv2-base": _timm("beitv2_base_patch16_224", **_VIT),
    "eva02-tiny": _timm("eva02_tiny_patch14_224", **_VIT),
    "eva02-base": _timm("eva02_base_patch14_224", **_VIT),
    **_all(_encoder, _ENCODERS),
    **_all(_decoder, _DECODERS),
}
WIDE: dict[str, Architecture] = {  # small, with layers of 64 inputs: those that four bits are for
    "vit": _timm("vit_base_patch16_224", **{**_VIT, "embed_dim": 64}),
    "swin": _timm("swin_tiny_patch4_window7_224", **{**_SWIN, "embed_dim": 32}),
    "swinv2": _timm("swinv2_tiny_window8_256", 256, **{**_SWIN, "embed_dim": 64, "depths": (2, 2), "num_heads": (1, 2)}),
    "beit": _timm("beit_base_patch16_224", **{**_VIT, "embed_dim": 64}),
    "eva02": _timm("eva02_base_patch14_224", **{**_VIT, "embed_dim": 64}),
    "distilbert": _transformers(
        *(transformers.DistilBertConfig, transformers.DistilBertForSequenceClassification, "classifier", {}),
        {**_DISTIL, "dim": 64, "hidden_dim": 64},
    ),
    **_all(_encoder, {"Bert": _BERT, **_ENCODERS}, **_WIDER),
    **_all(_decoder, {"Llama": _LLAMA, **_DECODERS}, **_WIDER, ffn_dim=64, word_embed_proj_dim=64),
}


def build(name: str, *, small: bool, seed: int = 0) -> BaseModel:
    """The architecture of that name with random weights drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {**ARCHITECTURES, **SMALL_ONLY}[name].make(small)


def build_wide(name: str, seed: int = 0) -> BaseModel:
    """As `build`, one of those with wider layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WIDE[name].make(True)
