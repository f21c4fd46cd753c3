"""Test records that are of no use are said in the summary and on the console, and not in a log alone."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lalora_flwr.cli.run import report
from lalora_flwr.engines.inline import run_inline
from tests.conftest import small, strict_json
from tests.data.files import write_csv
from tests.models.files import texts
from tests.models.folders import save_hf, save_images, save_timm


def of_texts(folder: Path) -> dict[str, Any]:
    save_hf(folder / "model", "bert", "base")
    rows = [(row["sentence"], str(row["label"])) for row in texts(40)]
    train = write_csv(folder / "train.csv", rows[:30])
    test = write_csv(folder / "test.csv", [*rows[30:], ("", "1"), ("  ", "0"), ("a film", "")])
    more = {"model__pooling": "mean", "data__max_tokens": 16, "lora__targets": "auto"}
    return {"model__name": f"hf/{folder / 'model'}", "data__name": f"file:{train}", "data__test": f"file:{test}", **more}


def of_images(folder: Path) -> dict[str, Any]:
    save_timm(folder / "model", "vit")
    save_images(folder / "images", ("red", "green"), 16)
    (folder / "images" / "test" / "red" / "0.png").write_bytes(b"garbled")
    return {"model__name": f"timm/{folder / 'model'}", "data__name": f"file:{folder / 'images'}", "lora__targets": "auto"}


@pytest.mark.parametrize(
    ("make", "count", "left_out"),
    [
        (of_texts, 10, {"its text is missing": 2, "its label is missing": 1}),
        (of_images, 7, {"its image cannot be read": 1}),
        (lambda folder: {}, 297, {}),
    ],
    ids=["texts", "images", "digits"],
)
def test_what_was_left_out_is_said(
    make: Callable[[Path], dict[str, Any]], count: int, left_out: dict[str, int], tmp_path: Path
) -> None:
    few = {"num_rounds": 1, "num_supernodes": 2, "train__local_steps": 1, "data__min_records": 1, "train__batch_size": 4}
    folder = run_inline(small(tmp_path, **{**few, **make(tmp_path)}))
    summary = strict_json((folder / "summary.json").read_text())
    assert (summary["test_records"], summary["test_left_out"]) == (count, left_out)
    assert (folder / "plots" / "accuracy.png").exists()  # named by the metric
    report(folder, Console(file=(said := StringIO()), width=200))
    reasons = ", ".join(f"{number}: {reason}" for reason, number in left_out.items())
    assert (f"evaluated on {count} test records; left out {reasons}\n" in said.getvalue()) == bool(left_out)
