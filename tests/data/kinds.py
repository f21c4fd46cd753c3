"""The same records in every kind of file."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from tests.data.files import write

ROWS = {"text": ["a fine film", "NA", "null", 'so "good", they say'], "label": ["good", "bad", "nan", "good"]}


def csv(folder: Path) -> Path:
    lines = ["text,label", "a fine film,good", "NA,bad", "null,nan", '"so ""good"", they say",good']
    return write(folder / "t.csv", "\n".join(lines) + "\n")


def tsv(folder: Path) -> Path:
    lines = ["text\tlabel", "a fine film\tgood", "NA\tbad", "null\tnan", 'so "good", they say\tgood']
    return write(folder / "t.tsv", "\r\n".join(lines) + "\r\n")


def jsonl(folder: Path) -> Path:
    Dataset.from_dict(ROWS).to_json(folder / "t.jsonl", lines=True)
    return folder / "t.jsonl"


def json_array(folder: Path) -> Path:
    Dataset.from_dict(ROWS).to_json(folder / "t.json", lines=False)
    return folder / "t.json"


def parquet(folder: Path) -> Path:
    Dataset.from_dict(ROWS).to_parquet(folder / "t.parquet")
    return folder / "t.parquet"


def upper_case(folder: Path) -> Path:
    return csv(folder).rename(folder / "T.CSV")


def marked(folder: Path) -> Path:
    """As Excel writes it: with a byte order mark."""
    return write(folder / "m.csv", "\ufeff" + csv(folder).read_text())
