"""What ``data.name`` and ``data.test`` stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lalora_flwr.data.data_set import Facts, data_set, facts, private_records
from lalora_flwr.data.partition import site_rows
from lalora_flwr.ground.errors import ConfigError
from tests.data.files import column, keep, rows_of, settings, write, write_csv
from tests.data.reviews import BAD, GOOD, numbered, private, public, reviews


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
    assert private(settings(name=name, split="validation", labels="good,bad")) == ["dev"]


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
    file = write_csv(tmp_path / "t.csv", [("", "good"), ("", "bad")])
    with pytest.raises(ConfigError, match=r"^data\.name = .*: no usable record; see data\.label and data\.labels$"):
        data_set(settings(name=f"file:{file}"))


def test_one_class_is_refused(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "t.csv", [GOOD, ("x", "good")])
    with pytest.raises(ConfigError, match=r"^data\.label: all records are of the class 'good'; there must be two at least$"):
        data_set(settings(name=f"file:{file}"))


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
    assert facts(settings("language", **gone, response="answer")) == Facts("language", ())
    assert private_records(settings(**gone, records=70)) == 70
    with pytest.raises(ConfigError, match=r"^data\.name = '/gone\.csv': no such file or folder$"):
        facts(settings(**gone))


def test_what_is_not_declared_is_counted(tmp_path: Path) -> None:
    wanted = settings(name=reviews(tmp_path))
    assert facts(wanted) == Facts("text", ("bad", "good")) and private_records(wanted) == 3


def test_a_wrong_number_of_classes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.num-classes = 3: file:.* has 2 classes$"):
        data_set(settings(name=reviews(tmp_path), num_classes=3))


def test_a_class_that_only_the_test_files_hold_counts_as_an_unknown_label(tmp_path: Path) -> None:
    write_csv(tmp_path / "r" / "train.csv", [GOOD, ("x", "fair")])
    write_csv(tmp_path / "r" / "test.csv", [BAD])
    with pytest.raises(ConfigError, match="label 'bad' is not among fair, good"):
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
    wanted = settings("language", name=f"file:{file}", response="answer")
    data = data_set(wanted)
    assert data.labels == () and data.classes() == [0] and column(data.private([0], keep), "answer") == ["4"]


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
