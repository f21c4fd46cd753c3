"""The largest eigenvalue of the Hessian of a mean loss, by power iteration with Hessian-vector products.

A Hessian-vector product is the gradient of ⟨gradient, v⟩: two backward passes, and no Hessian is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lalora_flwr.adapter.form import Adapter
from lalora_flwr.data.inputs import Inputs, to_device
from lalora_flwr.data.records import RecordSet
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.training.learner import Learner

BATCH = 64  # records whose graph is held at once
CLOSE = 1e-2  # of the eigenvalue, that the residual is brought below; the error of the eigenvalue goes with its square
MOST = 100  # products of one iteration

Times = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Eigenvalue:
    """
    Attributes:
        value: λ.
        residual: ‖H v - λ v‖ for a v of length 1: some eigenvalue is no further from λ than this.
        products: Hessian-vector products that it took.
        converged: whether the residual is below `CLOSE` of the largest eigenvalue by magnitude.
    """

    value: float
    residual: float
    products: int
    converged: bool


class MeanLoss:
    """The mean loss of a learner's model, as it now is, over some public records.

    Attributes:
        records: how many.
        parts: their inputs and labels, in batches.
    """

    def __init__(self, learner: Learner, records: RecordSet, most: int) -> None:
        """
        Args:
            learner: with the adapter in it.
            records: that may be looked at.
            most: at most so many of them are taken, evenly over the set.

        Raises:
            ConfigError: none can be read.
        """
        self._learner = learner
        device = learner.adapter.device
        chosen = torch.linspace(0, len(records) - 1, min(most, len(records))).round().long()
        parts = (records.batch(part) for part in records.parts(chosen, BATCH))
        self.parts: list[tuple[Inputs, Tensor]] = [(to_device(x, device), y.to(device)) for x, y in parts if len(y)]
        self.records = sum(len(labels) for _, labels in self.parts)
        if not self.records:
            raise ConfigError("data.test: none of the records can be read")
        learner.adapter.model.eval()
        learner.adapter.activate(frozenset())

    def _part(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """What these records add to the mean."""
        return self._learner.adapter.losses(self._learner.base, inputs, labels).sum() / self.records

    @torch.no_grad()
    def __call__(self) -> float:
        return sum(float(self._part(inputs, labels)) for inputs, labels in self.parts)

    def hessian(self, parameters: Sequence[nn.Parameter]) -> Times:
        """v ↦ H v for the Hessian with respect to these parameters as one flat vector."""

        def times(vector: Tensor) -> Tensor:
            pieces = _like(vector, parameters)
            total = torch.zeros_like(vector)
            for parameter in parameters:
                parameter.requires_grad_(True)
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the faster kernels of attention have no second derivative
                    for inputs, labels in self.parts:
                        total += _product(self._part(inputs, labels), parameters, pieces)
            finally:
                for parameter in parameters:
                    parameter.requires_grad_(False)
            return total

        return times


def _like(vector: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    pieces = torch.split(vector, [parameter.numel() for parameter in parameters])
    return [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]


def _product(loss: Tensor, parameters: Sequence[nn.Parameter], pieces: Sequence[Tensor]) -> Tensor:
    """H v of one loss; parameters that it does not depend on have zeros."""
    if not loss.requires_grad:
        return torch.cat([torch.zeros_like(piece).flatten() for piece in pieces])
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    along = sum((g * piece).sum() for g, piece in zip(gradients, pieces, strict=True) if g is not None)
    if not (isinstance(along, Tensor) and along.requires_grad):
        return torch.cat([torch.zeros_like(piece).flatten() for piece in pieces])
    second = torch.autograd.grad(along, parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if s is None else s).flatten() for s, p in zip(second, pieces, strict=True)])


def largest_eigenvalue(times: Times, like: Tensor, *, close: float = CLOSE, most: int = MOST, seed: int = 0) -> Eigenvalue:
    """The largest eigenvalue of a symmetric matrix.

    Power iteration finds the one that is largest by magnitude. If that is negative, or two of opposite sign keep it from
    settling, it is run again on H + ρ, ρ being that magnitude, where the largest is also the largest by magnitude.

    Args:
        times: v ↦ H v.
        like: a vector of its size, precision and device.
        close, most: as `CLOSE` and `MOST`.
        seed: of the first vector.
    """
    first, size = _iterated(times, like, 0.0, close, most, seed)
    if first.converged and first.value >= 0:
        return first
    again, _ = _iterated(times, like, size, close, 2 * most, seed + 1)
    return Eigenvalue(again.value, again.residual, first.products + again.products, again.converged)


def _iterated(times: Times, like: Tensor, shift: float, close: float, most: int, seed: int) -> tuple[Eigenvalue, float]:
    """On H + ``shift``; with the length of the last product, which bounds the magnitude once it has settled."""
    vector = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
    vector /= vector.norm()
    value = residual = size = 0.0
    for count in range(1, most + 1):
        image = times(vector)
        value, plain = float(vector @ image), float(image.norm())
        residual = float((image - value * vector).norm())
        size = max(size, plain)
        if residual <= close * max(size, shift) or not plain:
            return Eigenvalue(value, residual, count, True), size
        image = image + shift * vector
        vector = image / image.norm()
    return Eigenvalue(value, residual, most, False), size


def merged_weights(adapter: Adapter) -> list[nn.Parameter]:
    """The frozen weights of the layers that LoRA adapts. Adding to one of them adds the same to the merged weight W + s B A, so
    derivatives with respect to them are those with respect to the merged weights. None where the form adapts no weights."""
    layers = [module.get_base_layer() for module in adapter.model.modules() if isinstance(module, LoraLayer)]
    return [weight for layer in layers if isinstance(weight := getattr(layer, "weight", None), nn.Parameter)]
