"""Runs the notebooks of this folder and writes them back with their outputs.

    python colab/execute.py            # all of them; some 25 minutes on two cores
    python colab/execute.py qlora      # one of them

The code of this checkout runs, and not what a first cell would install.  Each runs in an empty folder, and
progress bars are left out.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def executed(path: Path, environment: dict[str, str] | None = None) -> nbformat.NotebookNode:
    """The notebook with what its cells put out, but for progress bars, times, and the kernel's version.

    Args:
        path: of the notebook.
        environment: further variables that its kernel sees.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    modules = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    # A table of products names their lines, and a cell's file is otherwise a number.
    kernel = os.environ | {"PYTHONPATH": modules, "IPYKERNEL_CELL_NAME": "cell.py"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=3600,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=kernel | (environment or {}))
    notebook.metadata = nbformat.from_dict(metadata)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_result(output)]
    return notebook


def is_result(output: nbformat.NotebookNode) -> bool:
    """Whether an output is no progress bar: neither text of one nor a widget."""
    widget = "application/vnd.jupyter.widget-view+json"
    return output.get("name") != "stderr" and widget not in output.get("data", {})


def main(names: Sequence[str]) -> None:
    for path in sorted(HERE.glob("*.ipynb")):
        if not names or path.stem in names:
            notebook = executed(path)
            nbformat.write(notebook, path)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
