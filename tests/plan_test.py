"""The planner's door."""

import json
import subprocess
import sys

import children
import pytest
from conftest import ROOT


def plan(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.plan", *flags]
    return children.run(command, timeout=300, cwd=ROOT)


@pytest.mark.exhaustive
def test_a_plan_is_printed_and_kept(tmp_path):
    done = plan("--flops=1e20", "--serve_bits=4", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "D_crit" in done.stdout
    assert "warning: N = " in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["bits"] for row in summary["rows"]} >= {4, 8, 16}
    assert summary["given"]["serve_bits"] == 4
    assert summary["best"].startswith("An extrapolation: ")  # N beyond what was fitted
    assert (tmp_path / "report.html").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--flops=-1"], "flops must be a number above 0"),
        (["--flops=x"], "could not convert"),
        (["--flops=1e20", "--fit=nowhere"], "--fit is one of kumar2024, quest2025"),
        (["--flops=1e20", "--precisions=a"], "--precisions are numbers"),
        (["--flops=1e20", "--precisions=3"], "is next to nothing"),
        (["--flops=1e20", "--method=lsq"], "--method is of a study's fit; kumar2024 has none"),
        (["--flops=1e20", "--workdir=/proc/x"], "workdir '/proc/x' cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, words):
    done = plan(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
