"""The optimizer's step where it is the server's: sites send gradients with noise, and all that follows is post-processing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lalora_flwr.adapter.slots import Layout
from lalora_flwr.methods.filters import Around, State, others_of
from lalora_flwr.methods.method import Method
from lalora_flwr.methods.updates import Tensors
from lalora_flwr.settings import Settings
from lalora_flwr.training.local import make_optimizer
from lalora_flwr.training.rate import rate_for

FILTER, OPTIMIZER = "filter", "optimizer"  # what the names of remembered tensors begin with


class ServerStep:
    """Filter, optimizer and learning rate of a run whose sites take no step of their own.

    Guarantee: post-processing of released gradients. A slot that did not train in a round has no gradient, and neither
    momentum nor weight decay moves it.
    """

    def __init__(self, settings: Settings, layout: Layout, method: Method) -> None:
        """
        Args:
            settings: the run's.
            layout: the slots as the server holds them.
            method: of the run; what its filter remembers is kept here.
        """
        self._settings, self._layout, self._method, self._filter = settings, layout, method, method.filter
        self._parameters = {name: nn.Parameter(torch.zeros(slot.shape)) for name, slot in layout.items()}
        self._optimizer = make_optimizer(self._parameters.values(), settings.train)
        self._memory: dict[str, State] = {}
        self._others = others_of(layout)

    def rate(self, server_round: int, noise: float) -> float:
        """The learning rate of a round, from 1, whose mean gradient has this noise."""
        train, rounds = self._settings.train, self._settings.num_rounds
        rate = rate_for(self._settings, self._method, self._layout, noise)
        return rate * (1 - (server_round - 1) / rounds) if train.decay == "linear" else rate

    def __call__(self, server_round: int, current: Tensors, gradients: Tensors, noise: float) -> dict[str, NDArray[np.float32]]:
        """The new values of the slots that have a gradient.

        Args:
            server_round: from 1.
            current: the adapter, every slot of it.
            gradients: mean gradients of the slots that trained in the round, of their shapes.
            noise: standard deviation of the noise on each of their entries.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate(server_round, noise)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(np.array(current[name], dtype=np.float32)))
                parameter.grad = None
            for name in (name for name in self._parameters if name in gradients):
                gradient = torch.from_numpy(np.array(gradients[name], dtype=np.float32))
                around = Around(noise, self._parameters[self._others[name]].detach() if name in self._others else None)
                filtered = self._filter(self._layout[name], gradient, self._memory.setdefault(name, {}), around)
                self._parameters[name].grad = filtered
        self._optimizer.step()
        return {name: self._parameters[name].detach().numpy().copy() for name in gradients}

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` needs."""
        kept = {f"{FILTER}/{slot}/{name}": value for slot, state in self._memory.items() for name, value in state.items()}
        for slot, parameter in self._parameters.items():
            for name, value in self._optimizer.state.get(parameter, {}).items():
                if value is not None:
                    kept[f"{OPTIMIZER}/{slot}/{name}"] = value
        return kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on as the step that `tensors` is of would."""
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            slot, _, own = rest.rpartition("/")
            if kind == FILTER:
                self._memory.setdefault(slot, {})[own] = value.clone()
            else:
                self._optimizer.state[self._parameters[slot]][own] = value.clone()
