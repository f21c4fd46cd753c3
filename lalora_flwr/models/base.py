"""What the rest of the package needs to know of a base model."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BaseModel:
    """An image classifier and the facts that adapters and checks need.

    Attributes:
        name: the run-config value it was made from.
        module: the network; maps images (n, *input_shape) to logits (n, num_classes).
        head: module name of the classification head.
        targets: module names that get an adapter when ``lora.targets = "auto"``.
        input_shape: shape of one record, (channels, height, width).
        num_classes: how many classes the head tells apart.
    """

    name: str
    module: nn.Module
    head: str
    targets: tuple[str, ...]
    input_shape: tuple[int, ...]
    num_classes: int

    def losses(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each record, shape (n,), of this network or of a wrapper around it."""
        return F.cross_entropy(model(inputs), labels, reduction="none")
