"""What the rest of the package needs to know of a kind of label."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

Target = int | bytes | float  # of one record: a class, a byte of 0 or 1 for each class, a number


class Problem(ABC):
    """What a record's label is, and what follows from that. Compares equal to another one of the same facts.

    Attributes:
        name: the value of ``data.problem-type``.
        transformers_name: the same in a configuration of transformers.
        named: whether classes have names; if not, the model has one output.
        dtype: of the targets.
        unknown: why a record is left out whose label is no target.
    """

    name: ClassVar[str]
    transformers_name: ClassVar[str]
    named: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.float32
    unknown: ClassVar[str] = "its label is unknown"

    def outputs(self, labels: Sequence[str]) -> int:
        """How many outputs the model's head has for classes of these names."""
        return len(labels)

    @abstractmethod
    def target(self, text: str, classes: Mapping[str, int]) -> Target | None:
        """The label in a field of a table as a target; None if it is none. Looks at nothing else.

        Args:
            text: as `lalora_flwr.data.labels.label_texts` gives it.
            classes: the number of each class by its name.
        """

    def why(self, text: str, classes: Mapping[str, int]) -> str:
        """What is wrong with a label that is no target."""
        return f"not among {', '.join(classes)[:200]}; see data.labels"

    def stacked(self, targets: Sequence[Target], classes: int) -> Tensor:
        """Targets of some records, none perhaps, as one tensor (n,) or (n, classes)."""
        return torch.tensor(targets, dtype=self.dtype)

    def parts(self, text: str, classes: Mapping[str, int]) -> list[str]:
        """The names of classes in a field."""
        return [text]

    def occurring(self, texts: Sequence[str]) -> list[list[str]]:
        """The names in each field of a column of which nobody said what classes there are.

        Raises:
            ValueError: whether a field is one class or several cannot be determined; says which.
        """
        return [self.parts(text, {}) for text in texts]

    @abstractmethod
    def refusal(self, targets: Tensor, classes: int) -> str:
        """What is wrong with targets that a data set gives as tensors; empty if nothing is."""

    @abstractmethod
    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Each record's loss, shape (n,), from logits (n, outputs) and targets (n,) or (n, outputs)."""

    def directions(self, targets: Tensor, outputs: int) -> Tensor:
        """Targets as vectors of norm 1, (n, outputs), of which a linear head can predict the direction; for classes only."""
        raise NotImplementedError

    @abstractmethod
    def made_up(self, n: int, outputs: int) -> Tensor:
        """Targets of made-up records, for checks."""

    @abstractmethod
    def right(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Which records the model gets right, bool (n,); a record's own outputs and target alone decide about it."""

    @abstractmethod
    def metrics(self, logits: Tensor, targets: Tensor) -> dict[str, float]:
        """What a model's outputs on public records are worth; one of them is in `lalora_flwr.server.metrics.HEADLINES`."""

    @abstractmethod
    def groups(self, targets: Tensor) -> list[int] | list[float]:
        """By what records can be sorted among virtual sites: their class, or their number; 0 for all if there is no order."""

    @abstractmethod
    def counts(self, targets: Tensor, classes: int) -> tuple[int, ...]:
        """How many records have each class; empty if there is none."""
