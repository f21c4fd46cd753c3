"""Which modules get an adapter when ``lora.targets = "auto"``, by architecture."""

from __future__ import annotations

# The paper's choices (arXiv 2602.19926 and its released code) where it has one, the field's usual ones elsewhere.
TIMM_TARGETS = ("attn.qkv", "attn.proj")  # ViT, DeiT, Swin
TRANSFORMERS_TARGETS: dict[str, tuple[str, ...]] = {
    "roberta": ("query", "key", "value", "dense"),
    "bert": ("query", "key", "value", "dense"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin"),
    "gpt2": ("c_attn",),
    "llama": ("q_proj", "v_proj"),
}
