"""Classification with one class per record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lalora_flwr.tasks.problem import Problem
from lalora_flwr.tasks.scores import confusion, f1_of_classes, matthews


@dataclass(frozen=True)
class SingleLabel(Problem):
    """Targets are numbers of classes, int64 (n,); the loss is the cross-entropy."""

    name = "single-label"
    transformers_name = "single_label_classification"
    dtype = torch.long

    def target(self, text: str, classes: Mapping[str, int]) -> int | None:
        return classes.get(text)

    def refusal(self, targets: Tensor, classes: int) -> str:
        inside = targets.dim() == 1 and 0 <= int(targets.min()) <= int(targets.max()) < classes
        return "" if inside else f"has a label outside its {classes} classes"

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="none")

    def directions(self, targets: Tensor, outputs: int) -> Tensor:
        return F.normalize(F.one_hot(targets, outputs) - 1 / outputs, dim=1)

    def made_up(self, n: int, outputs: int) -> Tensor:
        return torch.arange(n) % outputs

    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.argmax(-1) == targets

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """``accuracy``; ``f1`` of class 1 if there are two classes, else the mean over those that occur; ``matthews``."""
        guesses = logits.argmax(-1)
        counts = confusion(targets, guesses, logits.shape[1])
        f1 = f1_of_classes(counts)
        there = [value for value, seen in zip(f1, counts.sum(0) + counts.sum(1), strict=True) if seen]
        return {
            "accuracy": int((guesses == targets).sum()) / len(targets),
            "f1": f1[1] if len(f1) == 2 else sum(there) / len(there),
            "matthews": matthews(counts),
        }

    def groups(self, targets: Tensor) -> list[int]:
        return [int(target) for target in targets]

    def counts(self, targets: Tensor, classes: int) -> tuple[int, ...]:
        return tuple(torch.bincount(targets, minlength=classes).tolist())
