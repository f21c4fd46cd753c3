"""The base model that ships with the package: a small vision transformer pretrained on public upright digits.

Its weights are made by ``python -m lalora_assets.make_vit_digits`` from the public part of `lalora_flwr.data.digits`.
"""

from __future__ import annotations

from importlib.resources import files

from torch import nn

from lalora_flwr.data.data_set import Facts
from lalora_flwr.data.digits import IMAGE_SIZE, NUM_CLASSES
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.provenance import provenance
from lalora_flwr.models.published import Published
from lalora_flwr.settings import ModelSettings

ASSET_PACKAGE = "lalora_assets"
ASSET_NAME = "vit-digits.safetensors"

# "attn.proj" rather than "proj": the latter would also match the patch embedding, a convolution
DEFAULT_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

LOADING = (
    "from importlib.resources import files",
    "from safetensors.torch import load",
    "from timm.models.vision_transformer import VisionTransformer",
    f"weights = load(files({ASSET_PACKAGE!r}).joinpath({ASSET_NAME!r}).read_bytes())",
    "base = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=80, depth=2, num_heads=4)",
    "base.load_state_dict({name: tensor.float() for name, tensor in weights.items()})",
)


def vit_digits_architecture() -> nn.Module:
    """The untrained network: images (n, 1, 8, 8) to logits (n, 10), about 158,000 parameters, without any dropout."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=2,
        in_chans=1,
        num_classes=NUM_CLASSES,
        embed_dim=80,
        depth=2,
        num_heads=4,
        mlp_ratio=4.0,
    )


def build_vit_digits() -> nn.Module:
    """The pretrained network in evaluation mode, float32 (the file holds float16).

    Raises:
        ConfigError: if the installed package lacks the weights.
    """
    from safetensors.torch import load

    try:
        raw = files(ASSET_PACKAGE).joinpath(ASSET_NAME).read_bytes()
    except (FileNotFoundError, ModuleNotFoundError):
        raise ConfigError(
            f"model.name = 'embedded/vit-digits': {ASSET_PACKAGE}/{ASSET_NAME} is missing; "
            "reinstall the package or run `python -m lalora_assets.make_vit_digits`"
        ) from None
    model = vit_digits_architecture()
    model.load_state_dict({name: tensor.float() for name, tensor in load(raw).items()})
    return model.eval()


def embedded_model(settings: ModelSettings, facts: Facts) -> BaseModel:
    """The base model as the rest of the package takes it."""
    module = build_vit_digits()
    assert facts.input_shape is not None  # the settings admit only digits
    known = provenance(module, [])
    classes = len(facts.labels)
    return BaseModel(
        *(settings.name, module, "head", DEFAULT_TARGETS, facts.input_shape, classes),
        provenance=known,
        labels=facts.labels,
        published=Published(loading=LOADING),
    )
