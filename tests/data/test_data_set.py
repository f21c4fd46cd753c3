"""What ``data.name`` and ``data.test`` stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from lalora_flwr.data import data_set as module
from lalora_flwr.data import tables
from lalora_flwr.data.data_set import Tables, data_set, facts, private_records
from lalora_flwr.data.images import ImageRecords
from lalora_flwr.data.partition import site_rows
from lalora_flwr.ground.errors import ConfigError
from lalora_flwr.settings import DataSettings, Settings
from tests.data.files import column, keep, red, rows_of, settings, write, write_csv, write_images

GOOD, BAD = ("a fine film", "good"), ("a dull film", "bad")


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    module._data_set.cache_clear()
    module._splits_of_files.cache_clear()
    yield


def numbered(count: int, label: str = "{}") -> list[tuple[str, str]]:
    return [(f"text {i}", label.format(i % 3)) for i in range(count)]


def private(wanted: Settings) -> list[Any]:
    data = data_set(wanted)
    return column(data.private(range(len(data.classes())), keep))


def public(wanted: Settings, name: str = "text") -> list[Any]:
    return column(data_set(wanted).public(keep), name)


def reviews(folder: Path) -> str:
    """A folder with the splits train, test and validation."""
    write_csv(folder / "reviews" / "train.csv", [GOOD, BAD, ("x", "good")])
    write_csv(folder / "reviews" / "test.csv", [("test", "bad"), ("test 2", "good")])
    write_csv(folder / "reviews" / "dev.csv", [("dev", "good")])
    return f"file:{folder / 'reviews'}"


def test_the_split_train_is_private_and_test_is_public(tmp_path: Path) -> None:
    wanted = settings(name=reviews(tmp_path))
    assert private(wanted) == ["a fine film", "a dull film", "x"] and public(wanted) == ["test", "test 2"]
    assert data_set(wanted).labels == ("bad", "good") and data_set(wanted).classes() == [1, 0, 1]
    assert rows_of(data_set(wanted).public(keep)).labels.tolist() == [0, 1]
    assert data_set(wanted).owners() is None


def test_without_a_split_test_validation_is_public(tmp_path: Path) -> None:
    name = reviews(tmp_path)
    (tmp_path / "reviews" / "test.csv").unlink()
    assert public(settings(name=name)) == ["dev"]


def test_a_named_split_is_taken(tmp_path: Path) -> None:
    name = reviews(tmp_path)
    assert public(settings(name=name, test="split:validation")) == ["dev"]
    assert private(settings(name=name, split="validation")) == ["dev"]


def test_public_records_come_from_other_files(tmp_path: Path) -> None:
    name, other = reviews(tmp_path), write_csv(tmp_path / "other.csv", [("o", "good")])
    assert public(settings(name=name, test=f"file:{other}")) == ["o"]
    alone = write_csv(tmp_path / "alone" / "x.csv", [BAD, GOOD])
    assert public(settings(name=f"file:{alone}", test=name)) == ["test", "test 2"]


def test_private_records_are_never_public(tmp_path: Path) -> None:
    """Naming them again does not make them so; ``auto`` goes past the private split."""
    name, single = reviews(tmp_path), f"file:{write_csv(tmp_path / 'one.csv', [GOOD, BAD])}"
    for wanted in (
        settings(name=name, test="split:train"),
        settings(name=name, test=name, split="test"),
        settings(name=single, test=single),
    ):
        with pytest.raises(ConfigError, match=r"^data\.test = .*: these are the private records; take hold-out:0\.1 of them$"):
            data_set(wanted).public(keep)
    assert public(settings(name=name, split="test")) == ["dev"]


def test_no_public_records_is_an_error_that_says_how_to_get_some(tmp_path: Path) -> None:
    single = f"file:{write_csv(tmp_path / 'one.csv', [GOOD, BAD])}"
    for test in ("auto", "split:dev"):
        with pytest.raises(ConfigError, match=rf"^data\.test = '{test}': .* has no split for it; name one.*hold-out:0\.1"):
            data_set(settings(name=single, test=test)).public(keep)


def test_an_unknown_private_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.split = 'extra': file:.* has no such split$"):
        data_set(settings(name=reviews(tmp_path), split="extra"))


def test_no_private_record_is_an_error(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "t.csv", [("", "good")])
    with pytest.raises(ConfigError, match=r"^data\.name = .*: no usable record; see data\.label and data\.labels$"):
        data_set(settings(name=f"file:{file}"))


def hold_out(folder: Path, share: str = "0.25", **more: Any) -> Settings:
    file = folder / "t.csv"
    if not file.exists():
        write_csv(file, numbered(40))
    return settings(name=f"file:{file}", test=f"hold-out:{share}", **more)


def test_held_out_records_are_taken_from_the_sites(tmp_path: Path) -> None:
    wanted = hold_out(tmp_path)
    own, held = private(wanted), public(wanted)
    assert len(held) == 10 and not set(own) & set(held)
    assert sorted(own + held) == sorted(text for text, _ in numbered(40))
    assert private_records(wanted) == 30
    rows = site_rows(data_set(wanted).classes(), wanted.data, 0, 3)
    shares = [column(data_set(wanted).private(part, keep)) for part in rows]
    assert sorted(text for share in shares for text in share) == sorted(own)


def test_held_out_records_are_the_same_for_every_seed_and_whatever_was_drawn_before(tmp_path: Path) -> None:
    first = public(hold_out(tmp_path))
    for seed in (1, 2):
        torch.manual_seed(seed)
        module._data_set.cache_clear()
        assert Tables(hold_out(tmp_path).data, "text").public(keep) is not None
        assert public(hold_out(tmp_path, beta=float(seed))) == first
    assert hold_out(tmp_path).seed == 0  # the seed does not reach the data set at all


def test_a_share_is_at_least_one_record_and_never_all(tmp_path: Path) -> None:
    assert len(public(hold_out(tmp_path, "0.001"))) == 1
    with pytest.raises(ConfigError, match=r"^data\.test = 'hold-out:0\.999': leaves none of the 40 private records$"):
        data_set(hold_out(tmp_path, "0.999"))


@pytest.mark.parametrize("test", ["hold-out:0.5", "file"])
def test_so_many_test_records_are_drawn_always_the_same(tmp_path: Path, test: str) -> None:
    file, name = tmp_path / "test.csv", f"file:{write_csv(tmp_path / 't.csv', numbered(40))}"
    write_csv(file, numbered(20))
    test = f"file:{file}" if test == "file" else test
    everything = public(settings(name=name, test=test))
    some = public(settings(name=name, test=test, test_records=7))
    torch.manual_seed(5)
    module._data_set.cache_clear()
    assert len(some) == 7 and set(some) < set(everything) and public(settings(name=name, test=test, test_records=7)) == some
    assert some != everything[:7]
    assert public(settings(name=name, test=test, test_records=99)) == everything


def test_labels_are_named_in_order_by_the_settings(tmp_path: Path) -> None:
    wanted = settings(name=reviews(tmp_path), labels="good, bad ,")
    assert data_set(wanted).labels == ("good", "bad") and data_set(wanted).classes() == [0, 1, 0]
    assert rows_of(data_set(wanted).public(keep)).labels.tolist() == [1, 0]


def test_an_unknown_label_is_left_out_of_private_and_an_error_in_public_records(tmp_path: Path) -> None:
    name = reviews(tmp_path)
    assert private(settings(name=name, labels="good,fair", test="split:validation")) == ["a fine film", "x"]
    with pytest.raises(ConfigError, match="label 'bad' is not among good, fair"):
        data_set(settings(name=name, labels="good,fair")).public(keep)


def test_all_sites_use_the_same_names_and_numbers_whatever_classes_they_hold(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "t.csv", numbered(60, "class {}"))
    wanted = settings(name=f"file:{file}", partition="pathological", classes_per_site=1, min_records=1)
    data = data_set(wanted)
    assert data.labels == ("class 0", "class 1", "class 2")
    for part in site_rows(data.classes(), wanted.data, 0, 3):
        rows = rows_of(data.private(part, keep))
        assert len(set(rows.labels.tolist())) == 1
        assert [data.labels[i] for i in rows.labels.tolist()] == list(rows.table["label"])


def test_names_of_a_type_are_kept_although_some_never_occur(tmp_path: Path) -> None:
    for split, names, labels in (("train", ["z", "never", "a"], [2, 0]), ("test", ["a", "z"], [0, 1])):
        kinds = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        folder = tmp_path / split
        folder.mkdir()
        Dataset.from_dict({"text": ["s", "t"], "label": labels}, kinds).to_parquet(folder / "x.parquet")
    wanted = settings(name=f"file:{tmp_path / 'train'}", test=f"file:{tmp_path / 'test'}")
    assert data_set(wanted).labels == ("z", "never", "a") and data_set(wanted).classes() == [2, 0]
    assert rows_of(data_set(wanted).public(keep)).labels.tolist() == [2, 0]


def test_declared_facts_need_no_data() -> None:
    gone = {"name": "file:/gone.csv"}
    assert facts(settings(**gone, labels="a,b")).labels == ("a", "b")
    assert facts(settings("image", **gone, num_classes=3)).labels == ("0", "1", "2")
    assert facts(settings("language", **gone, response="answer")) == module.Facts("language", ())
    assert private_records(settings(**gone, records=70)) == 70
    with pytest.raises(ConfigError, match=r"^data\.name = '/gone\.csv': no such file or folder$"):
        facts(settings(**gone))


def test_what_is_not_declared_is_counted(tmp_path: Path) -> None:
    wanted = settings(name=reviews(tmp_path))
    assert facts(wanted) == module.Facts("text", ("bad", "good")) and private_records(wanted) == 3


def test_a_wrong_number_of_classes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.num-classes = 3: file:.* has 2 classes$"):
        data_set(settings(name=reviews(tmp_path), num_classes=3))


def test_a_class_that_only_the_test_files_hold_counts_as_an_unknown_label(tmp_path: Path) -> None:
    write_csv(tmp_path / "r" / "train.csv", [GOOD])
    write_csv(tmp_path / "r" / "test.csv", [BAD])
    with pytest.raises(ConfigError, match="label 'bad' is not among good"):
        public(settings(name=f"file:{tmp_path / 'r'}"))


@pytest.mark.parametrize("task", ["text", "language"])
def test_owners_are_the_values_of_their_column(tmp_path: Path, task: str) -> None:
    rows = [("a", "good", "2"), ("b", "bad", ""), ("c", "good", "2.0"), ("d", "bad", "north")]
    file = write_csv(tmp_path / "t.csv", rows, names="text,label,ward")
    write_csv(tmp_path / "test.csv", [GOOD])  # public records need no owner
    more = {"response": "label"} if task == "language" else {}
    shared: dict[str, Any] = {"site": "ward", "partition": "natural", "min_records": 1}
    wanted = settings(task, name=f"file:{file}", test=f"file:{tmp_path / 'test.csv'}", **shared, **more)
    assert data_set(wanted).owners() == ["2", "2", "north"]
    assert private(wanted) == ["a", "c", "d"] and public(wanted) == ["a fine film"]
    assert sorted(site_rows(data_set(wanted).classes(), wanted.data, 0, 2, data_set(wanted).owners())) == [[0, 1], [2]]


def test_prompts_and_responses(tmp_path: Path) -> None:
    file = write(
        tmp_path / "t.jsonl", '{"prompt": "a", "answer": 4}\n{"prompt": "b", "answer": null}\n{"prompt": "", "answer": 1}\n'
    )
    data = (
        data_set(settings("language", name=f"file:{file}", response="answer", test="hold-out:0.1", labels="x,y")) if 0 else None
    )
    wanted = settings("language", name=f"file:{file}", response="answer")
    data = data_set(wanted)
    assert data.labels == () and data.classes() == [0] and column(data.private([0], keep), "answer") == ["4"]


def test_image_folders(tmp_path: Path) -> None:
    names = ["train/cat/0.png", "train/dog/1.png", "train/dog/2.png", "test/dog/3.png", "test/cat/4.png"]
    write_images(tmp_path, names)
    (tmp_path / "train" / "dog" / "2.png").write_bytes(b"garbled")
    (tmp_path / "test" / "cat" / "4.png").write_bytes(b"garbled")

    def encode(rows: Any) -> ImageRecords:
        return ImageRecords(rows.table, rows.columns.image, rows.labels, red, "RGB")

    data = data_set(settings("image", name=f"file:{tmp_path}"))
    assert data.labels == ("cat", "dog") and data.classes() == [0, 1, 1]  # the unreadable one counts
    inputs, labels = data.private([2, 1, 0], encode).batch(torch.arange(3))
    assert (inputs.flatten().tolist(), labels.tolist()) == ([1.0, 0.0], [1, 0])  # and contributes nothing
    inputs, labels = data.public(encode).batch(torch.arange(2))
    assert (inputs.flatten().tolist(), labels.tolist()) == ([3.0], [1])


def test_a_table_of_paths_beside_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths start at the table's folder, wherever the process works: workers of a simulation work elsewhere."""
    write_images(tmp_path / "set", ["images/0.png", "images/1.png"])
    rows = [("images/1.png", "cat"), ("", "cat"), ("images/0.png", "dog"), ("images/gone.png", "dog")]
    write_csv(tmp_path / "set" / "train.csv", rows, names="file_name,label")
    monkeypatch.chdir("/")
    data = data_set(settings("image", name=f"file:{tmp_path / 'set'}"))
    assert data.classes() == [0, 1, 1]
    records = data.private([0, 1, 2], lambda rows: ImageRecords(rows.table, rows.columns.image, rows.labels, red, "RGB"))
    assert records.batch(torch.arange(3))[0].flatten().tolist() == [1.0, 0.0]  # type: ignore[union-attr]


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    splits = {"train": [GOOD, BAD], "validation": [("v", "bad")]}

    def load(name: str, split: str) -> Dataset | None:
        asked.append((name, split))
        if split not in splits:
            return None
        return Dataset.from_dict({"text": [t for t, _ in splits[split]], "label": [x for _, x in splits[split]]})

    monkeypatch.setattr(tables, "from_hub", load)
    wanted = settings(name="hub:owner/set@v1")
    assert private(wanted) == ["a fine film", "a dull film"] and public(wanted) == ["v"]
    assert asked == [("owner/set@v1", split) for split in ("train", "test", "validation")]
    with pytest.raises(ConfigError, match=r"^data\.split = 'extra': hub:owner/set@v1 has no such split$"):
        data_set(settings(name="hub:owner/set@v1", split="extra"))


