"""Run the notebook from its first cell to its last, and keep what it shows.

python -m examples.run_notebook          # runs it in an empty folder; ends non-zero at the first cell that fails
python -m examples.run_notebook --write  # and writes its outputs into the notebook
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).with_name("first_hour.ipynb")


def executed(path: Path, folder: Path, timeout: int = 900) -> NotebookNode:
    """The notebook with its outputs, and without what differs from machine to machine: folders, warnings, times of cells.

    Args:
        path: of the notebook.
        folder: that it works in; should be empty.
        timeout: seconds that one cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: naming the cell that failed.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if "outputs" in cell:
            cell.outputs = [_bare(output, folder) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def _bare(output: NotebookNode, folder: Path) -> NotebookNode:
    if "text" in output:
        output.text = output.text.replace(f"{folder.resolve()}/", "")
    return output


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(NOTEBOOK, Path(folder))
    if "--write" in sys.argv[1:]:
        nbformat.write(notebook, NOTEBOOK)
    print(f"{sum(cell.cell_type == 'code' for cell in notebook.cells)} cells ran")


if __name__ == "__main__":
    main()
