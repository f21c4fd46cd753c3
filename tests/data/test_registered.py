"""A data set of another package, under its own name."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value

from lalora_flwr.data.data_set import data_set, facts, private_records
from lalora_flwr.data.named import NamedDataSet, named_data_set
from lalora_flwr.data.partition import site_rows
from lalora_flwr.data.pins import check_pins
from lalora_flwr.data.records import Records
from lalora_flwr.ground.errors import ConfigError, SiteRefusal
from lalora_flwr.ledger.caps import Caps
from lalora_flwr.models import load_base_model
from lalora_flwr.settings import KEYS, Settings, settings_from
from lalora_flwr.settings.choices import DATASETS
from tests.conftest import Spy, run_spied, small, strict_json
from tests.data.files import column, keep, png
from tests.models.folders import save_hf, save_timm

TOY = '''
import torch
from datasets import Dataset, Features, Image, Value

from lalora_flwr.data.named import NamedDataSet
from lalora_flwr.data.records import Records


def bars(start, count):
    """Upright and lying bars, by turns."""
    images = torch.zeros(count, 3, 24, 24)
    labels = torch.arange(start, start + count) % 2
    images[labels == 0, :, :, 12] = 1.0
    images[labels == 1, :, 12, :] = 1.0
    return Records(images, labels)


def reviews(start, count):
    words = ["good", "bad"]
    return Dataset.from_dict({
        "text": [f"{words[i % 2]} film" for i in range(start, start + count)],
        "label": [words[i % 2] for i in range(start, start + count)],
        "reader": [f"reader {i % 3}" for i in range(start, start + count)],
    })


BARS = NamedDataSet("image", ("upright", "lying"), 40, "CC0", lambda: bars(0, 40), lambda: bars(40, 10), (3, 24, 24))
REVIEWS = NamedDataSet("text", ("bad", "good"), 60, "CC0", lambda: reviews(0, 60), lambda: reviews(60, 6))
NOTHING = "no data set"
'''


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with three entry points, found as an installed one is."""
    folder = tmp_path / "site-packages"
    (folder / "toys-1.0.dist-info").mkdir(parents=True)
    (folder / "toys.py").write_text(TOY)
    (folder / "toys-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    points = "[lalora.datasets]\nbars = toys:BARS\nreviews = toys:REVIEWS\nnothing = toys:NOTHING\ngone = toys:GONE\n"
    (folder / "toys-1.0.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(folder))
    yield
    sys.modules.pop("toys", None)


def wanted(name: str = "bars", model: str = "timm/x", **data: Any) -> Settings:
    return settings_from({"model.name": model, "data.name": name, **{f"data.{key}": value for key, value in data.items()}})


def test_it_is_listed_and_suggested() -> None:
    assert all(name in KEYS["data.name"].allowed for name in ("digits", "bars", "reviews", "hub:<dataset>", "sites"))
    with pytest.raises(ConfigError, match=r"^data\.name = 'barz': must be one of .*digits, bars, .*; did you mean bars\?$"):
        wanted("barz")


def test_its_facts_are_known_before_anything_is_read() -> None:
    settings = wanted()
    assert (facts(settings).labels, facts(settings).input_shape) == (("upright", "lying"), (3, 24, 24))
    assert private_records(settings) == 40


def test_virtual_sites_share_its_tensors(tmp_path: Path) -> None:
    save_timm(tmp_path / "model", "vit")
    settings = wanted(model=f"timm/{tmp_path / 'model'}")
    data, base = data_set(settings), load_base_model(settings.model, facts(settings))
    parts = site_rows(data.classes(), settings.data, 0, 3, data.owners())
    assert sorted(row for part in parts for row in part) == list(range(40))
    assert parts[0] != list(range(14))  # nobody said that it lies in a random order
    for part in parts:
        records = data.private(part, base.encode)
        images, labels = records.batch(torch.arange(len(part)))
        assert labels.tolist() == [row % 2 for row in part] == [data.classes()[row] for row in part]
        assert base.logits(base.module, images).shape == (len(part), 2)
    assert len(data.public(base.encode)) == 10


def test_virtual_sites_share_its_table(tmp_path: Path) -> None:
    save_hf(tmp_path / "model", "bert", "classifier")
    settings = wanted("reviews", f"hf/{tmp_path / 'model'}", site="reader", partition="natural")
    data, base = data_set(settings), load_base_model(settings.model, facts(settings))
    assert data.labels == ("bad", "good") and data.classes()[:2] == [1, 0]
    parts = site_rows(data.classes(), settings.data, 0, 3, data.owners())
    assert [len(part) for part in parts] == [20, 20, 20] and parts[0] == list(range(0, 60, 3))
    tokens, labels = data.private(parts[0], base.encode).batch(torch.arange(20))
    assert base.logits(base.module, tokens).shape == (20, 2) and labels.tolist() == [1 - row % 2 for row in parts[0]]
    assert column(data.public(keep)) == ["good film", "bad film"] * 3


def test_a_run_on_it(tmp_path: Path) -> None:
    save_timm(tmp_path / "model", "vit")
    run = small(tmp_path, num_rounds=1, model__name=f"timm/{tmp_path / 'model'}", data__name="bars", train__batch_size=5)
    spy = Spy()
    summary = strict_json((run_spied(run, spy) / "summary.json").read_text())
    assert (summary["data"], len(spy.training(1)), summary["failures"]) == ("bars", 3, 0)


def test_a_table_may_hold_images() -> None:
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(4)], "label": ["a", "b", "a", "b"]}
    kinds = Features({"image": Image(), "label": Value("string")})
    table = Dataset.from_dict(rows, kinds)
    named = NamedDataSet("image", ("a", "b"), 4, "CC0", lambda: table, lambda: table)
    assert data_set(mine(named)).classes() == [0, 1, 0, 1]