def test_a_data_set_is_read_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    real = tables.from_files
    monkeypatch.setattr(tables, "from_files", lambda key, path: (reads.append(key), real(key, path))[1])
    wanted = settings(name=reviews(tmp_path))
    assert data_set(wanted) is data_set(settings(name=reviews(tmp_path)))
    public(wanted), private(wanted)
    assert reads == ["data.name"]


def test_the_embedded_digits() -> None:
    wanted = Settings()
    data = data_set(wanted)
    assert facts(wanted).labels == data.labels == tuple("0123456789") and len(data.classes()) == private_records(wanted)
    records = data.private([5, 3], keep)
    inputs, labels = records.batch(torch.arange(2))
    assert inputs.shape == (2, *facts(wanted).input_shape) and labels.tolist() == [data.classes()[5], data.classes()[3]]  # type: ignore
    assert len(data.public(keep)) > 100 and data.owners() is None


@pytest.mark.parametrize("test", ["hold-out:0.1", "split:validation", "file:test.csv"])
def test_the_embedded_digits_have_their_own_test_records(test: str) -> None:
    wanted = Settings(data=DataSettings(test=test))
    with pytest.raises(ConfigError, match=rf"^data\.test = '{test}': digits has test records of its own; leave it auto$"):
        data_set(wanted)
    assert data_set(Settings(data=DataSettings(test="split:test"))).labels


def test_records_that_only_sites_hold(tmp_path: Path) -> None:
    test = write_csv(tmp_path / "public.csv", [BAD, GOOD])
    wanted = settings(name="sites", labels="bad,good", test=f"file:{test}", records=500)
    data = data_set(wanted)
    assert facts(wanted).labels == ("bad", "good") and private_records(wanted) == 500 and data.owners() is None
    assert rows_of(data.public(keep)).labels.tolist() == [0, 1]
    for act in (data.classes, lambda: data.private([0], keep)):
        with pytest.raises(ConfigError, match=r"^data\.name = 'sites': the records lie on real sites"):
            act()
    with pytest.raises(ConfigError, match=r"^data\.records: must say how many"):
        private_records(settings(name="sites", labels="bad,good", test=f"file:{test}"))
