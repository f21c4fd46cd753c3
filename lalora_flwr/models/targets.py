"""The architectures that are admitted, and which of their modules get an adapter when ``lora.targets = "auto"``.

Each was tried against one record at a time in float64, unpadded (``tests/gradients/test_architectures.py``).
"""

from __future__ import annotations

from torch import nn

# The paper's choices (arXiv 2602.19926 and its released code) where it has one, the field's usual ones elsewhere.
TIMM_TARGETS = ("attn.qkv", "attn.proj")  # ViT, DeiT, Swin, BEiT
SPLIT_TIMM_TARGETS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj")  # EVA-02 from its base size on

_BERT, _LLAMA, _NEOX = ("query", "key", "value", "dense"), ("q_proj", "v_proj"), ("query_key_value",)

# Sequence classifiers of transformers, by `model_type`.
TRANSFORMERS_TARGETS: dict[str, tuple[str, ...]] = {
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "bert": _BERT,
    "electra": _BERT,
    "mobilebert": ("query", "key", "value", "attention.output.dense"),
    "albert": ("query", "key", "value", "dense"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin"),
    "modernbert": ("Wqkv", "attn.Wo"),
    "gpt2": ("c_attn",),
    "gpt_neox": _NEOX,
    "bloom": _NEOX,
    "falcon": _NEOX,
    "opt": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi": _LLAMA,
    "phi3": ("qkv_proj",),
}
# Those whose tokens do not see those after them, as language models too.
CAUSAL = (
    *("gpt2", "gpt_neox", "bloom", "falcon", "opt", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
    *("gemma", "gemma2", "gemma3_text", "phi", "phi3"),
)


def timm_targets(module: nn.Module) -> tuple[str, ...]:
    """The targets of a timm model: the projections of its attention, joint or apart."""
    names = [name for name, _ in module.named_modules()]
    split = any(name.endswith("attn.q_proj") for name in names) and not any(name.endswith("attn.qkv") for name in names)
    return SPLIT_TIMM_TARGETS if split else TIMM_TARGETS