NUMBERS = itertools.count()
FACTS = "task|labels|input_shape|owners|records|license|problem_type|label_range|public"


def mine(named: NamedDataSet, **data: Any) -> Settings:
    """Settings with a data set that only this process knows."""
    name = f"mine-{next(NUMBERS)}"
    DATASETS.register(name, named)
    return wanted(name, **data)


def of_tensors(**changes: Any) -> NamedDataSet:
    records = Records(torch.zeros(6, 1, 8, 8), torch.tensor([0, 1, 0, 1, 0, 1]))
    named = NamedDataSet("image", ("a", "b"), 6, "CC0", lambda: records, lambda: records, (1, 8, 8), mixed=True)
    return dataclasses.replace(named, **changes)


def test_records_in_a_random_order_keep_it() -> None:
    settings = mine(of_tensors(owners=lambda: list("xyzxyz")))
    data = data_set(settings)
    assert site_rows(data.classes(), settings.data, 0, 2) == [[0, 1, 2], [3, 4, 5]]
    assert data.owners() == list("xyzxyz")


def test_some_of_its_test_records_are_evaluated_on() -> None:
    assert len(data_set(mine(of_tensors(), **{"test-records": 4})).public(keep)) == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"records": 7}, "has 6 usable private records, and declares 7"),
        ({"input_shape": (3, 8, 8)}, r"gives tensors \(6, 1, 8, 8\); must be \(records, \*\(3, 8, 8\)\)"),
        ({"private": lambda: Records(torch.zeros(6, 1, 8, 8), torch.arange(6))}, "has a label outside its 2 classes"),
        ({"private": lambda: Dataset.from_dict({"a": [1]})}, "declares an input_shape, and gives no tensors"),
        ({"input_shape": None}, "gives tensors and no input_shape"),
    ],
)
def test_records_that_are_not_as_declared_are_one_line(change: dict[str, Any], reason: str) -> None:
    settings = mine(of_tensors(**change))
    with pytest.raises(ConfigError, match=rf"^data\.name.*{reason}"):
        data_set(settings).classes()


