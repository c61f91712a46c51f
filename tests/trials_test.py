import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from experiments.harness.running import files, memory, packed, record_store, trials

pytestmark = pytest.mark.exhaustive  # looks at our studies, not at versions of others


@dataclasses.dataclass(frozen=True)
class Trial:
    number: int
    kind: str = "good"


def run_trial(trial: Trial, context: trials.Context) -> dict:
    context.progress(1.0, "halfway")
    if trial.kind == "bad":
        raise ArithmeticError(f"cannot do {trial.number}")
    if trial.kind == "dies":
        os._exit(7)
    if trial.kind == "slow":
        (context.scratch.parent.parent / f"slow-{trial.number}").touch()
        time.sleep(60)
    if trial.kind == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
    part = context.cached("part", lambda: {"square": trial.number**2})
    compiled(jnp.zeros(trial.number))
    held = os.getpid() if trial.kind == "watched" else programs_held()
    return {"status": "done", "result": part["square"], "held": held}


@jax.jit
def compiled(x: jax.Array) -> jax.Array:
    return x + 1.0


def programs_held() -> int:
    """How many of `compiled`'s programs are alive in this process."""
    alive = jax.extend.backend.get_backend().live_executables()
    return sum("jit_compiled" in program.hlo_modules()[0].name for program in alive)


def cost(trial: Trial) -> float:
    return float(trial.number)


def compile_key(trial: Trial) -> int:
    return trial.number % 3


def run(store, grid, **options):
    launch = trials.Launch(**options)
    trials.run(grid, run_trial, store, cost=cost, compile_key=compile_key, launch=launch)


@pytest.fixture
def store(tmp_path):
    return record_store.RecordStore(tmp_path / "w", "squares")


GRID = [Trial(n) for n in range(5)]


@pytest.mark.first(1)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_trial_has_one_record_and_scratch_is_gone(store, workers):
    run(store, GRID, workers=workers)
    assert [store.read(t)["result"] for t in GRID] == [0, 1, 4, 9, 16]
    assert len(list((store.workdir / "trials").iterdir())) == 5
    assert not [p for p in (store.workdir / "scratch").iterdir() if p.is_dir()]


def test_pages_are_given_back_before_a_trial_and_within_it(store, monkeypatch):
    trims = []
    monkeypatch.setattr(memory, "trim", lambda at_most_every=0.0: trims.append(at_most_every))
    run(store, [Trial(4)])
    assert len(trims) == 2
    assert trims[0] == 0.0 < trims[1]


def test_finished_trials_are_skipped(store):
    run(store, GRID[:2])
    before = {p: p.stat().st_mtime_ns for p in (store.workdir / "trials").iterdir()}
    run(store, GRID)
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())


@pytest.mark.first(1)
@pytest.mark.parametrize("workers", [1, 2])
def test_programs_are_kept_while_trials_are_of_one_kind(store, workers):
    """Nine trials of three kinds, each with a program of its own: one process holds three, not nine."""
    jax.clear_caches()
    grid = [Trial(n) for n in range(9)]
    run(store, grid, workers=workers)
    held = [store.read(t)["held"] for t in grid]
    if workers == 1:
        assert held == [3, 3, 3, 2, 2, 2, 1, 1, 1]
    assert max(held) <= 3


@pytest.mark.long
def test_a_process_of_several_runs_trials_of_one_kind(store):
    grid = [Trial(n, "watched") for n in range(9)]
    run(store, grid, workers=2)
    kinds: dict[int, set[int]] = {}
    for trial in grid:
        kinds.setdefault(store.read(trial)["held"], set()).add(compile_key(trial))
    assert {len(found) for found in kinds.values()} == {1}
    assert 3 <= len(kinds) <= 6


def test_shards_cover_the_grid_once(store):
    sizes = []
    for i in range(3):
        run(store, GRID, shard=(i, 3))
        sizes.append(len(list((store.workdir / "trials").iterdir())))
    assert sizes == [2, 4, 5]


@pytest.mark.first(1)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_record_is_set_aside_and_made_again(store, workers, caplog):
    run(store, GRID)
    whole = store.path(GRID[3]).read_bytes()
    store.path(GRID[3]).write_bytes(whole[: len(whole) // 2])
    store.path(GRID[4]).write_bytes(whole)  # another trial's
    run(store, GRID, workers=workers)
    assert store.path(GRID[3]).read_bytes() == whole
    assert store.read(GRID[4])["result"] == 16
    assert "not whole JSON" in caplog.text
    assert "not this trial's record" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize(("kind", "reason"), [("bad", "cannot do 9"), ("dies", "exit code 7")])
def test_a_failing_trial_is_named_and_costs_only_itself(store, kind, reason):
    with pytest.raises(RuntimeError, match=rf"1 trial\(s\) failed.*number=9(?s:.*){reason}"):
        run(store, [*GRID, Trial(9, kind)], workers=2)
    assert sum(store.read(t) is not None for t in GRID) == 5


@pytest.mark.long
def test_workers_that_die_are_replaced_and_cost_their_own_trials_alone(store):
    """The two costliest trials come first, and end both workers."""
    with pytest.raises(RuntimeError, match=r"2 trial\(s\) failed"):
        run(store, [*GRID, Trial(8, "dies"), Trial(9, "dies")], workers=2)
    assert store.read(Trial(8, "dies")) is None
    assert all(store.read(t) is not None for t in GRID)


def test_in_this_process_too_a_failing_trial_costs_only_itself(store):
    with pytest.raises(RuntimeError, match=r"1 trial\(s\) failed.*number=9.*cannot do 9"):
        run(store, [*GRID[:2], Trial(9, "bad")])
    assert [store.read(t)["result"] for t in GRID[:2]] == [0, 1]


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({"trial": 1}, r"record's own fields; got \['trial'\]"),
        ({"id": "x", "checksum": 2}, r"got \['checksum', 'id'\]"),
        ({"loss": float("nan")}, "finite JSON values"),
        ({"loss": jnp.float32(1)}, "finite JSON values"),
        (None, "must return a dictionary; got NoneType"),
    ],
)
def test_results_that_a_record_cannot_hold_are_named(store, results, words):
    with pytest.raises(ValueError, match=words):
        store.write(GRID[0], results, 1.0)
    assert store.read(GRID[0]) is None


