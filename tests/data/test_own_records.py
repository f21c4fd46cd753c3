"""A real site's own records: the same numbers on every site, and no copy of them on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from lalora_flwr.data.images import ImageRecords
from lalora_flwr.data.own_records import own_records
from lalora_flwr.data.records import RecordSet
from lalora_flwr.ground.errors import ConfigError
from tests.data.files import column, keep, png, red, rows_of, settings, write, write_csv, write_images

SITES: dict[str, Any] = {"name": "sites", "test": "file:public.csv", "labels": "good,bad,fair"}


def own(path: Path | str, task: str = "text", encode: Any = keep, **more: Any) -> RecordSet:
    return own_records(settings(task, **{**SITES, **more}), str(path), encode).records


def csv(folder: Path) -> Path:
    return write_csv(folder / "own.csv", [("a", "bad"), ("b", "good"), ("", "good"), ("c", "other"), ("d", "")])


def jsonl(folder: Path) -> Path:
    rows = [{"text": "a", "label": "bad"}, {"text": "b", "label": "good"}, {"label": "good"}, {"text": "c", "label": 3}]
    return write(folder / "own.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def parquet(folder: Path) -> Path:
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good", "other"])})
    rows = {"text": ["a", "b", None, "c"], "label": [0, 1, 1, 2]}
    Dataset.from_dict(rows, kinds).to_parquet(folder / "own.parquet")
    return folder / "own.parquet"


def split_folder(folder: Path) -> Path:
    write_csv(folder / "own" / "test.csv", [("t", "bad")])
    return csv(folder / "own").rename(folder / "own" / "train.csv").parent


def pattern(folder: Path) -> Path:
    return csv(folder).parent / "o*.csv"


@pytest.mark.parametrize("make", [csv, jsonl, parquet, split_folder, pattern])
def test_a_sites_classes_have_the_runs_numbers(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Also where a site lacks a class, and where its files know others."""
    rows = rows_of(own(make(tmp_path), text="text", label="label"))
    assert rows.labels.tolist() == [1, 0] and list(rows.table["text"]) == ["a", "b"]


def test_one_class_of_images_alone_has_the_runs_number(tmp_path: Path) -> None:
    def encode(rows: Any) -> ImageRecords:
        return ImageRecords(rows.table, rows.columns.image, rows.labels, red, "RGB")

    write_images(tmp_path, ["bad/0.png", "bad/1.png"])
    (tmp_path / "bad" / "1.png").write_bytes(b"garbled")
    records = own(tmp_path, "image", encode)
    inputs, labels = records.batch(torch.arange(2))
    assert len(records) == 2 and labels.tolist() == [1] and inputs.flatten().tolist() == [0.0]  # type: ignore[union-attr]


def test_the_columns_and_the_split_of_the_settings_are_read(tmp_path: Path) -> None:
    write_csv(tmp_path / "own" / "dev.csv", [("t", "x", "bad", "y")], names="text,note,kind,more")
    records = own(tmp_path / "own", split="validation", text="note", label="kind", text_pair="more", site="ward")
    assert column(records, "note") == ["x"] and rows_of(records).columns.text_pair == "more"


def test_prompts_and_responses_need_no_label_names(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [("a", "1"), ("b", "")], names="prompt,answer")
    assert column(own(tmp_path, "language", labels="", response="answer"), "answer") == ["1"]


def test_paths_of_images_start_at_the_table(tmp_path: Path) -> None:
    write_images(tmp_path, ["pictures/0.png"])
    write_csv(tmp_path / "t.csv", [("pictures/0.png", "bad")], names="image,label")
    assert column(own(tmp_path / "t.csv", "image"), "image") == [f"{tmp_path}/pictures/0.png"]


