"""Every notebook runs from top to bottom, its study under the smoke preset; what it names is there."""

import ast
import os
import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

pytestmark = pytest.mark.exhaustive  # looks at our studies, not at versions of others

# What each prints when it works.
SAID = {
    "optimizer_states.ipynb": ("of full precision's", "compilations of the step: 1"),
    "ptq_overtraining.ipynb": ("Does the loss", "w4a8"),
    "qlora.ipynb": (
        "4.126 bits a weight",
        "the base has the bytes it had: True",
        "loaded, bit for bit: True",
        "starts at the frozen model's outputs: True",
    ),
    "quantize_your_model.ipynb": ("bit for bit: True", "verdict: ", "BSD-3-Clause"),
    "training_precision.ipynb": ("best bits: ", "bits gain", "D_crit"),
}
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


@pytest.mark.long
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


def code(path) -> ast.Module:
    """All cells' code, without what is for IPython alone."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    lines = "\n".join(cell.source for cell in cells).splitlines()
    return ast.parse("\n".join(re.sub(r"%pip|!git", "pass  #", line) for line in lines))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_what_it_imports_is_there(path):
    tree = code(path)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names: dict = {}
    exec(compile(ast.Module(imports, []), path.name, "exec"), names)
    # Names such as jq.ptq.quantize, of what the notebook imports and does not assign itself.
    assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not is_read(n)}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and is_read(n)]
    texts = {ast.unparse(n) for n in found if root(n) in set(names) - assigned}
    assert any(
        text.startswith(("jq.", "quality.", "analysis.", "ptq_overtraining.", "nnx."))
        for text in texts
    )
    for text in texts:
        eval(text, names)


def is_read(node) -> bool:
    return isinstance(node.ctx, ast.Load)


def root(node) -> str | None:
    """The name that a chain of attributes starts from; None where it starts from a value."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_it_is_committed_without_outputs_and_with_its_badge(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    assert f"blob/main/colab/{path.name}" in notebook.cells[0].source
