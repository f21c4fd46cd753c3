"""A first lora_A along its layer's inputs: as a naive reading has it, and through `lalora align` into a run."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from lalora_flwr.adapter.of_inputs import along_inputs
from lalora_flwr.adapter.saved import WEIGHTS
from lalora_flwr.adapter.slots import LORA_A
from lalora_flwr.engines.inline import run_inline
from lalora_flwr.models.text import TextModel
from lalora_flwr.settings import settings_from
from lalora_flwr.training.learner import ModelStore
from tests.cli.commands import assert_one_line
from tests.cli.conftest import lalora  # noqa: F401
from tests.models.files import save_rows, texts
from tests.models.folders import save_hf

RANK = 3


def keys(folder: Path, family: str = "bert", kind: str = "classifier", **more: Any) -> dict[str, Any]:
    if not (folder / "model").is_dir():
        with redirect_stderr(io.StringIO()):  # its progress
            save_hf(folder / "model", family, kind)
        save_rows(folder / "rows.jsonl", texts(60))
        save_rows(folder / "test.jsonl", texts(20, seed=5))
    return {
        "model.name": f"hf/{folder / 'model'}",
        "data.name": f"file:{folder / 'rows.jsonl'}",
        "data.test": f"file:{folder / 'test.jsonl'}",
        "data.labels": "0,1",
        "data.records": 60,
        "data.max-tokens": 12,
        "lora.rank": RANK,
        "num-supernodes": 2,
        "output-dir": str(folder),
        "run-name": "run",
        **more,
    }


def overrides(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in ("-c", f"{name}={json.dumps(value)}")]


def public(count: int = 120) -> list[str]:
    return [row["sentence"] for row in texts(count, seed=9)]


def save_public(folder: Path, count: int = 120) -> Path:
    (folder / "public.txt").write_text("\n\n".join(public(count)))
    return folder / "public.txt"


def naive(random: Tensor, rows: Tensor) -> Tensor:
    """By the singular vectors of all centred inputs, (n, width), at once."""
    directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][: len(random)]
    return directions * (rows @ random.T).square().sum().sqrt() / (rows @ directions.T).square().sum().sqrt()


@pytest.mark.parametrize("at_once", [1, 1 << 30], ids=["layer by layer", "all layers"])
def test_it_is_what_a_naive_reading_gives(tmp_path: Path, at_once: int) -> None:
    learner = ModelStore().learner(settings_from(keys(tmp_path)))
    base, adapter = learner.base, learner.adapter
    assert isinstance(base, TextModel)
    before = {name: value.clone() for name, value in adapter.state().items()}
    lines = public()
    found = along_inputs(adapter, base, lambda: (base.padded(lines[i : i + 50]) for i in range(0, 120, 50)), at_once)

    model = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()  # text by text, without padding
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0]) if given else None
        )
    with torch.no_grad():
        for line in lines:
            model(**words(line, return_tensors="pt", truncation=True, max_length=12))
    changed = [name for name, slot in adapter.layout.items() if slot.part == LORA_A]
    assert changed and found.keys() == before.keys()
    for name in before.keys() - set(changed):
        assert torch.equal(found[name], before[name])
    for name in changed:
        layer = next(own for own in seen if own and f".{own}.lora_A" in name)
        rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen[layer]]).double()
        expected = naive(before[name].double(), rows)
        signs = (found[name].double() * expected).sum(1, keepdim=True).sign()
        assert torch.allclose(found[name].double() * signs, expected, rtol=1e-3, atol=1e-4)


def test_a_run_starts_from_it_and_sites_get_it(tmp_path: Path, lalora: Any) -> None:  # noqa: F811
    given = keys(tmp_path, strategy="steady-lora", **{"train.local-steps": 1, "num-rounds": 1, "privacy.delta": 1e-3})
    code, out, err = lalora("align", "--texts", save_public(tmp_path), "--out", tmp_path / "start", *overrides(given))
    assert (code, err) == (0, "") and "120 texts; adapter in" in out
    start = load_file(tmp_path / "start" / WEIGHTS)
    assert all(value.abs().max() == 0 for name, value in start.items() if "lora_B" in name)
    run = run_inline(settings_from({**given, "lora.start-from": str(tmp_path / "start")}))
    end = load_file(run / "adapter" / WEIGHTS)
    assert all(torch.equal(end[name], start[name]) == ("lora_B" not in name) for name in start)
    fresh = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    again = PeftModel.from_pretrained(fresh, run / "adapter")
    loaded = dict(again.named_parameters())
    assert all(any(torch.equal(value, own) for own in loaded.values()) for name, value in end.items() if "lora_A" in name)


@pytest.mark.parametrize(("family", "kind"), [("roberta", "classifier"), ("llama", "causal")])
def test_other_models_of_texts(tmp_path: Path, lalora: Any, family: str, kind: str) -> None:  # noqa: F811
    more = {"data.response": "sentence", "data.labels": "auto"} if kind == "causal" else {}
    given = keys(tmp_path, family, kind, **{"data.text": "sentence"}, **more)
    code, _, err = lalora("align", "--texts", save_public(tmp_path), "--out", tmp_path / "start", *overrides(given))
    assert (code, err) == (0, ""), err


@pytest.mark.parametrize(
    ("spoil", "more", "said"),
    [
        (lambda file: file.write_bytes(b"\xff\xfe" * 50), {}, "no text in UTF-8"),
        (lambda file: file.write_text("one\n" * 99), {}, "has 99 texts; 100 are the fewest"),
        (lambda file: file.unlink(), {}, "cannot be read: No such file"),
        (lambda file: (file.parent / "start").write_text("mine"), {}, "is there already"),
        (lambda file: None, {"strategy": "bitfit", "lora.rank": 4}, "of the form lora alone"),
        (lambda file: None, {"strategy": "flora"}, "of the form lora alone"),
        (lambda file: None, {"lora.start-from": "."}, "what is aligned is a new adapter"),
        (
            lambda file: None,
            {"model.name": "embedded/vit-digits", "data.name": "digits", "data.test": "auto", "data.labels": ""},
            "takes images",
        ),
    ],
)
def test_what_cannot_be_aligned_is_refused_in_one_line(
    tmp_path: Path,
    lalora: Any,  # noqa: F811
    spoil: Any,
    more: dict[str, Any],
    said: str,
) -> None:
    given, file = keys(tmp_path, **more), save_public(tmp_path)
    spoil(file)
    assert_one_line(lalora("align", "--texts", file, "--out", tmp_path / "start", *overrides(given)), said)
    assert not (tmp_path / "start").is_dir() and not (tmp_path / ".start.part").exists()


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, lalora: Any) -> None:  # noqa: F811
    given = keys(tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")  # what the work would fail at
    (tmp_path / "file").write_text("mine")
    outcome = lalora("align", "--texts", save_public(tmp_path), "--out", tmp_path / "file" / "start", *overrides(given))
    assert_one_line(outcome, "cannot be written: Not a directory; name another folder")


def test_it_is_written_into_the_folder_one_is_in(tmp_path: Path, lalora: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    given, file = keys(tmp_path), save_public(tmp_path)
    (place := tmp_path / "here").mkdir()
    monkeypatch.chdir(place)
    code, _, err = lalora("align", "--texts", file, "--out", ".", *overrides(given))
    assert (code, err) == (0, "")
    assert (place / WEIGHTS).is_file() and not list(tmp_path.glob(".*"))
