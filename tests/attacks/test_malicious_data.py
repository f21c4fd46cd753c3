"""Records that somebody made to break a round: one bad record neither silences a site nor tells on itself (hole 6)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lalora_flwr.data.images import ImageRecords
from tests.attacks.attacker import RECORDS, RUN, Site, table, text_model
from tests.attacks.orders import order
from tests.attacks.problems import problems
from tests.data.files import png
from tests.models.folders import save_timm

GOOD = RECORDS[:5]
BEYOND = "scenography"  # a word that the tokenizer knows and the model does not


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has one token more than the model has embeddings."""
    folder = text_model(tmp_path_factory.mktemp("narrow") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([BEYOND])
    tokenizer.save_pretrained(folder)
    return folder


def rounds(model: Path, whole: Site, without: Site, run: dict[str, Any]) -> list[str]:
    """Both rounds of a run of two, on records with a bad one and on those without it."""
    found = []
    for server_round in (1, 2):
        message = order(run, model, server_round=server_round)
        found += problems(message, run, whole, without, seed=server_round, all_usable=False)
        served = whole.serve(message, run)
        found += [f"the site does not answer: {served.reason}"] if served.reason else []
    return found


def test_a_tokenizer_beyond_its_model_is_refused_whatever_the_records_are(narrow: Path, tmp_path: Path) -> None:
    """Hole 6: records with a token beyond the embeddings failed both rounds of their site, with IndexError in its log."""
    whole = Site(table(tmp_path / "with.csv", [*GOOD, (f"the {BEYOND} is good", "good")]), narrow)
    without = Site(table(tmp_path / "without.csv", GOOD), narrow)
    answers = [site.serve(order(RUN, narrow), RUN) for site in (whole, without)]
    assert answers[0].reason == answers[1].reason and answers[0].reason.startswith("model: ")
    assert not any(answer.reserved for answer in answers)


TEXTS: dict[str, tuple[str, str]] = {
    "giant": ("film " * 200_000, "good"),
    "no words": ("\t \u3000 ", "good"),
    "one character": ("x", "good"),
    "unknown words": ("\U0001f600 \u202e \ufeff \x7f", "good"),
    "null byte": ("the film\x00 is good", "good"),
    "unknown class": ("the film is good", "excellent"),
    "no class": ("the film is good", ""),
    "not a number": ("nan", "nan"),
    "special tokens": ("[PAD] [CLS] [SEP] [MASK] [UNK]", "good"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_an_odd_text_is_a_record_like_any_other(name: str, model: Path, tmp_path: Path) -> None:
    """Hole 6: what the data hold decides neither whether a site answers nor what it counts."""
    whole = Site(table(tmp_path / "with.csv", [*GOOD, TEXTS[name]]), model)
    assert rounds(model, whole, Site(table(tmp_path / "without.csv", GOOD), model), {**RUN, "num-rounds": 2}) == []


BAD_LINES: dict[str, bytes] = {
    "too many fields": b'"a","good","more","and more"\n',
    "an open quote": b'"a film,good\n',
    "a quote inside": b'"a" film","good"\n',
    "no encoding": b'"\xff\xfe\xfa","good"\n',
    "one field": b'"a film"\n',
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_one_bad_line_of_a_csv_file_does_not_silence_a_site(name: str, model: Path, tmp_path: Path) -> None:
    """Hole 6: a file with one line that cannot be read was refused whole, so the line decided whether the site answers."""
    without = table(tmp_path / "without.csv", GOOD)
    (tmp_path / "with.csv").write_bytes(without.read_bytes() + BAD_LINES[name])
    sites = Site(tmp_path / "with.csv", model), Site(without, model)
    assert rounds(model, *sites, {**RUN, "num-rounds": 2}) == []


BAD_JSON = ["{", '{"text": 1e999, "label": "good"}', '{"text": {"a": [null]}, "label": "good"}', "[]", '{"label": "good"}', '"x"']


@pytest.mark.parametrize("line", BAD_JSON)
def test_one_bad_line_of_a_json_file_does_not_silence_a_site(line: str, model: Path, tmp_path: Path) -> None:
    """Hole 6: as for CSV."""
    good = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in GOOD)
    (tmp_path / "with.jsonl").write_text(f"{good}{line}\n")
    (tmp_path / "without.jsonl").write_text(good)
    columns = {"text-column": "text", "label-column": "label"}  # JSON lines have no header that all records share
    sites = Site(tmp_path / "with.jsonl", model, columns), Site(tmp_path / "without.jsonl", model, columns)
    assert rounds(model, *sites, {**RUN, "num-rounds": 2}) == []


def _numbers(path: Path, rows: list[tuple[Any, Any]]) -> None:
    from datasets import Dataset

    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    Dataset.from_dict(columns).to_parquet(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_features_that_are_no_numbers_are_left_out_or_kept_as_they_are(value: Any, model: Path, tmp_path: Path) -> None:
    """Hole 6: a NaN among features that are numbers."""
    rows: list[tuple[Any, Any]] = [(1.5, "good"), (2.5, "bad"), (3.0, "good")]
    _numbers(tmp_path / "with.parquet", [*rows, (value, "good")])
    _numbers(tmp_path / "without.parquet", rows)
    sites = Site(tmp_path / "with.parquet", model), Site(tmp_path / "without.parquet", model)
    assert rounds(model, *sites, {**RUN, "num-rounds": 2}) == []


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    with torch.random.fork_rng(devices=[]):
        save_timm(folder / "model", "vit", classes=2)
    return folder / "model"


def _float_tiff() -> bytes:
    from io import BytesIO

    import numpy as np
    from PIL import Image

    made = BytesIO()
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(made, "tiff")
    return made.getvalue()


IMAGES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "truncated": ("bad.png", lambda: png(9)[:40]),
    "no image": ("bad.png", lambda: b"x" * 99),
    "empty": ("bad.png", lambda: b""),
    "NaN pixels": ("bad.tiff", _float_tiff),
}


@pytest.mark.parametrize("name", IMAGES)
def test_one_broken_image_is_a_record_like_any_other(name: str, vision: Path, tmp_path: Path) -> None:
    """Hole 6: an image that cannot be read keeps its place in the count and adds nothing."""
    run = {**RUN, "model.name": "timm/model", "lora.targets": "attn.qkv", "data.labels": "cat,dog", "num-rounds": 2}
    for folder in ("with", "without"):
        for number, kind in enumerate(("cat", "dog", "cat", "dog")):
            path = tmp_path / folder / "train" / kind / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(50 * number))
    file, content = IMAGES[name]
    (tmp_path / "with" / "train" / "dog" / f"z-{file}").write_bytes(content())
    about = {"task": "image", "labels": "cat,dog"}
    sites = Site(tmp_path / "with", vision, about), Site(tmp_path / "without", vision, about)
    found = []
    for server_round in (1, 2):
        message = order(run, vision, server_round=server_round)
        served = [own.serve(message, run) for own in sites]
        found += [one.reason for one in served if one.reason]
        found += problems(message, run, *sites, seed=server_round, all_usable=False)
    assert found == []


class Panic(BaseException):
    """What a Rust library raises through pyo3: no Exception."""


def test_a_text_on_which_the_tokenizer_panics_is_left_out(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hole 6: a panic passes every `except Exception`, so a chosen word would end the process and cost nothing."""
    call = PreTrainedTokenizerFast.__call__

    def panics(self: Any, texts: Any, *arguments: Any, **options: Any) -> Any:
        if "####" in "".join(texts):
            raise Panic("retry-limit-in-match over")
        return call(self, texts, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", panics)
    run = {**RUN, "model.name": f"hf/{model}"}
    whole, without = Site(table(tmp_path / "a.csv"), model), Site(table(tmp_path / "b.csv", RECORDS[:-1]), model)
    assert problems(order(run, model), run, whole, without, all_usable=False) == []
    assert len(whole.serve(order(run, model), run).reserved) == 1


def test_whatever_ends_a_round_is_answered_and_counted(model: Path, tmp_path: Path) -> None:
    def panics(*_: Any) -> None:
        raise Panic("anything")

    run = {**RUN, "model.name": f"hf/{model}"}
    served = Site(table(tmp_path / "a.csv"), model, handed={"records": panics}).serve(order(run, model), run, watch=False)
    assert not served.reason and len(served.reserved) == 1  # with noise alone


def test_a_picture_that_is_no_picture_starts_no_other_program_and_no_endless_reading(tmp_path: Path) -> None:
    """Hole 6: EPS runs PostScript by Ghostscript, whatever the file is called; a pipe is read for ever."""
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n")
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    files = [str(tmp_path / name) for name in ("eps.png", "pipe.png", "good.png")]
    prepare: Any = lambda picture: torch.zeros(1)  # noqa: E731
    records = ImageRecords(Dataset.from_dict({"image": files}), "image", torch.arange(3), prepare, "RGB")
    assert records.batch(torch.arange(3))[1].tolist() == [2]
