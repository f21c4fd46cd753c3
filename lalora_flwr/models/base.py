"""What the rest of the package needs to know of a base model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lalora_flwr.data.inputs import Inputs, rows
from lalora_flwr.data.records import RecordSet
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import PUBLIC, replace_file
from lalora_flwr.models.provenance import Provenance
from lalora_flwr.models.published import Published
from lalora_flwr.tasks.problem import Problem
from lalora_flwr.tasks.single_label import SingleLabel

if TYPE_CHECKING:
    from lalora_flwr.data.cleaning import Rows

CHECK_RECORDS = 5  # of the widest batch of the check before training


@dataclass(frozen=True)
class BaseModel:
    """An image model and the facts that adapters and checks need; text models override its methods.

    Attributes:
        name: the run-config value it was made from.
        module: the network; maps images (n, *input_shape) to logits (n, num_classes).
        head: module name of the classification head; empty if there is none to train.
        targets: module names that get an adapter when ``lora.targets = "auto"``.
        input_shape: shape of one record: (channels, height, width), or (tokens,) for text.
        num_classes: how many outputs the head has, one per class or one number; for a language model, the size of its vocabulary.
        fresh_head: the head is random and not part of the published weights; if it is trained, the run's seed draws it.
        provenance: which weights these are.
        head_weights: the modules of a trained head as they were loaded, by name, if the network's own were rounded since.
        whole: the last layers of a network whose others are in four bits, by name; None: none are.
        labels: names of the classes in order; empty if there are none.
        problem: what a label is; of no account for a language model.
        published: how it is loaded elsewhere.
    """

    name: str
    module: nn.Module
    head: str
    targets: tuple[str, ...]
    input_shape: tuple[int, ...]
    num_classes: int
    fresh_head: bool = False
    provenance: Provenance = field(default_factory=Provenance)
    head_weights: dict[str, dict[str, Tensor]] = field(default_factory=dict, kw_only=True)
    whole: tuple[str, ...] | None = field(default=None, kw_only=True)
    labels: tuple[str, ...] = field(default=(), kw_only=True)
    problem: Problem = field(default_factory=SingleLabel, kw_only=True)
    published: Published = field(default_factory=Published, kw_only=True)

    @property
    def vocabulary(self) -> int:
        """How many token ids the network knows: 0 up to this number, which is never an id itself; 0 if it takes no tokens."""
        return 0

    @property
    def segments(self) -> int:
        """How many types of tokens the network tells apart; 0 if it takes none."""
        return 0

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Logits (n, num_classes), float32 or better, of this network or of a wrapper around it."""
        assert isinstance(inputs, Tensor)
        logits: Tensor = model(inputs.to(next(model.parameters()).dtype))  # that of the frozen weights, which come first
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def losses(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Tensor:
        """Each record's loss, shape (n,)."""
        return self.problem.losses(self.logits(model, inputs), labels)

    def encode(self, rows: Rows) -> RecordSet:
        """Rows of a table as records for this model.

        Raises:
            ConfigError: if it takes no tables.
        """
        raise ConfigError(f"data.name: {self.name} only takes digits")

    def save_config(self, folder: Path) -> None:
        """Write ``config.json`` with the names of the classes, if there are any, beside an adapter."""
        about: dict[str, object] = {"num_classes": self.num_classes}
        if self.labels:
            about |= {"label_names": list(self.labels), "id2label": dict(enumerate(self.labels))}
        if self.problem != SingleLabel():
            about["problem_type"] = self.problem.transformers_name
        replace_file(folder / "config.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n", mode=PUBLIC)

    def checkpoint_activations(self) -> None:
        """Keep only block boundaries in the forward pass and recompute the rest in the backward pass.

        Raises:
            ConfigError: if the model has no such mode.
        """
        if not hasattr(self.module, "set_grad_checkpointing"):
            raise ConfigError(f"train.gradient-checkpointing = true: {self.name} cannot recompute its activations")
        switch = self.module.set_grad_checkpointing
        assert callable(switch)
        switch(True)

    def synthetic_batch(self, n: int, generator: torch.Generator) -> tuple[Inputs, Tensor]:
        """Made-up records on the CPU, for checks: standard normal images with labels of all kinds."""
        return torch.randn(n, *self.input_shape, generator=generator), self.problem.made_up(n, self.num_classes)

    def check_batches(self, generator: torch.Generator) -> Iterator[tuple[Inputs, Tensor]]:
        """Made-up batches on the CPU for the check before training, so different that a model which mixes records shows it."""
        yield self.synthetic_batch(CHECK_RECORDS, generator)

    def tokens(self, inputs: Inputs) -> int:
        """How long the records of a batch are, if records may be filled up without a change to their loss; else 0."""
        return 0

    def filled_up(self, inputs: Inputs, labels: Tensor, tokens: int) -> tuple[Inputs, Tensor]:
        """A batch whose records are filled up to so many ``tokens``, no fewer than they have."""
        return inputs, labels

    def single(self, inputs: Inputs, labels: Tensor, j: int) -> tuple[Inputs, Tensor]:
        """Record j of a batch, alone: as it would be in a batch of its own."""
        return rows(inputs, slice(j, j + 1)), labels[j : j + 1]
