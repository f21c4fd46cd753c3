"""lalora plan --data: who holds what, as a simulation would split it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from lalora_flwr.data.data_set import data_set
from lalora_flwr.data.holdings import holdings, holdings_figure
from lalora_flwr.data.partition import site_rows
from lalora_flwr.ground.figures import rendered
from tests.cli.commands import Lalora, assert_one_line, lalora, pairs  # noqa: F401  (a fixture)
from tests.conftest import files_in, small
from tests.data.files import write_csv
from tests.models.folders import save_hf

SPLIT = {"num_supernodes": 5, "data__partition": "dirichlet", "data__beta": 0.4, "seed": 3}


def test_the_counts_are_those_of_the_split_that_runs(tmp_path: Path) -> None:
    settings = small(tmp_path, **SPLIT)
    data, held = data_set(settings), holdings(settings)
    assert held.labels == tuple("0123456789")
    rows = site_rows(data.classes(), settings.data, settings.seed, 5)
    for own, counts in zip(rows, held.counts, strict=True):
        assert Counter(data.classes()[row] for row in own) == {c: n for c, n in enumerate(counts) if n}
    assert held.records() == [len(own) for own in rows]


def test_the_command_prints_each_site_and_draws_them(lalora: Lalora, tmp_path: Path) -> None:  # noqa: F811
    code, out, err = lalora("plan", "--data", "-c", pairs(**SPLIT))
    assert code == 0, err
    held = holdings(small(tmp_path, **SPLIT))
    for site, counts in enumerate(held.counts):
        (line,) = [line for line in out.splitlines() if line.split()[:2] == [str(site), str(sum(counts))]]
        assert [int(part) for part in line.split()[4:]] == list(counts)
    assert (tmp_path / "runs" / "partition.png").read_bytes()[:4] == b"\x89PNG"


def test_without_data_nothing_is_split_or_drawn(lalora: Lalora, tmp_path: Path) -> None:  # noqa: F811
    gone = {"data__name": "file:/gone.csv", "data__labels": "a,b", "data__records": 500, "model__name": "timm/test_vit"}
    code, _, err = lalora("plan", "-c", pairs(**SPLIT, **gone))
    assert code == 0, err
    assert not files_in(tmp_path)
    assert_one_line(lalora("plan", "--plot", "a.png", "-c", pairs()), "--plot", "--data")


def test_a_picture_that_cannot_be_drawn_is_one_line(lalora: Lalora) -> None:  # noqa: F811
    assert_one_line(lalora("plan", "--data", "--plot", "a.nothing", "-c", pairs()), "--plot a.nothing")


def of_table(folder: Path, test: str) -> dict[str, str]:
    """Settings of a run on the texts of ``t.csv``."""
    save_hf(folder / "model", "bert", "base")
    data = {"data__name": f"file:{folder / 't.csv'}", "data__test": test}
    return {"model__name": f"hf/{folder / 'model'}", "lora__targets": "auto", **data}


def test_names_of_classes_are_shown_as_they_are(lalora: Lalora, tmp_path: Path) -> None:  # noqa: F811
    """Neither the terminal's markup, nor formulas of a picture, nor names that a legend would hide."""
    names = ("[/b]", "[red]x", "cost $x_{$", "_hidden", "n" * 3000)
    write_csv(tmp_path / "t.csv", [(f"text {i}", f'"{names[i % 5]}"') for i in range(60)])
    about = of_table(tmp_path, "hold-out:0.2")
    code, out, err = lalora("plan", "--data", "-c", pairs(**about))
    assert code == 0 and "arning" not in err, err
    assert "[/b]" in out and "[red]x" in out and "_hidden" in out
    figure = holdings_figure(holdings(small(tmp_path, **about)), "title")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(shown) == 5 and rendered(figure)[".png"][:4] == b"\x89PNG"


def test_classes_of_records_with_several_are_counted(lalora: Lalora, tmp_path: Path) -> None:  # noqa: F811
    write_csv(tmp_path / "t.csv", [(f"text {i}", ("a|b", "b", "[]")[i % 3]) for i in range(30)])
    about = of_table(tmp_path, "hold-out:0.1")
    code, out, err = lalora("plan", "--data", "-c", pairs(**about, data__problem_type="multi-label"))
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("records of each class: ")]
    assert re.fullmatch(r"records of each class: a (8|9|10), b (17|18|19|20)", line)
