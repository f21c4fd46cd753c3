"""Classification with any number of classes per record, none included."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lalora_flwr.tasks.label_text import as_text
from lalora_flwr.tasks.problem import Problem, Target
from lalora_flwr.tasks.scores import area_under_roc, f1

LONGEST = 1 << 16  # characters of a field with classes: taking a longer one apart would show in how long a site takes
SEPARATORS = "|;,"  # the first of them that a field (without known classes: any field of its column) holds separates classes


def _listed(text: str) -> list[object] | None:
    """The list in a field; None if it is not one as JSON has it."""
    if not text.startswith("["):
        return None
    try:
        found: list[object] = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found


def _first_separator(text: str) -> str:
    return next((sign for sign in SEPARATORS if sign in text), "")


def _split(text: str, separator: str) -> list[str]:
    return [as_text(part) or "" for part in text.split(separator)] if separator else [text]


@dataclass(frozen=True)
class MultiLabel(Problem):
    """Targets are 0 or 1 for each class, float32 (n, classes).

    A record's loss is the mean over the classes of the binary cross-entropy, as transformers has it.
    """

    name = "multi-label"
    transformers_name = "multi_label_classification"

    def parts(self, text: str, classes: Mapping[str, int]) -> list[str]:
        """The names in a field: a list as JSON has it, a class, or names separated by the first of ``|``, ``;``, ``,`` in it.

        What is no name is an empty one. Nothing that a field may hold raises.
        """
        if text in classes:
            return [text]
        if len(text) > LONGEST:
            return [""]
        listed = _listed(text)
        if listed is not None:
            return [as_text(name) or "" if isinstance(name, bool | int | float | str) else "" for name in listed]
        return _split(text, _first_separator(text))

    def occurring(self, texts: Sequence[str]) -> list[list[str]]:
        """As `Problem.occurring`: one separator for the whole column, the first of ``|``, ``;``, ``,`` that any field holds."""
        plain = [text for text in texts if len(text) <= LONGEST and _listed(text) is None]
        separator = _first_separator("".join(plain))
        known = {name for text in plain if separator in text for name in _split(text, separator)}
        for text in plain:
            if separator not in text and _first_separator(text) and text not in known:
                raise ValueError(f"{text[:60]!r}, which may be one class or several, as others have {separator} between theirs")
        classes = dict.fromkeys((text for text in plain if separator not in text), 0)
        return [self.parts(text, classes) for text in texts]

    def why(self, text: str, classes: Mapping[str, int]) -> str:
        names = self.parts(text, classes)
        if len(set(names)) < len(names):
            return "a class twice in one record, as where each token has one (classes of tokens are not supported)"
        return "a list with a class that is " + super().why(text, classes)

    def target(self, text: str, classes: Mapping[str, int]) -> bytes | None:
        names = self.parts(text, classes)
        if len(set(names)) < len(names) or any(name not in classes for name in names):
            return None
        own = bytearray(len(classes))
        for name in names:
            own[classes[name]] = 1
        return bytes(own)

    def stacked(self, targets: Sequence[Target], classes: int) -> Tensor:
        own = bytearray().join(target for target in targets if isinstance(target, bytes))
        flat = torch.frombuffer(own, dtype=torch.uint8) if own else torch.empty(0)
        return flat.to(self.dtype).reshape(len(targets), classes)

    def refusal(self, targets: Tensor, classes: int) -> str:
        inside = targets.dim() == 2 and targets.shape[1] == classes and bool(((targets == 0) | (targets == 1)).all())
        return "" if inside else f"gives labels {tuple(targets.shape)}; must be 0 or 1 of shape (records, {classes})"

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none").mean(1)

    def directions(self, targets: Tensor, outputs: int) -> Tensor:
        return F.normalize(2 * targets - 1, dim=1)

    def made_up(self, n: int, outputs: int) -> Tensor:
        return ((torch.arange(n).unsqueeze(1) + torch.arange(outputs)) % 3 == 0).float()

    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Those with all of their classes and no other."""
        return (((logits > 0) == (targets > 0.5)) & logits.isfinite()).all(1)

    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """``auroc``, the mean over the classes with and without records; ``f1``, the mean over those with; ``exact_match``."""
        truth, guesses = (targets > 0.5).numpy(), (logits > 0).numpy()
        both = [c for c in range(truth.shape[1]) if 0 < truth[:, c].sum() < len(truth)]
        there = [c for c in range(truth.shape[1]) if truth[:, c].any()]
        finite = bool(logits.isfinite().all())
        areas = [area_under_roc(truth[:, c], logits[:, c].numpy()) for c in both] if finite else []
        return {
            "auroc": sum(areas) / len(areas) if areas else math.nan,
            "f1": sum(f1(truth[:, c], guesses[:, c]) for c in there) / max(1, len(there)),
            "exact_match": float(self.right(logits, targets).double().mean()),
        }

    def groups(self, targets: Tensor) -> list[int]:
        return [0] * len(targets)

    def counts(self, targets: Tensor, classes: int) -> tuple[int, ...]:
        return tuple(targets.reshape(-1, classes).sum(0).long().tolist())