def test_records_that_are_packed_during_a_run_are_found(store):
    run(store, GRID[:2])
    assert store.read(GRID[2]) is None
    packed.pack(store.workdir)
    assert [store.read(t)["result"] for t in GRID[:2]] == [0, 1]
    store.write(GRID[2], {"result": 4}, 1.0)
    packed.pack(store.workdir)
    assert [store.read(t)["result"] for t in GRID[:3]] == [0, 1, 4]


def test_workers_end_with_their_parent(store, tmp_path):
    """By SIGKILL, while both are in trials of a minute: the locks are free at once."""
    grid = [Trial(n, "slow") for n in range(2)]
    script = tmp_path / "study.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from trials_test import Trial, record_store, run\n"
        "if __name__ == '__main__':\n"
        f"    store = record_store.RecordStore({str(store.workdir)!r}, 'squares')\n"
        "    run(store, [Trial(n, 'slow') for n in range(2)], workers=2)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len([*store.workdir.glob("slow-*")]) < 2:
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    start = time.monotonic()
    for trial in grid:
        with store.lock(trial):
            pass
    assert time.monotonic() - start < 20


@pytest.mark.long
def test_a_full_disk_ends_the_run_and_keeps_what_is_finished(store):
    run(store, GRID[:3])
    with pytest.raises(OSError, match="No space left"):
        run(store, [*GRID, Trial(9, "full")], workers=2)
    assert sum(store.read(t) is not None for t in GRID) >= 3


def test_what_an_interrupted_trial_finished_is_remembered(tmp_path):
    context = trials.Context(tmp_path, lambda amount, note: None)
    assert context.cached("a", lambda: {"x": 1}) == {"x": 1}
    assert context.cached("a", lambda: {"x": 2}) == {"x": 1}


def test_a_trial_s_runs_are_saved_five_minutes_apart(tmp_path):
    """Each save loses about 65 kB within Orbax: 12 an hour are less than 1 MB."""
    context = trials.Context(tmp_path, lambda amount, note: None)
    with context.checkpoints("trunk") as trunk, context.checkpoints("branch") as branch:
        for run in (trunk, branch):
            assert not run.is_due(1000, 0, 1, ends=True)
        context._spacings["trunk"].worked = 299.0
        assert not trunk.is_due(1000, 0, 1, ends=True)
        context._spacings["trunk"].worked = 300.0
        assert trunk.is_due(1000, 0, 1, ends=False)
        assert not branch.is_due(1000, 0, 1, ends=False)
    with context.checkpoints("trunk") as again:
        assert again.is_due(1000, 0, 1, ends=False)
    kept = trials.Context(tmp_path, lambda amount, note: None, keeps_checkpoints=True)
    with kept.checkpoints("trunk") as trunk:
        assert trunk.is_due(1000, 0, 1, ends=True)
        assert not trunk.is_due(1000, 0, 1, ends=False)


def test_records_say_what_they_are(store):
    run(store, GRID[:1])
    record = json.loads(store.path(GRID[0]).read_text())
    assert record["study"] == "squares"
    assert record["id"] == record_store.trial_id(GRID[0])
    assert record["trial"] == {"number": 0, "kind": "good"}


def test_a_workdir_of_another_study_is_refused(tmp_path, store):
    with pytest.raises(ValueError, match="holds the study 'squares', not 'cubes'"):
        record_store.RecordStore(store.workdir, "cubes")
    files.write_json(tmp_path / "run" / "config.json", {})
    with pytest.raises(ValueError, match="holds a training run"):
        record_store.RecordStore(tmp_path / "run", "squares")


def test_a_lost_study_json_is_found_again_from_the_records(store):
    run(store, GRID[:1])
    (store.workdir / "study.json").write_text('{"stu')
    with pytest.raises(ValueError, match="holds the study 'squares'"):
        record_store.RecordStore(store.workdir, "cubes")
    assert record_store.RecordStore(store.workdir, "squares").read(GRID[0])["result"] == 0


def test_an_edited_record_is_not_believed(store, caplog):
    run(store, GRID)
    text = store.path(GRID[3]).read_text()
    store.path(GRID[3]).write_text(text.replace('"result": 9', '"result": 8'))
    assert store.read(GRID[3]) is None
    assert "not what was recorded" in caplog.text


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        record_store.RecordStore(tmp_path / "file" / "w", "squares")
