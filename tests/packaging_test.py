"""What is built to be published holds the library alone."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.exhaustive, pytest.mark.long]


def test_the_wheel_holds_the_library_alone(tmp_path):
    source = tmp_path / "source"  # a copy, so that nothing of an earlier build is taken along
    shutil.copytree(ROOT / "jaxquant", source / "jaxquant")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"jaxquant"}
    assert "jaxquant/py.typed" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxquant").rglob("*.py")}
    assert modules <= set(names)