@pytest.mark.parametrize("rows", [[], [("", "good"), ("a", "other")]], ids=["none", "none usable"])
def test_no_usable_record_is_an_empty_set(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    assert len(own(write_csv(tmp_path / "t.csv", rows))) == 0
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    kinds = Features({"text": Value("string"), "label": Value("string")})
    Dataset.from_dict(columns, kinds).to_parquet(tmp_path / "t.parquet")
    assert len(own(tmp_path / "t.parquet")) == 0


@pytest.mark.parametrize(
    ("names", "more", "error"),
    [
        ("text,label", {"split": "test"}, r"^split = 'test': not among train under data-path$"),
        ("text,label", {"label": "kind"}, r"^label-column = 'kind': no such column; there are text, label$"),
        ("a,label", {}, r"^text-column: no column found; name one of a, label$"),
        ("text", {}, r"^label-column: no column found; name one of text$"),
    ],
)
def test_what_does_not_fit_the_run_is_one_line(tmp_path: Path, names: str, more: dict[str, str], error: str) -> None:
    write_csv(tmp_path / "t.csv", [("x", "good")], names=names)
    with pytest.raises(ConfigError, match=error):
        own(tmp_path / "t.csv" if "," in names else write_csv(tmp_path / "u.csv", [("x",)], names=names), **more)


def test_files_that_cannot_be_read_are_named_by_the_sites_own_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data-path = '.*gone\.csv': no such file or folder$"):
        own(tmp_path / "gone.csv")
    with pytest.raises(ConfigError, match=r"^data-path = '.*': cannot be read: no table and no sub-folder of images per class$"):
        own(tmp_path)
    write(tmp_path / "x.txt", "text")
    with pytest.raises(ConfigError, match=r"^data-path = '.*': \.txt files; must be of one kind of \.csv, "):
        own(tmp_path / "x.txt")


def test_classes_without_names_are_refused_before_anything_is_read() -> None:
    wanted = settings("text", name="hub:owner/set")  # a run that never names them
    with pytest.raises(ConfigError, match=r"^labels: must name the classes"):
        own_records(wanted, "/gone", keep)


MARK = "a-secret-of-this-site"
READ = """
import json, os, sys
from pathlib import Path
import torch
from lalora_flwr.data.own_records import own_records
from lalora_flwr.data.images import ImageRecords
from tests.data.files import keep, red, settings, column

sites = {"name": "sites", "test": "file:public.csv", "labels": "good,bad"}
text = {"text": "text", "label": "label"}
encode = lambda rows: ImageRecords(rows.table, rows.columns.image, rows.labels, red, "RGB")
counts = {}
written = []


def watch(event, args):
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
        written.append(str(args[0]))


sys.addaudithook(watch)
for name in sys.argv[3:]:
    task = "image" if "images" in name else "text"
    wanted = settings(task, **sites, **(text if task == "text" else {}))
    records = own_records(wanted, str(Path(sys.argv[2]) / name), encode if task == "image" else keep).records
    if task == "image":
        counts[name] = len(records.batch(torch.arange(len(records)))[1])
    else:
        counts[name] = len(column(records))
left = [str(path) for place in json.loads(sys.argv[1]) for path in Path(place).rglob("*") if path.is_file()]
print(json.dumps({"counts": counts, "left": left, "written": written}))  # while the process still holds the records
"""


def test_no_copy_is_left_anywhere(tmp_path: Path) -> None:
    """In a process of its own, whose home, caches and temporary folder are watched."""
    data = tmp_path / "data"
    for name in ("home", "scratch", "work", "data"):
        (tmp_path / name).mkdir()
    rows = {"text": [f"{MARK} {i}" for i in range(5)] + [None], "label": ["good", "bad", None, "good", "x", "bad"]}
    table = Dataset.from_dict(rows)
    table.to_csv(data / "t.csv", index=False)
    table.to_csv(data / "t.tsv", sep="\t", index=False)
    table.to_json(data / "t.jsonl")
    table.to_parquet(data / "t.parquet")
    images = [{"bytes": png(i) + MARK.encode(), "path": None} for i in range(3)]
    kinds = Features({"image": Image(), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict({"image": images, "label": [0, 1, None]}, kinds).to_parquet(data / "images.parquet")
    write_images(data / "images", ["good/0.png", "bad/1.png", "other/2.png"])
    write_csv(data / "images.csv", [("images/good/0.png", "good"), ("", "bad")], names="image,label")
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    names = ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "images.parquet", "images", "images.csv"]
    repository = Path(__file__).parents[2]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))},
        **{"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "scratch")},
        **{"HF_DATASETS_CACHE": str(tmp_path / "home" / "cache"), "PYTHONPATH": str(repository), "PYTHONDONTWRITEBYTECODE": "1"},
    }
    watched = [str(tmp_path / place) for place in ("home", "scratch", "work")]
    run = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(watched), str(data), *names],
        env=environment,
        cwd=tmp_path / "work",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])
    assert said["counts"] == {**dict.fromkeys(names[:4], 3), "images.parquet": 2, "images": 2, "images.csv": 1}
    assert [path for path in said["written"] if path.startswith(str(tmp_path)) and not path.endswith(".lock")] == []
    held = [path for path in said["left"] if MARK.encode() in Path(path).read_bytes() or path.endswith((".arrow", ".parquet"))]
    assert held == []
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    after = [path for path in tmp_path.rglob("*") if path.is_file() and path not in before]
    assert not [path for path in after if MARK.encode() in path.read_bytes() or path.suffix in (".arrow", ".parquet", ".png")]
