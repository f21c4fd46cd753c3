"""Visual prompts: trained tokens among those of an image (VPT-shallow, arXiv 2203.12119).

The tokens join those of the patches before the first block and are taken out again after the last, so that a mean over
patches is one over patches. They have no position: attention does not ask where among the tokens they stand. Safe under
record-level DP as published. Only timm's `VisionTransformer` has a place for them: in Swin every window would need its own,
and its patches are merged by place; take ``pixel-prompt`` there.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lalora_flwr.adapter.form import AdapterForm
from lalora_flwr.adapter.plain import NOT_FACTORS, PlainAdapter, own_head
from lalora_flwr.adapter.slots import Slot
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.settings import LoraSettings, Settings

PROMPT = "prompt"
TOKENS = 10
PLACE = "norm_pre"

BUILDING = """class WithTokens(torch.nn.Module):
    def __init__(self, before, prompt):
        super().__init__()
        self.before, self.prompt = before, torch.nn.Parameter(torch.zeros_like(prompt))
    def forward(self, x):
        return torch.cat([self.before(x), self.prompt.expand(len(x), -1, -1)], 1)
class WithoutTokens(torch.nn.Module):
    def __init__(self, after, tokens):
        super().__init__()
        self.after, self.tokens = after, tokens
    def forward(self, x):
        return self.after(x[:, :-self.tokens])
prompt = load_file(Path(adapter) / "adapter.safetensors")["norm_pre.prompt"]
model.norm_pre, model.norm = WithTokens(model.norm_pre, prompt), WithoutTokens(model.norm, len(prompt))"""


def refuse_texts(name: str, settings: Settings) -> None:
    """
    Raises:
        ConfigError: the run's records are no images.
    """
    if settings.task != "image":
        raise ConfigError(f"lora.form = {name!r}: is for images; take 'soft-prompt' for texts")


class WithTokens(nn.Module):
    """Tokens (n, t, d) and behind them the trained ones.

    Attributes:
        prompt: (tokens, d).
    """

    prompt: nn.Parameter

    def __init__(self, before: nn.Module, tokens: int, like: Tensor) -> None:
        super().__init__()
        self.before = before
        kind = torch.promote_types(like.dtype, torch.float32)
        self.prompt = nn.Parameter(torch.zeros(tokens, like.shape[-1], device=like.device, dtype=kind))

    def trained(self, count: int) -> Tensor:
        """The trained tokens of so many records, (count, tokens, d)."""
        return self.prompt.expand(count, -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return torch.cat([x, self.trained(len(x)).to(x.dtype)], 1)


class WithoutTokens(nn.Module):
    """The same tokens without the last ones, for the layer that follows."""

    def __init__(self, after: nn.Module, tokens: int) -> None:
        super().__init__()
        self.after, self.tokens = after, tokens

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(x[:, : -self.tokens])
        return y


class VisualPrompt(AdapterForm):
    """``lora.size`` tokens, drawn as VPT draws them: uniformly, with the spread of a patch embedding's weights."""

    parts = frozenset({PROMPT})
    unused = NOT_FACTORS | {"targets"}

    def check(self, name: str, settings: Settings) -> None:
        super().check(name, settings)
        refuse_texts(name, settings)

    def attach(self, base: BaseModel, settings: LoraSettings, seed: int) -> PlainAdapter:
        """As `AdapterForm.attach`.

        Raises:
            ConfigError: the model is no plain vision transformer, or there is no head to train.
        """
        network = base.module
        if not isinstance(network, VisionTransformer):
            raise ConfigError(
                f"lora.form = 'visual-prompt': {base.name} is no plain vision transformer, and its blocks have no place for more "
                "tokens; take 'pixel-prompt'"
            )
        tokens, like = settings.size or TOKENS, network.patch_embed.proj.weight  # (d, channels, side, side)
        place = WithTokens(network.norm_pre, tokens, like.flatten(1).T)
        if not place.prompt.is_meta:
            most = (6 / (like[0].numel() + len(like))) ** 0.5
            drawn = torch.rand(place.prompt.shape, generator=torch.Generator().manual_seed(seed))
            place.prompt.data.copy_((2 * drawn - 1) * most)
        network.norm_pre, network.norm = place, WithoutTokens(network.norm, tokens)
        slot = Slot(f"{PLACE}.prompt", PLACE, PROMPT, tuple(place.prompt.shape), 1)
        head = own_head(base, settings, seed)
        return PlainAdapter(base, network, {slot: place.prompt}, head, tuple(BUILDING.splitlines()))


VISUAL_PROMPT = VisualPrompt()
