"""Base models of transformers: sequence classifiers and causal language models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_flwr.data.inputs import Inputs
from lalora_flwr.models.base import BaseModel

IGNORED = -100  # label of a token that bears no loss, as in transformers


class TextModel(BaseModel):
    """What the text models have in common."""

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Logits, float32 or better: (n, num_classes), or (n, tokens, vocabulary) of a language model."""
        assert isinstance(inputs, dict)
        logits: Tensor = model(**inputs).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def checkpoint_activations(self) -> None:
        """As for images; the non-reentrant kind, since the engine asks for gradients of chosen tensors."""
        self.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]


@dataclass(frozen=True)
class SequenceClassifier(TextModel):
    """Inputs are ``input_ids`` and ``attention_mask``, both (n, tokens); labels are (n,)."""

    def synthetic_batch(self, n: int, generator: torch.Generator) -> tuple[Inputs, Tensor]:
        """Random tokens, each sequence padded at its end by another length."""
        return _random_tokens(n, self.input_shape[0], self.module, generator), torch.arange(n) % self.num_classes


@dataclass(frozen=True)
class CausalLanguageModel(TextModel):
    """Inputs as above; labels (n, tokens) hold the next token's id at its own place, or `IGNORED`."""

    def losses(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Tensor:
        """Mean cross-entropy of each example over its labelled tokens, shape (n,): one example is one record."""
        logits, targets = self.logits(model, inputs)[:, :-1], labels[:, 1:]  # (n, tokens - 1, vocabulary), (n, tokens - 1)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
        counted = targets != IGNORED
        return losses.sum(1) / counted.sum(1).clamp(min=1)

    def synthetic_batch(self, n: int, generator: torch.Generator) -> tuple[Inputs, Tensor]:
        """Random tokens; the first half of each sequence is a prompt without loss."""
        inputs = _random_tokens(n, self.input_shape[0], self.module, generator)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        labels[:, : self.input_shape[0] // 2] = IGNORED
        return inputs, labels


def _random_tokens(n: int, tokens: int, module: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    config = module.config
    padding = config.pad_token_id or 0  # type: ignore[union-attr]
    ids = torch.randint(3, int(config.vocab_size), (n, tokens), generator=generator)  # type: ignore[union-attr, arg-type]
    mask = torch.ones_like(ids)
    for j in range(n):
        mask[j, tokens - j % max(1, tokens // 4) :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, int(padding)), "attention_mask": mask}  # type: ignore[arg-type]
