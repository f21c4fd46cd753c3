"""Configurations of models that the paper's experiments use, so that these can be planned without the hub."""

from __future__ import annotations

from transformers import BertConfig, LlamaConfig, PretrainedConfig, RobertaConfig


def known_config(name: str) -> PretrainedConfig | None:
    """The published configuration of a hub repository, as far as it shapes the weights; None if it is not listed."""
    match name.rpartition("/")[2].lower():
        case "roberta-base":
            return RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
        case "bert-base-uncased":
            return BertConfig()
        case "llama-2-7b-hf" | "llama-2-7b-chat-hf":
            return LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5)
    return None
