"""What is trained on top of a frozen model, whatever its form: LoRA factors, biases, …

A form is one subclass of `AdapterForm` with one instance, registered as ``lora`` is in `lalora_flwr.settings.choices` or by
another package through an entry point of the group ``lalora.forms``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lalora_flwr.adapter.slots import Layout, Mask, Slot
from lalora_flwr.data.inputs import Inputs
from lalora_flwr.data.records import RecordSet
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings, Settings


class Adapter:
    """A frozen model with what is trained on top of it, and what the server alone changes there.

    Whoever made it owns it; nobody else holds the model.

    Attributes:
        model: runs the base model with the adapter in it.
        layout: the slots, in the order in which they are clipped, noised and stepped.
        parameters: the model's parameter of each slot, by the slot's name, in the order of the layout.
        in_peft: whether PEFT loads the folder that `save` writes.
        of_base: slots that take the place of a tensor of the base model, by that tensor's name.
    """

    in_peft = False
    of_base: Mapping[str, str] = {}

    def __init__(self, model: nn.Module, slots: Mapping[Slot, nn.Parameter]) -> None:
        """
        Args:
            model: of which every parameter that is no slot's is frozen.
            slots: what is trained, in order.
        """
        self.model = model
        self.layout = Layout(slots)
        self.parameters = {slot.name: parameter for slot, parameter in slots.items()}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def state(self) -> dict[str, Tensor]:
        """All trained tensors by name, in sorted order, as copies on the CPU."""
        return {name: self.parameters[name].detach().cpu().clone() for name in sorted(self.parameters)}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put tensors, all or some of them, into the model. A tensor of another shape replaces the one that was there.

        Raises:
            KeyError: a name is not one of the adapter's.
        """
        self.layout.only(state)
        for name, value in state.items():
            parameter = self.parameters[name]
            if parameter.shape == value.shape:
                parameter.copy_(value)
            else:  # a site that holds a corner
                parameter.data = value.to(parameter.device, parameter.dtype, copy=True)

    def activate(self, mask: Mask) -> dict[str, nn.Parameter]:
        """Let exactly the named slots require gradients, and clear the gradients of all.

        A parameter without a gradient is skipped by torch's optimizers altogether: no step, no momentum, no weight decay.

        Returns:
            The active parameters by name, in the order of the layout.
        """
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in mask)
            parameter.grad = None
        return {name: parameter for name, parameter in self.parameters.items() if name in mask}

    @torch.no_grad()
    def stir(self, generator: torch.Generator) -> None:
        """Move off zero what starts there, for the check before training: at B = 0 the gradient of A is zero and says nothing."""
        for parameter in self.parameters.values():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))

    @property
    def trainable(self) -> Mask:
        """The slots that may train; the others are public facts that travel with them."""
        return self.layout.trainable

    def prepared(self, base: BaseModel, public: RecordSet) -> dict[str, Tensor]:
        """The adapter that a run starts from: as it was drawn, unless the server makes it of public records."""
        return self.state()

    def losses(self, base: BaseModel, inputs: Inputs, labels: Tensor) -> Tensor:
        """What each record's gradient is that of, shape (n,): the task's loss, unless the form has its own."""
        return base.losses(self.model, inputs, labels)

    def loading(self) -> list[str]:
        """Lines of Python that make ``model`` without this package, for a form that PEFT does not know; none: there are none."""
        return []

    def save(self, folder: Path) -> None:
        """Write the adapter into an empty folder: for a form that no library knows, its tensors under their names."""
        folder.mkdir(parents=True)
        save_file({name: value.contiguous() for name, value in self.state().items()}, folder / "adapter.safetensors")


class AdapterForm:
    """How an adapter is put on a frozen model.

    Attributes:
        gate: the part that starts at zero and without which the other parts have no gradient; empty if there is none.
        parts: the parts besides a head that train or that merges may change, as far as they are known before a model is;
            empty: they are not.
        unused: the ``lora.*`` keys that mean nothing to the form, by their names in `LoraSettings`.
        stride: how much longer than LoRA's B its tensors like to be moved by the noise, for the learning rate's rule.
    """

    gate = ""
    parts: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    stride = 1.0

    def check(self, name: str, settings: Settings) -> None:
        """Refuse settings that the form cannot run with, before a model is loaded.

        Args:
            name: of the form in its registry.
            settings: of the run.

        Raises:
            ConfigError: naming the key, the value and what is allowed.
        """
        usual = LoraSettings()
        for key in sorted(self.unused):
            value = getattr(settings.lora, key)
            if value != getattr(usual, key):
                raise ConfigError(f"lora.{key} = {value!r}: means nothing to the form {name!r}; leave it {getattr(usual, key)!r}")

    def attach(self, base: BaseModel, settings: LoraSettings, seed: int) -> Adapter:
        """Put a fresh adapter on a model.

        The first values follow from the seed alone: every site and the server draw the same, whatever their device and
        precision. Trained tensors are float32 or better. A tensor of the base that is to be trained is copied first, since
        the base's weights are shared. On a model without weights (``meta`` device) only the layout matters.

        Args:
            base: modules of its own, frozen; they may be changed.
            settings: the ``lora.*`` keys.
            seed: of all that is drawn.

        Raises:
            ConfigError: the form does not fit the model.
        """
        raise NotImplementedError
