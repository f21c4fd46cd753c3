"""A text encoder with the mean of its tokens as the text's vector, as sentence-transformers models are trained."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledClassifier(nn.Module):
    """Token ids to logits (n, classes): encoder, mean over the tokens that are no padding, one linear head."""

    def __init__(self, encoder: PreTrainedModel, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.classifier = nn.Linear(self.config.hidden_size, num_classes)

    def get_input_embeddings(self) -> nn.Module:
        """The table of token vectors, by the name that transformers' own models have for it."""
        embeddings: nn.Module = self.encoder.get_input_embeddings()
        return embeddings

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> SequenceClassifierOutput:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # (n, tokens, 1)
        return SequenceClassifierOutput(logits=self.classifier((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)))


def wants_mean(folder: Path) -> bool:
    """Whether a sentence-transformers folder says that its texts are means over tokens."""
    try:
        return bool(json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"])
    except (OSError, ValueError, KeyError):
        return False
