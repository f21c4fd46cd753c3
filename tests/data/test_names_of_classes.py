"""A name that no file can hold is refused before anything is trained, wherever it comes from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.own_records import own_records
from lalora_flwr.ground.errors import ConfigError, SiteRefusal
from lalora_flwr.ledger.caps import caps_from
from lalora_flwr.settings import settings_from
from tests.data.files import keep, png, settings, write

HALF = "bad\ud800"


def saved(folder: Path) -> Path:
    """Names of classes lie in JSON beside the rows, where half a character can stand."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad?"])})
    Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]}, features)
    DatasetDict({"train": Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]}, features)}).save_to_disk(
        folder / "saved"
    )
    about = folder / "saved" / "train" / "dataset_info.json"
    about.write_text(about.read_text().replace("bad?", "bad\\ud800"))
    return folder / "saved"


def lines(folder: Path) -> Path:
    rows = [f'{{"text": "{i}", "label": "{("good", "bad" + chr(92) + "ud800")[i % 2]}"}}\n' for i in range(4)]
    return write(folder / "t.jsonl", "".join(rows))


def folders(folder: Path) -> Path:
    for name in (b"good", b"bad\xff"):
        place = os.fsdecode(os.path.join(os.fsencode(folder), b"images", name))
        os.makedirs(place)
        Path(place, "0.png").write_bytes(png(1))
    return folder / "images"


@pytest.mark.parametrize("make", [saved, lines, folders])
def test_of_a_data_set(make: object, tmp_path: Path) -> None:
    assert callable(make)
    task = "image" if make is folders else "text"
    with pytest.raises(ConfigError, match=r"^data\.(label|name)") as refused:
        data_set(settings(task, name=f"file:{make(tmp_path)}", test="hold-out:0.5"))
    said = str(refused.value)
    said.encode()
    assert ("half a character" in said or "surrogates not allowed" in said) and len(said.splitlines()) == 1


def test_a_file_of_a_real_site_with_such_a_name_costs_itself_alone(tmp_path: Path) -> None:
    images = folders(tmp_path)
    Path(os.fsdecode(os.path.join(os.fsencode(images), b"good", b"\xff.png"))).write_bytes(png(1))
    found = own_records(settings("image", name="sites", test="file:x.csv", labels="good,bad"), str(images), keep)
    assert found.per_class == (1, 0) and found.left_out == {"the name of its file is not UTF-8": 2} and found.found == 3


def test_of_the_settings_and_a_node_config() -> None:
    for key in ("data.labels", "run-name", "data.text"):
        with pytest.raises(ConfigError, match=rf"^{key} = 'a,bad.ud800': holds half a character, which no file can"):
            settings_from({key: "a," + HALF})
    config = {"ledger-path": "l", "max-epsilon": 1.0, "delta": 1e-5, "num-records": 10, "task": "text", "labels": "a," + HALF}
    with pytest.raises(SiteRefusal, match=r"^node-config: labels must be a text"):
        caps_from(config, needed=True)
