"""What the forms that PEFT does not know have in common, and the simplest of them: a trained head and nothing else.

Their folder holds ``adapter.safetensors``, the trained tensors under the names of the slots, and where the head is trained or
new ``head.safetensors``, under its names in the base model. The model card has the lines that rebuild the model from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import nn

from lalora_flwr.adapter.form import Adapter, AdapterForm
from lalora_flwr.adapter.lora import TRAINED_HEADS, redrawn, refuse_batch_norm, trains_head
from lalora_flwr.adapter.peft_folder import head_modules, head_tensors
from lalora_flwr.adapter.saved import HEAD_FILE, PLAIN
from lalora_flwr.adapter.slots import HEAD, Slot
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import PUBLIC, replace_file
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.four_bits import packing
from lalora_flwr.settings import LoraSettings, Settings

NOT_FACTORS = frozenset({"rank", "alpha", "dropout"})
Slots = dict[Slot, nn.Parameter]


def replaced(module: nn.Module, name: str, value: torch.Tensor) -> nn.Parameter:
    """A parameter of the module's own in place of one that others share, float32 or better; it starts with the value."""
    old = module.get_parameter(name)
    parameter = nn.Parameter(value.detach().to(old.device, torch.promote_types(old.dtype, torch.float32), copy=True))
    setattr(module, name, parameter)
    return parameter


def own_head(base: BaseModel, lora: LoraSettings, seed: int) -> Slots:
    """The slots of a trained head, in place; none if it stays frozen. It starts as a head of LoRA's does.

    Raises:
        ConfigError: a head is to be trained, and there is none.
    """
    if lora.head in TRAINED_HEADS and not base.head:
        raise ConfigError(f"lora.head = {lora.head!r}: {base.name} has no classification head here; leave it frozen")
    slots: Slots = {}
    if not trains_head(base, lora):
        return slots
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        for layer, module in head_modules(base).items():
            start = base.head_weights.get(layer, module.state_dict())
            if base.fresh_head and not any(value.is_meta for value in module.state_dict().values()):
                start = redrawn(module).state_dict()
            for own, _ in list(module.named_parameters()):
                parent, _, name = own.rpartition(".")
                parameter = replaced(module.get_submodule(parent), name, start[own])
                slots[Slot(f"{layer}.{own}", layer, HEAD, tuple(parameter.shape))] = parameter
    return slots


def lines_of_base(base: BaseModel) -> list[str]:
    """Lines of Python that make ``model``, the frozen one in float32, and know ``adapter``, the folder."""
    narrow = next(base.module.parameters()).dtype == torch.bfloat16
    return [
        "import torch",
        "from pathlib import Path",
        "from safetensors.torch import load_file",
        'adapter = "."  # this folder',
        *base.published.loading,
        *packing(base),
        f"model = base.{'bfloat16().' if narrow else ''}float().eval()",
    ]


class PlainAdapter(Adapter):
    """Trained tensors of a form, and of the head if it is trained."""

    def __init__(self, base: BaseModel, model: nn.Module, slots: Slots, head: Slots, building: tuple[str, ...] = ()) -> None:
        """
        Args:
            base: of the adapter.
            model: runs it.
            slots: of the form.
            head: of the head.
            building: lines of Python that change ``model`` so that it has a place for each slot, under its name; none if it does.
        """
        super().__init__(model, {**slots, **head})
        self._base, self._own, self._building = base, [slot.name for slot in slots], building
        self.of_base: Mapping[str, str] = {slot.name: slot.name for slot in head}

    def _saves_head(self) -> bool:
        return bool(self._base.head) and (bool(self.of_base) or self._base.fresh_head)

    def save(self, folder: Path) -> None:
        """The form's tensors and, if it is trained or new, the head's; of a wrapped model under the names of the one inside."""
        folder.mkdir(parents=True)
        inside = self._base.published.inside
        state = self.state()
        own = {name.removeprefix(inside): state[name].contiguous() for name in self._own}
        save_file(own, folder / PLAIN)
        if self._saves_head():
            head = head_tensors(self._base)
            if inside:
                head = {name.removeprefix(f"{self._base.head}."): value for name, value in head.items()}
            replace_file(folder / HEAD_FILE, save(head), mode=PUBLIC)
        self._base.save_config(folder)

    def loading(self) -> list[str]:
        files = [PLAIN] if self._own else []
        if self._saves_head() and not self._base.published.inside:
            files.append(HEAD_FILE)
        load = [f'model.load_state_dict(load_file(Path(adapter) / "{file}"), strict=False)' for file in files]
        return [*lines_of_base(self._base), *self._building, *load, "model.eval()"]


class HeadOnly(AdapterForm):
    """The classification head alone ("linear probe"): features stay those of the published model, whose noise is the least."""

    parts = frozenset({HEAD})
    unused = NOT_FACTORS | {"targets", "size"}

    def check(self, name: str, settings: Settings) -> None:
        super().check(name, settings)
        if settings.lora.head == "frozen":
            raise ConfigError(f"lora.head = 'frozen': the form {name!r} trains the head and nothing else; leave it 'auto'")
        if settings.task == "language":
            raise ConfigError(f"lora.form = {name!r}: a language model has no classification head; choose another form")

    def attach(self, base: BaseModel, settings: LoraSettings, seed: int) -> PlainAdapter:
        """As `AdapterForm.attach`.

        Raises:
            ConfigError: there is no head, or the model has BatchNorm.
        """
        refuse_batch_norm(base)
        if not base.head:
            raise ConfigError(f"lora.form = 'head': {base.name} has no classification head here; choose another form")
        whole = LoraSettings(head="trained")
        return PlainAdapter(base, base.module, {}, own_head(base, whole, seed))


HEAD_ONLY = HeadOnly()
