"""Records as one table: what is packed reads as it did, and what is damaged is left out by name."""

import dataclasses
import gzip
import json
import logging
import shutil

import pytest
from conftest import ROOT

from experiments.harness.running import packed
from experiments.harness.running.record_store import RecordStore, read_records, trial_id

RECORDS = ROOT / "experiments" / "results"


@dataclasses.dataclass(frozen=True)
class Trial:
    bits: int


def store(folder, count=3, size=1):
    found = RecordStore(folder, "study")
    for bits in range(count):
        found.write(Trial(bits), {"loss": bits / 3, "text": "x" * size}, seconds=bits + 0.04)
    return found


def test_a_packed_folder_gives_the_same_records_and_times(tmp_path):
    before = store(tmp_path)
    records = read_records(tmp_path, "study")
    times = {p.stem: json.loads(p.read_text())["seconds"] for p in tmp_path.glob("timings/*")}
    one = before.read(Trial(1))
    table, count = packed.pack(tmp_path)
    assert (table.name, count) == ("records.jsonl", 3)
    assert not (tmp_path / "trials").exists()
    assert not (tmp_path / "timings").exists()
    assert read_records(tmp_path, "study") == records
    again = RecordStore(tmp_path, "study")
    assert again.read(Trial(1)) == again.read(Trial(1)) == one
    assert again.read(Trial(7)) is None
    assert {name: row.seconds for name, row in packed.read(tmp_path).items()} == times
    content = table.read_bytes()
    assert packed.pack(tmp_path) == (table, 3)
    assert table.read_bytes() == content


def test_a_large_table_is_compressed_and_grows_by_what_is_run_later(tmp_path):
    store(tmp_path, count=3, size=400_000)
    assert packed.pack(tmp_path)[0].name == "records.jsonl.gz"
    content = (tmp_path / "records.jsonl.gz").read_bytes()
    RecordStore(tmp_path, "study").write(Trial(9), {"loss": 1.0}, seconds=1)
    assert len(read_records(tmp_path, "study")) == 4
    table, count = packed.pack(tmp_path)
    assert (table.name, count) == ("records.jsonl.gz", 4)
    assert table.read_bytes() != content
    assert RecordStore(tmp_path, "study").read(Trial(9))["loss"] == 1.0


def test_a_single_file_counts_before_the_table(tmp_path):
    store(tmp_path)
    packed.pack(tmp_path)
    newer = RecordStore(tmp_path, "study")
    newer.write(Trial(0), {"loss": 5.0}, seconds=1)
    assert newer.read(Trial(0))["loss"] == 5.0
    assert [r["loss"] for r in read_records(tmp_path, "study") if r["trial"]["bits"] == 0] == [5.0]
    packed.pack(tmp_path)
    assert RecordStore(tmp_path, "study").read(Trial(0))["loss"] == 5.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],
        lambda line: line.replace(b'"loss": 0.0', b'"loss": 9.0'),
        lambda line: b"[1, 2]",
        lambda line: b'{"seconds": "soon", "record": {"id": "a"}}',
    ],
)
def test_a_damaged_line_is_left_out_with_a_warning(tmp_path, caplog, damage):
    store(tmp_path)
    table, _ = packed.pack(tmp_path)
    name = trial_id(Trial(0)).encode()
    lines = [damage(x) if name in x else x for x in table.read_bytes().splitlines()]
    table.write_bytes(b"\n".join(lines) + b"\n")
    with caplog.at_level(logging.WARNING):
        assert len(read_records(tmp_path, "study")) == 2
        assert RecordStore(tmp_path, "study").read(Trial(0)) is None
    assert "is left out" in caplog.text
    assert RecordStore(tmp_path, "study").read(Trial(1))["loss"] == 1 / 3


def test_a_damaged_single_file_is_not_packed_and_takes_no_whole_records_place(tmp_path, caplog):
    store(tmp_path)
    packed.pack(tmp_path)
    store(tmp_path)
    path = tmp_path / "trials" / f"{trial_id(Trial(1))}.json"
    path.write_text(path.read_text().replace("0.3333333333333333", "9.0"))
    with caplog.at_level(logging.WARNING):
        assert packed.pack(tmp_path)[1] == 3
    assert "stays as it is" in caplog.text
    assert [p.name for p in (tmp_path / "trials").iterdir()] == [path.name]
    assert packed.read(tmp_path)[path.stem].record["loss"] == 1 / 3


def test_what_is_no_table_and_no_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no records of a study: no trials/\*\.json"):
        packed.pack(tmp_path)
    (tmp_path / "records.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"records\.jsonl\.gz is no table of records"):
        packed.read(tmp_path)
    whole = gzip.compress(b'{"seconds": 1, "record": {"id": "a"}}\n' * 999)
    (tmp_path / "records.jsonl.gz").write_bytes(whole[:40])
    with pytest.raises(ValueError, match="is no table of records"):
        packed.read(tmp_path)


def test_a_table_of_another_study_is_not_taken_for_ones_own(tmp_path):
    store(tmp_path)
    packed.pack(tmp_path)
    (tmp_path / "study.json").unlink()
    with pytest.raises(ValueError, match="holds the study 'study', not 'other'"):
        RecordStore(tmp_path, "other")


@pytest.mark.parametrize(
    ("study", "folder", "count"),
    [
        ("ptq_overtraining", "ptq_overtraining/full", 39),
        ("training_precision", "training_precision/full", 387),
        ("training_precision", "training_precision/generated", 45),
        ("optimizer_states", "optimizer_states/law", 162),
    ],
)
def test_committed_records_are_whole(study, folder, count, tmp_path):
    shutil.copytree(RECORDS / folder, tmp_path / "records")
    records = read_records(tmp_path / "records", study)
    assert len(records) == count
    assert all(row.seconds is not None for row in packed.read(tmp_path / "records").values())


def test_a_kept_table_of_another_grid_is_refused_before_anything_runs(tmp_path):
    own = store(tmp_path)
    own.check_grid([Trial(9)])  # single records are no kept table
    packed.pack(tmp_path)
    RecordStore(tmp_path, "study").check_grid([Trial(9), Trial(1)])
    with pytest.raises(
        ValueError, match="keeps 3 records, none of them of this grid; give the --preset"
    ):
        RecordStore(tmp_path, "study").check_grid([Trial(9), Trial(8)])
