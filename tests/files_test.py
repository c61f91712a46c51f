import errno
import os

import pytest

from experiments.harness import files


def test_json_round_trips_every_float(tmp_path):
    value = {"x": [0.1, 1 / 3, 1e-300, -0.0], "n": None}
    files.write_json(tmp_path / "deep" / "a.json", value)
    assert files.read_json(tmp_path / "deep" / "a.json") == value
    assert files.read_json(tmp_path / "absent.json") is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "b.json", float("nan"))
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_a_half_written_file_is_set_aside(tmp_path, caplog):
    (tmp_path / "a.json").write_text('{"x": [1, 2')
    assert files.read_json(tmp_path / "a.json") is None
    assert "not whole JSON" in caplog.text
    assert len(list((tmp_path / "set-aside").iterdir())) == 1


def test_a_full_disk_leaves_the_old_content(tmp_path, monkeypatch):
    files.write(tmp_path / "a.txt", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
