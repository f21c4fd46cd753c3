"""Per-sample gradients without hooks.

Each record gets its own stride-0 view of the weight, ``weight.expand(records, out, in)``; one batched product with the
views, and autograd returns the gradient of every record by itself. No second backward pass, nothing kept in ``.grad``,
and a layer whose parameters are frozen runs as before. Records must lie outermost in the first axis of a layer's input;
Swin's windows do (image by image), and are folded into their record by the layer's rule (`lalora_flwr.gradients.rules`).
Opacus' hooks and ghost clipping cannot switch between A and B, and on Swin they take a window for a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lalora_flwr.gradients import form_rules as form_rules  # registers its rules
from lalora_flwr.gradients.few_rows import keep_steady
from lalora_flwr.gradients.records import Owners, RecordPass
from lalora_flwr.gradients.rules import follow_rules


class PerSampleGradients:
    """Per-sample gradients of a model's trained tensors, all of which sit in layers with a per-sample rule.

    Guarantee: entry j of every returned tensor is the gradient of record j's loss alone, provided that the model does
    not let records of a batch interact; `lalora_flwr.gradients.self_check` tests that on each site before training.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        """Prepare the layers that own a trained tensor, and the frozen linear ones.

        Args:
            model: in which they are; its other parameters are frozen.
            parameters: all that may ever train, by name; which of them do may change from call to call.

        Raises:
            ConfigError: if one of them sits in a layer that has no per-sample rule.
        """
        self._pass = RecordPass()
        self._parameters = dict(parameters)
        follow_rules(model, {id(p) for p in parameters.values()}, self._pass)
        keep_steady(model)

    def __call__(self, records: int, losses: Callable[[], Tensor], owners: Owners | None = None) -> dict[str, Tensor]:
        """Gradients of each record's loss.

        Args:
            records: how many records the batch holds, at least 1.
            losses: runs the model forward once and returns the loss of each record, shape (records,).
            owners: the sites whose records they are, each with values of its own; none: all records meet the model's.

        Returns:
            For every trained tensor that requires a gradient, by name, a tensor of shape (records, *parameter.shape), or with
            the shape of the owners' values in its place.

        Raises:
            RuntimeError: if the losses are not one a record, or a trained tensor took no part in the forward pass
                (its gradient would be missing from the clipped norm).
        """
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._pass.begin(records, owners)
        try:
            values = losses()
            if values.shape != (records,):
                raise RuntimeError(f"losses of shape {tuple(values.shape)} for {records} records")
            unused = [name for name, p in trained.items() if id(p) not in self._pass.views]
            if unused:
                raise RuntimeError(f"{unused[0]} took no part in the forward pass: its per-sample gradient cannot be determined")
            views = [self._pass.views[id(p)] for p in trained.values()]
            gradients = torch.autograd.grad(values.sum(), views, allow_unused=True)
            shapes = [self._pass.shape(p) for p in trained.values()]
        finally:
            self._pass.end()
        return {
            name: torch.zeros(records, *shape, device=p.device) if g is None else g
            for (name, p), shape, g in zip(trained.items(), shapes, gradients, strict=True)
        }

    def owned(self, counts: Sequence[int], values: Mapping[str, Tensor], *, by_record: bool = False) -> Owners:
        """What a pass over several sites' records needs to know of them.

        Args:
            counts: records of each site, in the order in which the pass has them.
            values: the sites' own tensors by name, (sites, *shape).
            by_record: as `Owners` has it.
        """
        return Owners(counts, {id(self._parameters[name]): value for name, value in values.items()}, by_record)
