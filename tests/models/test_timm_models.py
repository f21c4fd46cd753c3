"""Image models from folders: the saved weights, a head for the task, the model's own preparation, refusals in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset, Image
from PIL import Image as Pil
from safetensors.torch import load_file, save_file

from lalora_flwr.data.cleaning import Rows
from lalora_flwr.data.columns import Columns
from lalora_flwr.data.data_set import Facts
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.models import load_base_model
from lalora_flwr.models.timm_models import timm_model
from lalora_flwr.settings import ModelSettings
from tests.models.folders import TIMM, save_timm

FAMILIES = [("swin", "head.fc"), ("vit", "head")]


def of(classes: int) -> Facts:
    return Facts("image", tuple(str(i) for i in range(classes)))


def load(folder: Path | str, facts: Facts, **settings: Any) -> Any:
    weights = settings.pop("weights", True)
    return load_base_model(ModelSettings(name=f"timm/{folder}", **settings), facts, weights=weights)


@pytest.mark.parametrize(("family", "head"), FAMILIES)
@pytest.mark.parametrize("classes", [7, 3])
def test_the_weights_are_the_saved_ones(tmp_path: Path, family: str, head: str, classes: int) -> None:
    saved = save_timm(tmp_path, family, classes=7)
    base = load(tmp_path, of(classes))
    loaded = base.module.state_dict()
    for name, tensor in saved.state_dict().items():
        if classes == 7 or not name.startswith("head."):
            assert torch.equal(loaded[name], tensor), name
    assert (base.head, base.num_classes, base.fresh_head) == (head, classes, classes != 7)
    inputs, _ = base.synthetic_batch(2, torch.Generator().manual_seed(0))
    assert base.logits(base.module, inputs).shape == (2, classes)


@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_a_fresh_head_is_the_same_each_time(tmp_path: Path, family: str, head: str) -> None:
    save_timm(tmp_path, family)
    first = load(tmp_path, of(4)).module.state_dict()
    torch.rand(3)
    second = load(tmp_path, of(4)).module.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", TIMM)
def test_images_are_prepared_as_the_models_config_says(tmp_path: Path, family: str) -> None:
    """Resized to its size by its interpolation, then (x / 255 - mean) / std; checked with images of one colour."""
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.25)
    save_timm(tmp_path, family, mean=mean, std=std)
    base = load(tmp_path, of(2))
    side = TIMM[family][1]["img_size"]
    assert base.input_shape == (3, side, side)
    colour = (10, 100, 250)
    pictures = [Pil.new("RGB", size, colour) for size in ((side, side), (61, 33))]
    table = Dataset.from_dict({"image": pictures}).cast_column("image", Image())
    inputs, labels = base.encode(Rows(table, Columns(image="image", label="label"), torch.tensor([1, 0]))).batch(torch.arange(2))
    assert inputs.shape == (2, 3, side, side) and labels.tolist() == [1, 0]
    expected = (torch.tensor(colour) / 255 - torch.tensor(mean)) / torch.tensor(std)
    assert torch.allclose(inputs, expected.view(1, 3, 1, 1).expand_as(inputs), atol=1e-6)


def test_an_image_of_the_models_size_is_only_normalised(tmp_path: Path) -> None:
    save_timm(tmp_path, "vit")
    base = load(tmp_path, of(2))
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    expected = (pixels / 255 - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.3, 0.4])
    assert torch.allclose(base.prepare(Pil.fromarray(pixels)), torch.tensor(expected).permute(2, 0, 1).float(), atol=1e-6)


def test_grey_images_become_coloured(tmp_path: Path) -> None:
    save_timm(tmp_path, "vit")
    base = load(tmp_path, of(2))
    table = Dataset.from_dict({"image": [Pil.new("L", (30, 30), 100)]}).cast_column("image", Image())
    inputs, _ = base.encode(Rows(table, Columns(image="image"), torch.tensor([0]))).batch(torch.arange(1))
    assert inputs.shape == (1, 3, 24, 24)


def test_a_plan_builds_no_weights(tmp_path: Path) -> None:
    save_timm(tmp_path, "swin")
    (tmp_path / "model.safetensors").unlink()
    base = load(tmp_path, of(5), weights=False)
    assert all(p.is_meta for p in base.module.parameters()) and base.provenance.digest == ""


def test_random_weights_on_request(tmp_path: Path) -> None:
    saved = save_timm(tmp_path, "vit")
    base = load(tmp_path, of(7), pretrained=False)
    assert base.fresh_head and base.provenance.files == {}
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(base.module.state_dict()[name], saved.state_dict()[name])


def only_pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def one_tensor_less(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["blocks.1.mlp.fc1.weight"]
    save_file(state, folder / "model.safetensors")


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "only pickled weights": (only_pickled, "holds no model.safetensors"),
    "broken weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"broken"), "save_for_hf"),
    "a tensor is missing": (one_tensor_less, "blocks.1.mlp.fc1.weight"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "save_for_hf"),
    "another kind of config": (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "save_for_hf"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no folder with a config.json"),
    "unknown architecture": (lambda folder: edit(folder, architecture="vit_of_nobody"), "vit_of_nobody"),
    "unknown argument": (lambda folder: edit(folder, model_args={"colour": "red"}), "colour"),
}


@pytest.mark.parametrize("classes", [7, 3])
@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, case: str, classes: int) -> None:
    damage, advice = BROKEN[case]
    save_timm(tmp_path, "vit", classes=7)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=advice) as caught:
        load(tmp_path, of(classes))
    assert str(caught.value).startswith("model.name = ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "pretrained", "advice"),
    [
        ("vit_tiny_patch99", True, "timm has no such model"),
        ("vit_tiny_patch99", False, "timm has no such model"),
        ("vit_tiny_patch16_224.of_nobody", True, "of_nobody"),
        ("vit_tiny_patch16_224.of_nobody", False, "of_nobody"),
        ("vit_base_patch16_gap_224", True, "has no published weights; set model.pretrained = false"),
        ("vit_small_patch8_224.dino", True, "put the model into a folder and name that, or set model.pretrained = false"),
        ("deit_tiny_distilled_patch16_224", False, "2 heads"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_in_one_line(
    name: str, pretrained: bool, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=advice) as caught:
        load(name, of(3), pretrained=pretrained)
    assert "\n" not in str(caught.value)


def test_a_folder_cannot_make_timm_read_weights_from_elsewhere(tmp_path: Path) -> None:
    """Its config may name an address or another file; only the safetensors beside it are read."""
    saved = save_timm(tmp_path, "vit")
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {
        "url": "http://localhost:9/evil.bin",
        "file": "evil.bin",
        "hf_hub_id": "evil/evil",
        "source": "hf-hub",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(tmp_path, of(7)).module.head.weight, saved.head.weight)


def test_the_weights_that_the_files_are_named_for_are_those_that_are_read(tmp_path: Path) -> None:
    saved = save_timm(tmp_path, "vit")
    others = {name: torch.zeros_like(tensor) for name, tensor in saved.state_dict().items()}
    for name in ("open_clip_model.safetensors", "a.safetensors"):
        save_file(others, tmp_path / name)
    for name in ("pytorch_model.bin", "open_clip_pytorch_model.bin"):
        torch.save(others, tmp_path / name)
    base = load(tmp_path, of(7))
    assert torch.equal(base.module.head.weight, saved.head.weight)
    assert set(base.provenance.files) == {"config.json", "model.safetensors"}


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize("classes", [1000, 3])
def test_a_published_model_is_read_from_the_file_that_the_hub_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    """timm itself would fetch the weights again, of any revision."""
    asked: list[tuple[str, str, str]] = []
    folder = tmp_path / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        saved = timm.create_model("test_vit", pretrained=False)
    save_file(saved.state_dict(), folder / "model.safetensors")

    def hub(repository: str, file: str, *, revision: str) -> str:
        asked.append((repository, file, revision))
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base: Any = timm_model(
        ModelSettings(name="timm/test_vit.r160_in1k", revision=COMMIT), of(classes), weights=True, download=hub
    )
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors", COMMIT)]
    assert torch.equal(base.module.blocks[0].attn.qkv.weight, saved.blocks[0].attn.qkv.weight)
    assert torch.equal(base.module.head.weight, saved.head.weight) if classes == 1000 else base.fresh_head
    assert base.provenance.revision == COMMIT and set(base.provenance.files) == {"model.safetensors"}


def test_texts_are_not_for_an_image_model(tmp_path: Path) -> None:
    save_timm(tmp_path, "vit")
    with pytest.raises(ConfigError, match="choose an hf/ model"):
        load(tmp_path, Facts("text", ("a", "b")))
