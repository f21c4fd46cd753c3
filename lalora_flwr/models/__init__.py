"""Base models by name.

embedded/vit-digits    the small vision transformer that ships with the package
timm/<name>            an image classifier of timm, sized for the data set's records
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lalora_flwr.config import ModelSettings
from lalora_flwr.data.records import Dataset
from lalora_flwr.errors import ConfigError
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.targets import TIMM_TARGETS


def load_base_model(settings: ModelSettings, data: Dataset) -> BaseModel:
    """Load a frozen base model for a data set.

    Raises:
        ConfigError: unknown model, or one that cannot be built for the data set or be loaded.
    """
    if settings.name == "embedded/vit-digits":
        from lalora_flwr.models.embedded import DEFAULT_TARGETS, build_vit_digits

        return BaseModel(settings.name, build_vit_digits(), "head", DEFAULT_TARGETS, data.input_shape, data.num_classes)
    if settings.name.startswith("timm/"):
        return _timm_model(settings, data)
    raise ConfigError(f"model.name = {settings.name!r}: must be embedded/vit-digits or timm/<name>")


def _timm_model(settings: ModelSettings, data: Dataset) -> BaseModel:
    import timm

    name = settings.name.removeprefix("timm/")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        raise ConfigError(
            f"model.name = {settings.name!r}: timm has no such model" + (f"; near: {', '.join(near)}" if near else "")
        )
    channels, size, _ = data.input_shape
    module = _created(name, settings.pretrained, data.num_classes, channels, size)
    head = getattr(module, "default_cfg", {}).get("classifier", "head")
    if not isinstance(head, str):
        raise ConfigError(f"model.name = {settings.name!r}: has {len(head)} heads; choose a model with one")
    return BaseModel(settings.name, module, head, TIMM_TARGETS, data.input_shape, data.num_classes)


def _created(name: str, pretrained: bool, num_classes: int, channels: int, size: int) -> nn.Module:
    """A timm model for images (channels, size, size)."""
    import timm

    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": num_classes, "in_chans": channels}
    try:
        try:
            return timm.create_model(name, **options, img_size=size)
        except TypeError:  # an architecture that takes any size has no such argument
            return timm.create_model(name, **options)
    except Exception as error:  # a hub out of reach, or an image too small: timm and its loaders raise many types
        raise ConfigError(f"model.name = 'timm/{name}': cannot be made for {size} x {size} images: {error}") from None
