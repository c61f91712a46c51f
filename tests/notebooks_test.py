"""Every notebook runs from top to bottom, its study under the smoke preset."""

import os

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

pytestmark = pytest.mark.exhaustive  # looks at our studies, not at versions of others

# What each prints when it works.
SAID = {
    "ptq_overtraining.ipynb": ("Does the loss", "w4a8"),
    "quantize_your_model.ipynb": ("bit for bit: True", "verdict: ", "BSD-3-Clause"),
}
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXQUANT_PRESET", "smoke")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    for words in SAID[path.name]:
        assert words in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_it_is_committed_without_outputs_and_with_its_badge(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    assert f"blob/main/colab/{path.name}" in notebook.cells[0].source
