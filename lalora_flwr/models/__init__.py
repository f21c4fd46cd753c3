"""Base models by name.

    embedded/vit-digits    the small vision transformer that ships with the package
    timm/<name>            an image classifier of timm, sized for the data set's records
"""

from __future__ import annotations


from lalora_flwr.config import ModelSettings
from lalora_flwr.data.records import Dataset
from lalora_flwr.errors import ConfigError
from lalora_flwr.models.base import BaseModel


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
        raise ConfigError(f"model.name = {settings.name!r}: timm has no such model" + (f"; near: {', '.join(near)}" if near else ""))
    channels, *size = data.input_shape
    options = {"num_classes": data.num_classes, "in_chans": channels}
    for attempt in ({"img_size": size[0]}, {}):  # only some architectures are built for one image size
        try:
            module = timm.create_model(name, pretrained=settings.pretrained, **options, **attempt)
            break
        except TypeError:
            continue
        except Exception as error:
            raise ConfigError(f"model.name = {settings.name!r}: cannot be built for records of shape {data.input_shape}: {error}") from None
    head = module.default_cfg.get("classifier", "head") if hasattr(module, "default_cfg") else "head"
    return BaseModel(settings.name, module, head, ("attn.qkv", "attn.proj"), data.input_shape, data.num_classes)
