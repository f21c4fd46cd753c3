"""Names of columns are one whatever their Unicode form, in every kind of file, in a simulation and on a real site."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.own_records import own_records
from lalora_flwr.ground.errors import ConfigError
from tests.data.files import keep, rows_of, settings, write, write_csv

COMPOSED, APART = "fi\u00e8vre", "fie\u0300vre"  # fièvre
ROWS = [("a", "1", "0"), ("b", "0", "1"), ("c", "1", "1"), ("d", "0", "0")]
TARGETS = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]


def as_csv(folder: Path, name: str) -> Path:
    return write_csv(folder / "t.csv", ROWS, names=f"text,{name},toux")


def as_jsonl(folder: Path, name: str) -> Path:
    lines = (json.dumps(dict(zip(("text", name, "toux"), row, strict=True)), ensure_ascii=False) for row in ROWS)
    return write(folder / "t.jsonl", "".join(line + "\n" for line in lines))


def as_parquet(folder: Path, name: str) -> Path:
    columns = dict(zip(("text", name, "toux"), map(list, zip(*ROWS, strict=True)), strict=True))
    Dataset.from_dict(columns).to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


def as_saved(folder: Path, name: str) -> Path:
    columns = dict(zip(("text", name, "toux"), map(list, zip(*ROWS, strict=True)), strict=True))
    DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(folder / "saved")
    return folder / "saved"


FILES = [as_csv, as_jsonl, as_parquet]
FORMS = [(COMPOSED, APART), (APART, COMPOSED), (APART, APART)]
ABOUT: dict[str, Any] = {"problem_type": "multi-label", "text": "text"}


@pytest.mark.parametrize(("written", "said"), FORMS)
@pytest.mark.parametrize("make", [*FILES, as_saved])
def test_of_classes_in_a_simulation(make: Callable[[Path, str], Path], written: str, said: str, tmp_path: Path) -> None:
    wanted = settings(name=f"file:{make(tmp_path, written)}", labels=f"{said},toux", test="hold-out:0.25", **ABOUT)
    data = data_set(wanted)
    found = [*rows_of(data.private(range(3), keep)).labels.tolist(), *rows_of(data.public(keep)).labels.tolist()]
    assert sorted(found) == sorted(TARGETS) and data.labels == (COMPOSED, "toux")


@pytest.mark.parametrize(("written", "said"), FORMS)
@pytest.mark.parametrize("make", FILES)
def test_of_classes_on_a_real_site(make: Callable[[Path, str], Path], written: str, said: str, tmp_path: Path) -> None:
    wanted = settings(name="sites", test="file:public.csv", labels=f"{said},toux", **ABOUT)
    assert rows_of(own_records(wanted, str(make(tmp_path, written)), keep).records).labels.tolist() == TARGETS


@pytest.mark.parametrize("make", FILES)
def test_of_a_label_that_the_settings_name(make: Callable[[Path, str], Path], tmp_path: Path) -> None:
    path = make(tmp_path, APART)
    assert len(data_set(settings(name=f"file:{path}", label=COMPOSED, test="hold-out:0.25")).classes()) == 3
    wanted = settings(name="sites", test="file:public.csv", labels="0,1", text="text", label=COMPOSED)
    assert rows_of(own_records(wanted, str(path), keep).records).labels.tolist() == [1, 0, 1, 0]


def test_of_files_that_write_one_name_differently(tmp_path: Path) -> None:
    as_csv(tmp_path, COMPOSED).rename(tmp_path / "train-0.csv")
    as_csv(tmp_path, APART).rename(tmp_path / "train-1.csv")
    wanted = settings(name=f"file:{tmp_path}", labels=f"{APART},toux", test="hold-out:0.25", **ABOUT)
    assert len(data_set(wanted).classes()) == 6


def test_two_that_differ_in_their_form_alone_stay_two(tmp_path: Path) -> None:
    Dataset.from_dict({"text": list("ab"), COMPOSED: [1, 0], APART: [0, 0]}).to_parquet(tmp_path / "t.parquet")
    data = data_set(settings(name=f"file:{tmp_path / 't.parquet'}", label=COMPOSED, test="hold-out:0.5"))
    assert data.labels == ("0", "1")


@pytest.mark.parametrize(
    ("about", "says"),
    [
        (
            {**ABOUT, "labels": "fievre,toux"},
            "; or all of data.labels must be columns, and 'fievre' is none; did you mean 'fièvre'?",
        ),
        ({**ABOUT, "labels": "Toux,grippe"}, "; or all of data.labels must be columns, and 'Toux' is none; did you mean 'toux'?"),
        ({**ABOUT, "labels": "toux,grippe"}, "; or all of data.labels must be columns, and 'grippe' is none"),
        ({**ABOUT, "labels": "grippe,rhume"}, "no column found; name one of text, fièvre, toux"),
        ({"label": "Toux"}, "data.label = 'Toux': no such column; there are text, fièvre, toux; did you mean 'toux'?"),
    ],
)
def test_a_misspelt_name_gets_a_hint(about: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        data_set(settings(name=f"file:{as_csv(tmp_path, APART)}", test="hold-out:0.25", **about))
    assert str(refused.value).endswith(says)
