"""The notebook runs as it lies there, without a network, and what it shows names no machine."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from examples.run_notebook import NOTEBOOK, executed


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell shows, as one text."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(o.get("text", "") + o.get("data", {}).get("text/markdown", "") for o in found) for found in outputs]


def test_what_is_kept_names_no_folder_and_no_failure() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type in ("stream", "display_data") and output.get("name") != "stderr"
    assert not [text for text in texts(notebook) if "/tmp" in text or "/home" in text or "site-packages" in text]


@pytest.mark.slow
def test_it_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    notebook = executed(NOTEBOOK, tmp_path)
    shown = texts(notebook)
    kept = texts(nbformat.read(NOTEBOOK, as_version=4))
    assert len(shown) == len(kept) and all(shown)
    assert [line.split(":")[0] for line in shown[1].splitlines()] == [line.split(":")[0] for line in kept[1].splitlines()]
    assert (
        "| ffa-lora |" in shown[3] and shown[5].count("ok ") == 5 and shown[6].startswith("noticed:") and "survived" in shown[7]
    )
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
