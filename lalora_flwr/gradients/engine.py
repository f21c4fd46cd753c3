"""Per-sample gradients of linear layers without hooks.

Each record gets its own stride-0 view of the weight, ``weight.expand(records, out, in)``; one batched product with the
views, and autograd returns the gradient of every record by itself. No second backward pass, nothing kept in ``.grad``,
and a layer whose parameters are frozen runs as an ordinary linear layer. Records must lie outermost in the first axis
of a layer's input; Swin's windows do (image by image), and are folded into their record here. Plain LoRA layers run
fused with their base layer (`lalora_flwr.gradients.fused`). Opacus' hooks and ghost clipping cannot switch between A and B, and
on Swin they take a window for a record.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalora_flwr.gradients.fused import FusedLoraLinear, can_fuse
from lalora_flwr.gradients.records import RecordPass
from lalora_flwr.ground.errors import ConfigError


class PerSampleLinear(nn.Linear):
    """A linear layer that, inside `PerSampleGradients`, uses one view of its trainable parameters for each record."""

    _pass: RecordPass

    def forward(self, x: Tensor) -> Tensor:
        x, records = x.to(self.weight.dtype), self._pass.records  # float32 factors on a low-precision base
        if not records or not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return F.linear(x, self.weight, self.bias)
        self._pass.check(x)
        rows = x.reshape(records, -1, x.shape[-1])  # (records, tokens, in)
        if self.weight.requires_grad:
            y = torch.bmm(rows, self._pass.view(self.weight).transpose(1, 2))  # (records, tokens, out)
        else:
            y = F.linear(rows, self.weight)
        if self.bias is not None:
            y = y + (self._pass.view(self.bias).unsqueeze(1) if self.bias.requires_grad else self.bias)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class PerSampleGradients:
    """Per-sample gradients of a model whose trainable parameters all sit in ``nn.Linear`` layers.

    Guarantee: entry j of every returned tensor is the gradient of record j's loss alone, provided that the model does
    not let records of a batch interact; `lalora_flwr.gradients.self_check` tests that on each site before training.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare the layers that own a trainable parameter now (which of them train may change later).

        Raises:
            ConfigError: if a trainable parameter sits in a layer that has no per-sample rule.
        """
        self._pass = RecordPass()
        self._model = model
        for name, module in model.named_modules():
            own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
            if own and type(module) not in (nn.Linear, PerSampleLinear):
                raise ConfigError(f"{name}.{own[0]}: no per-sample gradient for a {type(module).__name__}; adapt linear layers")
            if own:
                module.__class__ = PerSampleLinear
            elif can_fuse(module):
                module.__class__ = FusedLoraLinear
            if isinstance(module, PerSampleLinear | FusedLoraLinear):
                module._pass = self._pass  # type: ignore[assignment]

    def __call__(self, records: int, losses: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Gradients of each record's loss.

        Args:
            records: how many records the batch holds, at least 1.
            losses: runs the model forward once and returns the loss of each record, shape (records,).

        Returns:
            For every parameter that requires a gradient, by name, a tensor of shape (records, *parameter.shape).

        Raises:
            RuntimeError: if the losses are not one a record, or a trainable parameter took no part in the forward pass
                (its gradient would be missing from the clipped norm).
        """
        trainable = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._pass.records, self._pass.views = records, {}
        try:
            values = losses()
            if values.shape != (records,):
                raise RuntimeError(f"losses of shape {tuple(values.shape)} for {records} records")
            unused = [name for name, p in trainable.items() if id(p) not in self._pass.views]
            if unused:
                raise RuntimeError(f"{unused[0]} took no part in the forward pass: its per-sample gradient cannot be told")
            views = [self._pass.views[id(p)] for p in trainable.values()]
            gradients = torch.autograd.grad(values.sum(), views, allow_unused=True)
        finally:
            self._pass.records, self._pass.views = 0, {}
        return {
            name: torch.zeros(records, *p.shape, device=p.device) if g is None else g
            for (name, p), g in zip(trainable.items(), gradients, strict=True)
        }
