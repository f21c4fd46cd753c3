"""A run that starts from an earlier adapter: from that very one, or with one clear line not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lalora_flwr.adapter.saved import CONFIG, WEIGHTS
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.ground.files import file_digest
from lalora_flwr.server.certificate import CERTIFICATE
from tests.conftest import Finished, Spy, run_spied, small, strict_json

MakeFinished = Callable[..., Finished]
FIRST: dict[str, Any] = {"num_rounds": 2, "train__lr": 1.0}
HEAD = {"lora__head": "trained"}
KINDS: list[dict[str, Any]] = [
    {"strategy": "la-lora"},
    {"strategy": "ffa-lora"},  # A never trains: no seed of the second run gives it
    {"strategy": "steady-lora", "train__local_steps": 1},  # an average is what is saved
    {"strategy": "la-lora", **HEAD},
    {"strategy": "bitfit", "lora__targets": "auto", "lora__rank": 4, "lora__alpha": 8.0},
    {"strategy": "bottleneck", "lora__targets": "auto", "lora__rank": 4, "lora__alpha": 8.0},
    {"strategy": "hetlora", "profiles": "rank=1;rank=2"},
]


def following(folder: Path, first: Path, **keys: Any) -> Any:
    return small(folder, **{**FIRST, "seed": 7, "lora__start_from": str(first), **keys})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(map(str, kind.values())))
def test_it_starts_as_good_as_the_earlier_one_ended(finished: MakeFinished, tmp_path: Path, kind: dict[str, Any]) -> None:
    first = finished(**FIRST, **kind)
    folder = run_inline(following(tmp_path, first.path, **kind))
    summary = strict_json((folder / "summary.json").read_text())
    for name in ("accuracy", "loss"):
        assert summary[f"frozen_{name}"] == pytest.approx(first.summary[name], abs=1e-6)
    (weights,) = (first.path / "adapter").glob("adapter*.safetensors")
    assert summary["started_from"] == file_digest(weights)


def test_sites_get_what_no_seed_gives(finished: MakeFinished, tmp_path: Path) -> None:
    first, spy = finished(**FIRST, strategy="ffa-lora"), Spy()
    run_spied(following(tmp_path, first.path, strategy="ffa-lora"), spy)
    saved = load_file(first.path / "adapter" / WEIGHTS)
    order, reply = spy.training(1)[0]
    sent = order.content["arrays"].to_torch_state_dict()
    assert sent.keys() == saved.keys() and all(torch.equal(sent[name], saved[name]) for name in saved)
    assert all("lora_B" in name for name in reply.content["arrays"])


def test_lora_can_go_on_as_a_method_with_a_residual(finished: MakeFinished, tmp_path: Path) -> None:
    first = finished(**FIRST, strategy="dp-lora")
    summary = strict_json((run_inline(following(tmp_path, first.path, strategy="fedex-lora")) / "summary.json").read_text())
    assert summary["frozen_loss"] == pytest.approx(first.summary["loss"], abs=1e-6)


class Killed(BaseException):
    """Ends a run where it is."""


def test_a_resumed_run_needs_the_folder_no_more(finished: MakeFinished, tmp_path: Path) -> None:
    first = finished(**FIRST)
    copy = tmp_path / "copy"
    shutil.copytree(first.path / "adapter", copy)

    def on_round(line: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        run_inline(following(tmp_path, copy), on_round)
    digest = file_digest(copy / WEIGHTS)
    shutil.rmtree(copy)
    folder = run_inline(following(tmp_path, copy, resume=True))
    assert strict_json((folder / "summary.json").read_text())["started_from"] == digest


def test_what_came_before_is_said_to_be_left_out_of_epsilon(finished: MakeFinished, tmp_path: Path) -> None:
    first = finished(**FIRST)
    folder = run_inline(following(tmp_path, first.path))
    digest = file_digest(first.path / "adapter" / WEIGHTS)
    (left_out,) = strict_json((folder / CERTIFICATE).read_text())["not_covered"]
    assert digest in left_out and digest in (folder / "PRIVACY.md").read_text()
    card = (folder / "adapter" / "README.md").read_text()
    assert digest in card and "of the adapter it started from" in card and "frozen model" not in card


def refused(tmp_path: Path, first: Path, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        run_inline(following(tmp_path, first, **keys))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"lora__rank": 3, "lora__alpha": 6.0}, "rank"),
        ({"lora__alpha": 1.0}, "set lora.alpha = 4"),
        ({"lora__targets": "attn.proj"}, "holds no"),
        ({"lora__targets": "attn.qkv,attn.proj"}, "holds no"),
        ({"lora__head": "trained"}, "holds no"),
        ({"lora__head": "ridge"}, "ridge head"),
        ({"strategy": "fed-sb"}, "holds no"),
        ({"merge__travel": "trained"}, "everything-down"),
    ],
    ids=str,
)
def test_another_adapter_than_the_runs_is_refused(
    finished: MakeFinished, tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    assert words in refused(tmp_path, finished(**FIRST).path, **keys)


def test_layers_and_heads_that_the_run_would_drop_are_refused(finished: MakeFinished, tmp_path: Path) -> None:
    first = finished(**FIRST, lora__targets="attn.qkv,attn.proj").path
    assert "set lora.targets as it was" in refused(tmp_path, first)
    first = finished(**FIRST, **HEAD).path
    assert "set lora.head = 'trained'" in refused(tmp_path, first)


def _no_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def _nan(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def _times(factor: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file({name: value * factor for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)

    return change


def _as(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file({name: value.to(dtype) for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)

    return change


def _four_bits(folder: Path) -> None:
    """Two numbers of a type that safetensors holds and torch computes nothing with."""
    header = b'{"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(1))


def _says(**about: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **about}))

    return change


def _no_config(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_file, "no adapter's folder"),
        (_cut, "is damaged"),
        (_nan, "not finite"),
        (_times(1e30), "above 10000"),
        (_as(torch.complex64), "no floating-point numbers"),
        (_as(torch.int32), "no floating-point numbers"),
        (_says(lora_alpha=10**400), "no configuration of an adapter"),
        (_says(lora_alpha=float("nan")), "no configuration of an adapter"),
        (_says(r=float("inf"), lora_alpha=float("inf")), "no configuration of an adapter"),
        (_no_config, "no configuration of an adapter"),
        (lambda folder: (folder / CONFIG).unlink(), "lacks adapter_config.json"),
        (_says(r=0), "no configuration of an adapter"),
        (_says(use_rslora=True), "no plain LoRA"),
        (_says(use_dora=True), "no plain LoRA"),
        (_says(rank_pattern={"qkv": 1}), "no plain LoRA"),
        (_says(alpha_pattern={"qkv": 64}), "no plain LoRA"),
        (_four_bits, "is damaged"),
        (_says(lora_alpha=8), "set lora.alpha = 8"),
    ],
)
def test_a_folder_that_is_damaged_or_says_otherwise_is_refused(
    finished: MakeFinished, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished(**FIRST).path / "adapter", copy)
    damage(copy)
    assert words in refused(tmp_path, copy)
