"""Image classifiers of timm: published ones by name, or a folder with ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn

from lalora_flwr.data.data_set import Facts
from lalora_flwr.data.images import ImageRecords
from lalora_flwr.data.records import RecordSet
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import expanded
from lalora_flwr.models.base import BaseModel
from lalora_flwr.models.provenance import Provenance, commit_of, provenance
from lalora_flwr.models.published import Published
from lalora_flwr.models.targets import timm_targets
from lalora_flwr.settings import ModelSettings

if TYPE_CHECKING:
    from lalora_flwr.data.cleaning import Rows

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TimmClassifier(BaseModel):
    """An image classifier with its own preparation of images."""

    prepare: Callable[[Image.Image], Tensor] | None = None

    def encode(self, rows: Rows) -> RecordSet:
        """Images resized and normalised as the model was trained, without augmentation."""
        if self.prepare is None:
            return super().encode(rows)
        mode = {1: "L", 3: "RGB"}[self.input_shape[0]]
        return ImageRecords(rows.table, rows.columns.image, rows.labels, self.prepare, mode)


def timm_model(
    settings: ModelSettings, facts: Facts, *, weights: bool, download: Callable[..., str] = hf_hub_download
) -> BaseModel:
    """A timm model for a data set.

    Args:
        settings: ``timm/<name>`` or ``timm/<folder>``, revision, whether the published weights are wanted.
        facts: the data set's.
        weights: False builds the architecture only, on whatever device is the default.
        download: brings a file of the hub onto the disk: repository, file name and ``revision`` -> path.

    Raises:
        ConfigError: unknown model, several heads, or weights that are out of reach or no safetensors.
    """
    import timm
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    if facts.task != "image":
        raise ConfigError(f"model.name = {settings.name!r}: timm models take images; choose an hf/ model")
    name = settings.name.removeprefix("timm/")
    folder = expanded(name)
    local = (folder / "config.json").is_file()
    if not local and not timm.is_model(name.partition(".")[0]):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        raise ConfigError(
            f"model.name = {settings.name!r}: timm has no such model and it is no folder with a config.json"
            + (f"; near: {', '.join(near)}" if near else "")
        )
    files: list[Path] = []
    options: dict[str, Any] = {"num_classes": facts.outputs}
    if settings.pretrained and weights:
        file = _local_weights(settings, folder) if local else _hub_weights(settings, name, download)
        files = [file, folder / "config.json"] if local else [file]
        # with the published number of classes every weight must be there; only then does the head change
        options = {"pretrained": True, "pretrained_cfg_overlay": {"source": "", "file": str(file)}}
    module: Any
    module, shaping = _created(settings, f"local-dir:{folder}" if local else name, facts.input_shape, options)
    published: dict[str, Any] = getattr(module, "pretrained_cfg", {})
    head = published.get("classifier", "head")
    if not isinstance(head, str):
        raise ConfigError(f"model.name = {settings.name!r}: has {len(head)} heads; choose a model with one")
    classes = module.num_classes if files else published.get("num_classes")  # as the weights have them; without, as they should
    fresh = not settings.pretrained or classes != facts.outputs or not facts.problem.named
    if files and fresh:
        module.reset_classifier(facts.outputs)
    through_modules(module)
    preparation: dict[str, Any] = resolve_data_config({}, model=module)  # type: ignore[no-untyped-call]
    about = json.dumps([published.get("architecture"), preparation], sort_keys=True)
    return TimmClassifier(
        settings.name,
        module,
        head,
        timm_targets(module),
        facts.input_shape or tuple(preparation["input_size"]),
        facts.outputs,
        fresh_head=fresh,
        provenance=provenance(module, files, commit_of(files[0]) if files else "", about) if weights else Provenance(),
        prepare=None if facts.input_shape else create_transform(**preparation, is_training=False),
        labels=facts.labels,
        problem=facts.problem,
        published=_published(settings, published, folder if local else None, {"num_classes": facts.outputs, **shaping}),
    )


SEPARATE_BIAS = (
    "for part in base.modules():",
    "    if hasattr(part, 'qkv_bias_separate'):",
    "        part.qkv_bias_separate = True  # else its attention would pass the adapter by",
)


def _published(settings: ModelSettings, config: dict[str, Any], folder: Path | None, shaping: dict[str, Any]) -> Published:
    """How the model is loaded elsewhere; ``shaping`` are the arguments that ``create_model`` got besides the weights."""
    architecture, tag = config.get("architecture") or settings.name.removeprefix("timm/"), config.get("tag")
    name = f"{architecture}.{tag}" if tag else architecture
    if folder:  # the name that it was made from says nothing of its weights, and its licence neither
        place, source = str(folder.absolute()), f"local-dir:{folder.absolute()}"
    else:
        repository, source = config.get("hf_hub_id") or "timm/", name
        place = f"timm/{name}" if repository == "timm/" else repository
    given = "".join(f", {key}={value}" for key, value in shaping.items())
    loading = ["import timm"]
    if not settings.pretrained:
        loading += ["import torch", "torch.manual_seed(0)  # its weights are random: those of this torch version"]
    loading.append(f"base = timm.create_model({source!r}, pretrained={settings.pretrained}{given})")
    if architecture.startswith(("swinv2", "beit", "eva")):
        loading += SEPARATE_BIAS
    return Published(place, loading=tuple(loading), license="" if folder else str(config.get("license") or ""))


def through_modules(module: nn.Module) -> None:
    """Make the attention of SwinV2, BEiT and EVA call its ``qkv`` layer, whose weight alone it would read otherwise.

    timm's own switch: the bias is then added afterwards. An adapter on a layer that is not called would do nothing.
    """
    for part in module.modules():
        if hasattr(part, "qkv_bias_separate"):
            part.qkv_bias_separate = True  # type: ignore[assignment]


def _created(
    settings: ModelSettings, name: str, input_shape: tuple[int, ...] | None, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and what gave it the shape of the records."""
    import timm

    try:
        if not input_shape:
            return timm.create_model(name, **options), {}
        shaping: dict[str, Any] = {"in_chans": input_shape[0]}
        sized: dict[str, Any] = {**shaping, "img_size": input_shape[1]}
        try:
            return timm.create_model(name, **options, **sized), sized
        except TypeError:  # an architecture that takes any size has no such argument
            return timm.create_model(name, **options, **shaping), shaping
    except Exception as error:  # broken files, an image too small: timm and its loaders raise many types
        what = f" for {input_shape[1]} x {input_shape[2]} images" if input_shape else ""
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model.name = {settings.name!r}: cannot be made{what}: {reason}; a folder is as timm.models.save_for_hf writes it"
        ) from None


def _local_weights(settings: ModelSettings, folder: Path) -> Path:
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"model.name = {settings.name!r}: the folder holds no {WEIGHTS}; other formats can run code")
    return folder / WEIGHTS


def _hub_weights(settings: ModelSettings, name: str, download: Callable[..., str]) -> Path:
    from timm.models import get_pretrained_cfg

    try:
        published = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ConfigError(f"model.name = {settings.name!r}: {error}") from None
    repository = getattr(published, "hf_hub_id", None)
    if not repository:
        raise ConfigError(f"model.name = {settings.name!r}: has no published weights; set model.pretrained = false")
    if repository == "timm/":  # timm's short form: the repository is named like the model
        repository = f"timm/{published.architecture}.{published.tag}"  # type: ignore[union-attr]
    try:
        return Path(download(repository, WEIGHTS, revision=settings.revision or None))
    except Exception as error:  # no network, no such revision, no safetensors there
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model.name = {settings.name!r}: {WEIGHTS} of {repository} cannot be downloaded: {reason}; put the model into a "
            "folder and name that, or set model.pretrained = false"
        ) from None
