"""Pixel prompts: a trained frame that is added to the pixels of an image's border (arXiv 2203.17274, its padding template).

It asks nothing of the network but that it takes images, and so is the prompt for Swin and its like. Values are in the scale
of the prepared image. It starts at zero, where the model is as published. Safe under record-level DP as published.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lalora_flwr.adapter.form import AdapterForm
from lalora_flwr.adapter.lora import refuse_batch_norm
from lalora_flwr.adapter.plain import NOT_FACTORS, PlainAdapter, own_head
from lalora_flwr.adapter.slots import Slot
from lalora_flwr.adapter.visual_prompt import PROMPT, refuse_texts
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings, Settings

SHARE = 8  # of the shorter side, by default

BUILDING = """class Framed(torch.nn.Module):
    def __init__(self, network, width, height_and_width):
        super().__init__()
        self.network, self.frame = network, torch.nn.Module()
        inner = torch.zeros(height_and_width, dtype=torch.bool)
        inner[width:-width, width:-width] = True
        self.place = (~inner).flatten().nonzero().squeeze(1)
        self.frame.prompt = torch.nn.Parameter(torch.zeros({channels}, len(self.place)))
    def forward(self, x):
        return self.network((x.flatten(2).index_add(2, self.place, self.frame.prompt.expand(len(x), -1, -1))).view(x.shape))
    def load_state_dict(self, state, **options):
        own = {name if name == "frame.prompt" else f"network.{name}": value for name, value in state.items()}
        return super().load_state_dict(own, **options)
model = Framed(model, {width}, ({height}, {wide}))"""


class Frame(nn.Module):
    """Images (n, channels, height, width) with the frame added.

    Attributes:
        prompt: (channels, pixels of the border), row by row.
    """

    prompt: nn.Parameter
    place: Tensor

    def __init__(self, shape: tuple[int, ...], width: int, like: Tensor) -> None:
        super().__init__()
        channels, height, wide = shape
        inner = torch.zeros(height, wide, dtype=torch.bool, device="cpu")
        inner[width : height - width, width : wide - width] = True
        place = (~inner).flatten().nonzero().squeeze(1)
        kind = torch.promote_types(like.dtype, torch.float32)
        self.prompt = nn.Parameter(torch.zeros(channels, len(place), device=like.device, dtype=kind))
        self.register_buffer("place", place.to(like.device), persistent=False)

    def trained(self, count: int) -> Tensor:
        """The frames of so many images, (count, channels, pixels)."""
        return self.prompt.expand(count, -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        added = x.flatten(2).index_add(2, self.place, self.trained(len(x)).to(x.dtype))
        return added.view(x.shape)


class Framed(nn.Module):
    """A network behind a frame."""

    def __init__(self, network: nn.Module, frame: Frame) -> None:
        super().__init__()
        self.network = network  # first: what comes in takes the type of the first parameter
        self.frame = frame

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(self.frame(x))
        return logits


class PixelPrompt(AdapterForm):
    """A frame ``lora.size`` pixels wide; nothing is drawn but a new head."""

    parts = frozenset({PROMPT})
    unused = NOT_FACTORS | {"targets"}

    def check(self, name: str, settings: Settings) -> None:
        super().check(name, settings)
        refuse_texts(name, settings)

    def attach(self, base: BaseModel, settings: LoraSettings, seed: int) -> PlainAdapter:
        """As `AdapterForm.attach`.

        Raises:
            ConfigError: the frame covers the whole image, there is no head to train, or the model has BatchNorm.
        """
        refuse_batch_norm(base)
        if len(base.input_shape) != 3:
            raise ConfigError(f"lora.form = 'pixel-prompt': {base.name} takes no images; take 'soft-prompt' for texts")
        channels, height, wide = base.input_shape
        width = settings.size or max(1, min(height, wide) // SHARE)
        if not 2 * width < min(height, wide):
            raise ConfigError(f"lora.size = {width}: a frame as wide covers the whole image of {height} x {wide} pixels")
        frame = Frame(base.input_shape, width, next(base.module.parameters()))
        slot = Slot("frame.prompt", "frame", PROMPT, tuple(frame.prompt.shape), None)
        head = own_head(base, settings, seed)
        values = {"{channels}": channels, "{width}": width, "{height}": height, "{wide}": wide}
        lines = BUILDING
        for name, value in values.items():
            lines = lines.replace(name, str(value))
        return PlainAdapter(base, Framed(base.module, frame), {slot: frame.prompt}, head, tuple(lines.splitlines()))


PIXEL_PROMPT = PixelPrompt()