@pytest.mark.parametrize(
    "change",
    [
        {"task": "sound"},
        {"labels": ()},
        {"labels": ("a", "a")},
        {"labels": ["a", "b"]},
        {"input_shape": (8, 8)},
        {"task": "text"},
        {"input_shape": None, "owners": list},
        {"records": 0},
        {"records": 6.0},
        {"records": True},
        {"license": ""},
        {"license": " "},
        {"labels": ("a",)},
        {"labels": ("a", "")},
        {"labels": ("a", " ")},
        {"labels": ("true", "TRUE")},
        {"labels": ("caf\u00e9", "cafe\u0301")},
        {"labels": ("1", "1.0")},
        {"labels": ("a", "\ud800")},
        {"labels": ("a", 1)},
        {"input_shape": (1, 8, 0)},
        {"input_shape": (1, 8, 8.0)},
        {"problem_type": "multi"},
        {"problem_type": "regression"},
        {"problem_type": "regression", "labels": ()},
        {"problem_type": "regression", "label_range": "0,8"},
        {"problem_type": "regression", "labels": (), "label_range": "8,0"},
        {"problem_type": "multi-label", "label_range": "0,8"},
        {"label_range": "0,8"},
        {"task": "language", "input_shape": None, "labels": (), "problem_type": "multi-label"},
        {"private": bool, "public": bool},
    ],
    ids=str,
)
def test_facts_that_contradict_each_other_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^({FACTS})[ :]"):
        of_tensors(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"problem_type": "multi-label", "labels": ("a",)},
        {"problem_type": "regression", "labels": (), "label_range": "0,8"},
        {"input_shape": None, "task": "text"},
        {"input_shape": None, "task": "language", "labels": ()},
    ],
    ids=str,
)
def test_facts_that_fit_each_other_are_taken(change: dict[str, Any]) -> None:
    assert of_tensors(**change).license == "CC0"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("bars", "hf/x", {}), "model.name = 'hf/x': data.name = 'bars' holds images; choose a timm/ model"),
        (("reviews", "timm/x", {}), "model.name = 'timm/x': data.name = 'reviews' holds texts; choose an hf/ model"),
        (("reviews", "hf/x", {"response": "label"}), "data.response = 'label': must be empty for data.name = 'reviews'"),
        (("bars", "timm/x", {"test": "hold-out:0.1"}), "data.test = 'hold-out:0.1': bars has test records of its own"),
        (("bars", "timm/x", {"labels": "lying,upright"}), "data.labels = 'lying,upright': must be 'upright,lying' or empty"),
        (("bars", "timm/x", {"num-classes": 3}), "data.num-classes = 3: bars has 2 classes"),
        (("bars", "embedded/vit-digits", {}), "data.name = 'bars': embedded/vit-digits only takes digits"),
        (("nothing", "timm/x", {}), "data.name = 'nothing': it is a str, not a"),
        (("gone", "timm/x", {}), "data.name = 'gone': toys:GONE cannot be loaded"),
    ],
)
def test_settings_that_do_not_fit_it_are_refused(given: tuple[str, str, dict[str, Any]], reason: str) -> None:
    name, model, data = given
    with pytest.raises(ConfigError) as error:
        wanted(name, model, **data)
    assert str(error.value).startswith(reason)


def test_its_classes_are_what_a_site_compares() -> None:
    settings = wanted()
    check_pins(Caps("l", 3.0, 1e-5, 10, "image", labels=("upright", "lying")), settings)
    with pytest.raises(SiteRefusal, match=r"data\.labels"):
        check_pins(Caps("l", 3.0, 1e-5, 10, "image", labels=("lying", "upright")), settings)


@pytest.mark.parametrize("name", ["sites", "hub:bars", "file:bars", "bars2"])
def test_other_names_are_no_data_set_of_a_package(name: str) -> None:
    assert named_data_set(name) is None
