"""What the rest of the package needs to know of a base model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_flwr.data.inputs import Inputs
from lalora_flwr.errors import ConfigError


@dataclass(frozen=True)
class BaseModel:
    """An image classifier and the facts that adapters and checks need; text models override its methods.

    Attributes:
        name: the run-config value it was made from.
        module: the network; maps images (n, *input_shape) to logits (n, num_classes).
        head: module name of the classification head; empty if there is none to train.
        targets: module names that get an adapter when ``lora.targets = "auto"``.
        input_shape: shape of one record: (channels, height, width), or (tokens,) for text.
        num_classes: how many classes the head tells apart; for a language model, the size of its vocabulary.
    """

    name: str
    module: nn.Module
    head: str
    targets: tuple[str, ...]
    input_shape: tuple[int, ...]
    num_classes: int

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Logits (n, num_classes), float32 or better, of this network or of a wrapper around it."""
        assert isinstance(inputs, Tensor)
        logits = model(inputs.to(next(model.parameters()).dtype))  # that of the frozen weights, which come first
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def losses(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Tensor:
        """Cross-entropy of each record, shape (n,)."""
        return F.cross_entropy(self.logits(model, inputs), labels, reduction="none")

    def checkpoint_activations(self) -> None:
        """Keep only block boundaries in the forward pass and recompute the rest in the backward pass.

        Raises:
            ConfigError: if the model has no such mode.
        """
        if not hasattr(self.module, "set_grad_checkpointing"):
            raise ConfigError(f"train.gradient-checkpointing = true: {self.name} cannot recompute its activations")
        self.module.set_grad_checkpointing(True)  # type: ignore[operator]

    def synthetic_batch(self, n: int, generator: torch.Generator) -> tuple[Inputs, Tensor]:
        """Made-up records on the CPU, for checks: standard normal images, labels 0, 1, …"""
        return torch.randn(n, *self.input_shape, generator=generator), torch.arange(n) % self.num_classes
