"""The study `qat_efficiency` from outside, under its smallest preset."""

import json
import subprocess

import pytest
from conftest import ROOT, study_command


@pytest.mark.exhaustive
@pytest.mark.long
def test_it_runs_to_its_report(tmp_path):
    done = subprocess.run(
        study_command(tmp_path, study="qat_efficiency"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["trials"] == {"finished": 2, "expected": 2, "diverged": []}
    assert not summary["broken"]
    expected = {(m, w) for m in ("vision", "language") for w in ("w8a8", "w2a16")}
    assert {(row["model"], row["width"]) for row in summary["comparisons"]} == expected
    assert (tmp_path / "latency.json").exists()
    assert (tmp_path / "report.html").stat().st_size > 100_000
