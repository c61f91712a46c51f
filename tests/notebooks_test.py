"""Every notebook runs from top to bottom, its study under the smoke preset, and has its outputs with it."""

import ast
import importlib.util
import re
import socket

import nbformat
import pytest
from conftest import ROOT

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
    "quantize_your_model.ipynb": (
        "bit for bit: True",
        "verdict: ",
        "loaded equals saved: True",
        "BSD-3-Clause",
    ),
    "training_precision.ipynb": ("best bits: ", "bits gain", "D_crit"),
}
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def _load_execute():
    """The script beside the notebooks, which lie in no package."""
    spec = importlib.util.spec_from_file_location("execute", ROOT / "colab" / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute = _load_execute()


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_it_runs(path):
    notebook = execute.executed(path, {"JAXQUANT_PRESET": "smoke"})
    for words in SAID[path.name]:
        assert words in text_of(notebook)
    check_outputs(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_it_is_committed_with_its_outputs_and_its_badge(path):
    """As `python colab/execute.py` writes it."""
    notebook = nbformat.read(path, as_version=4)
    assert f"blob/main/colab/{path.name}" in notebook.cells[0].source
    for words in SAID[path.name]:
        assert words in text_of(notebook)
    check_outputs(notebook)
    assert path.stat().st_size < 1_000_000
    # What tells of the machine that ran it.
    for words in ("/home/", "/tmp/", "/root/", "/usr/", str(ROOT), socket.gethostname()):
        assert words not in outputs_of(notebook), words


def text_of(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def outputs_of(notebook) -> str:
    """All outputs but pixels."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [str(v) for o in outputs for k, v in o.get("data", {}).items() if k != "image/png"]
    return "\n".join([text_of(notebook), *shown])


def check_outputs(notebook) -> None:
    """A cell that prints has said something, one that draws has a picture; none failed or warned."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        kinds = [output.output_type for output in cell.outputs]
        names = [output.get("name", "stdout") for output in cell.outputs]
        pictures = [kind for o in cell.outputs for kind in o.get("data", {}) if "image/" in kind]
        assert "error" not in kinds, cell.source
        assert set(names) <= {"stdout"}, cell.source
        assert kinds or "print(" not in cell.source, cell.source
        assert pictures or not re.search(r"display\(|alt\.Chart\(", cell.source), cell.source


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
