"""What is built to be published holds the library alone."""

import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.exhaustive, pytest.mark.long]


def test_the_wheel_holds_the_library_alone(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
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
