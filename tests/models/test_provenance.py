"""Which model it is: every weight and every file counts, and a site with another one refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from safetensors.torch import load_file, save_file
from torch import nn

from lalora_flwr.data.data_set import Facts
from lalora_flwr.models import load_base_model
from lalora_flwr.models.provenance import Provenance, commit_of, weights_digest
from lalora_flwr.settings import ModelSettings, Settings
from lalora_flwr.site.model import MODEL_DIFFERS
from tests.conftest import small
from tests.models.folders import save_hf, save_timm
from tests.sites import VIRTUAL, train_order


def of_text(folder: Path) -> Provenance:
    return load_base_model(ModelSettings(name=f"hf/{folder}"), Facts("text", ("a", "b"))).provenance


def of_image(folder: Path) -> Provenance:
    return load_base_model(ModelSettings(name=f"timm/{folder}"), Facts("image", ("a", "b"))).provenance


def save_text(folder: Path) -> None:
    save_hf(folder, "bert", "classifier")


def save_image(folder: Path) -> None:
    save_timm(folder, "vit")


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Provenance]]] = {
    "text": (save_text, of_text),
    "image": (save_image, of_image),
}


def change_one_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(name for name in sorted(state) if name.endswith("weight") and "head" not in name and "classifier" not in name)
    flat = state[name].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))  # the last bit
    save_file(state, path, metadata={"format": "pt"})


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap_words(words: dict[str, Any]) -> None:
    vocabulary = words["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]


CHANGES: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "one bit of a text model": ("text", "model.safetensors", change_one_weight),
    "one bit of an image model": ("image", "model.safetensors", change_one_weight),
    "its activation": ("text", "config.json", lambda f: edit(f / "config.json", lambda c: c.update(hidden_act="relu"))),
    "its heads": ("text", "config.json", lambda f: edit(f / "config.json", lambda c: c.update(num_attention_heads=4))),
    "its words": ("text", "tokenizer.json", lambda f: edit(f / "tokenizer.json", swap_words)),
    "its mean": (
        "image",
        "config.json",
        lambda f: edit(f / "config.json", lambda c: c["pretrained_cfg"].update(mean=[0.1, 0.1, 0.1])),
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_the_model_changes_its_digest_and_the_files(tmp_path: Path, case: str) -> None:
    kind, file, change = CHANGES[case]
    save, load = KINDS[kind]
    save(tmp_path)
    before = load(tmp_path)
    change(tmp_path)
    after = load(tmp_path)
    assert after.digest != before.digest
    assert {name for name in before.files if after.files[name] != before.files[name]} == {file}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_elsewhere_is_the_same_model(tmp_path: Path, kind: str) -> None:
    save, load = KINDS[kind]
    save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "snapshots" / "b")
    first = load(tmp_path / "a")
    assert first == load(tmp_path / "snapshots" / "b")
    assert first.revision == ""
    for name, found in first.files.items():
        assert found == hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest()
    assert {"model.safetensors", "config.json"} <= set(first.files)


def test_the_digest_covers_names_shapes_types_and_values() -> None:
    def made(**tensors: torch.Tensor) -> nn.Module:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return module

    digests = {
        weights_digest(made(a=torch.zeros(4))),
        weights_digest(made(b=torch.zeros(4))),
        weights_digest(made(a=torch.zeros(2, 2))),
        weights_digest(made(a=torch.zeros(2, dtype=torch.float64))),
        weights_digest(made(a=torch.tensor([0.0, 0.0, 0.0, -0.0]))),
        weights_digest(made(a=torch.zeros(4), b=torch.zeros(0))),
    }
    assert len(digests) == 6
    assert weights_digest(made(a=torch.zeros(4))) in digests


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("path", "commit"),
    [
        (f"hub/models--a--b/snapshots/{COMMIT}/config.json", COMMIT),
        ("backup/snapshots/2026/model/config.json", ""),
        ("backup/snapshots/model/config.json", ""),
        (f"{COMMIT}/config.json", ""),
    ],
)
def test_the_commit_is_that_of_the_hubs_cache(path: str, commit: str) -> None:
    assert commit_of(Path(path)) == commit


def text_settings(tmp_path: Path) -> Settings:
    save_text(tmp_path / "model")
    lines = ["text\tlabel", *(f"{word} film\t{word}" for word in ("good", "bad") * 30)]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    return small(
        tmp_path,
        model__name=f"hf/{tmp_path / 'model'}",
        lora__targets="query",
        data__name=f"file:{tmp_path / 'train.tsv'}",
        data__labels="bad,good",
        data__test="hold-out:0.2",
    )


def serve(settings: Settings, context: Context, model_path: Path | None, **changed: Any) -> Message:
    """One order, as the server with its own model gives it, to a site that may have its model elsewhere."""
    if model_path:
        context.node_config["model-path"] = str(model_path)
    return VIRTUAL(train_order(settings, **changed), context)


@pytest.mark.parametrize("case", ["one bit of a text model", "its words", "its activation"])
def test_a_site_with_another_model_refuses(tmp_path: Path, context: Callable[[Settings], Context], case: str) -> None:
    settings = text_settings(tmp_path)
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    CHANGES[case][2](tmp_path / "other")
    held = context(settings)
    assert serve(settings, held, tmp_path / "other").error.reason.startswith("model: the site's base model differs")
    assert not held.state  # nothing was counted, as no record was read


def test_a_site_with_the_same_model_in_another_place_serves(tmp_path: Path, context: Callable[[Settings], Context]) -> None:
    settings = text_settings(tmp_path)
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    assert not serve(settings, context(settings), tmp_path / "other").has_error()


@pytest.mark.parametrize("path", ["prajjwal1/bert-tiny", "gone", "."])
def test_a_model_path_that_is_no_folder_is_no_name_for_the_hub(
    path: str, tmp_path: Path, context: Callable[[Settings], Context], caplog: pytest.LogCaptureFixture
) -> None:
    settings = text_settings(tmp_path)
    held = context(settings)
    assert serve(settings, held, Path(path)).error.reason == MODEL_DIFFERS and not held.state
    assert f"model-path = {path!r}: no folder with a config.json" in caplog.text


def test_an_order_is_for_one_model(tmp_path: Path, context: Callable[[Settings], Context]) -> None:
    settings = text_settings(tmp_path)
    assert serve(settings, context(settings), None, model_digest="0" * 64).error.reason.startswith("model: ")
