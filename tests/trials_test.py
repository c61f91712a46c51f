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

from experiments.harness.running import files, ledgers, memory, trials

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
    part = context.remember("part", lambda: {"square": trial.number**2})
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


def kind(trial: Trial) -> int:
    return trial.number % 3


def run(ledger, grid, **options):
    launch = trials.Launch(**options)
    trials.run(grid, run_trial, ledger, cost=cost, kind=kind, launch=launch)


@pytest.fixture
def ledger(tmp_path):
    return ledgers.Ledger(tmp_path / "w", "squares")


GRID = [Trial(n) for n in range(5)]


@pytest.mark.first(1)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_trial_has_one_record_and_scratch_is_gone(ledger, workers):
    run(ledger, GRID, workers=workers)
    assert [ledger.read(t)["result"] for t in GRID] == [0, 1, 4, 9, 16]
    assert len(list((ledger.workdir / "trials").iterdir())) == 5
    assert not [p for p in (ledger.workdir / "scratch").iterdir() if p.is_dir()]


def test_pages_are_given_back_before_a_trial_and_within_it(ledger, monkeypatch):
    trims = []
    monkeypatch.setattr(memory, "trim", lambda at_most_every=0.0: trims.append(at_most_every))
    run(ledger, [Trial(4)])
    assert len(trims) == 2
    assert trims[0] == 0.0 < trims[1]


def test_finished_trials_are_skipped(ledger):
    run(ledger, GRID[:2])
    before = {p: p.stat().st_mtime_ns for p in (ledger.workdir / "trials").iterdir()}
    run(ledger, GRID)
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())


@pytest.mark.first(1)
@pytest.mark.parametrize("workers", [1, 2])
def test_programs_are_kept_while_trials_are_of_one_kind(ledger, workers):
    """Nine trials of three kinds, each with a program of its own: one process holds three, not nine."""
    jax.clear_caches()
    grid = [Trial(n) for n in range(9)]
    run(ledger, grid, workers=workers)
    held = [ledger.read(t)["held"] for t in grid]
    if workers == 1:
        assert held == [3, 3, 3, 2, 2, 2, 1, 1, 1]
    assert max(held) <= 3


@pytest.mark.long
def test_a_process_of_several_runs_trials_of_one_kind(ledger):
    grid = [Trial(n, "watched") for n in range(9)]
    run(ledger, grid, workers=2)
    kinds: dict[int, set[int]] = {}
    for trial in grid:
        kinds.setdefault(ledger.read(trial)["held"], set()).add(kind(trial))
    assert {len(found) for found in kinds.values()} == {1}
    assert 3 <= len(kinds) <= 6


def test_shards_cover_the_grid_once(ledger):
    sizes = []
    for i in range(3):
        run(ledger, GRID, shard=(i, 3))
        sizes.append(len(list((ledger.workdir / "trials").iterdir())))
    assert sizes == [2, 4, 5]


@pytest.mark.first(1)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_record_is_set_aside_and_made_again(ledger, workers, caplog):
    run(ledger, GRID)
    whole = ledger.path(GRID[3]).read_bytes()
    ledger.path(GRID[3]).write_bytes(whole[: len(whole) // 2])
    ledger.path(GRID[4]).write_bytes(whole)  # another trial's
    run(ledger, GRID, workers=workers)
    assert ledger.path(GRID[3]).read_bytes() == whole
    assert ledger.read(GRID[4])["result"] == 16
    assert "not whole JSON" in caplog.text
    assert "not this trial's record" in caplog.text


@pytest.mark.first(1)
@pytest.mark.parametrize(("kind", "reason"), [("bad", "cannot do 9"), ("dies", "exit code 7")])
def test_a_failing_trial_is_named_and_costs_only_itself(ledger, kind, reason):
    with pytest.raises(RuntimeError, match=rf"1 trial\(s\) failed.*number=9(?s:.*){reason}"):
        run(ledger, [*GRID, Trial(9, kind)], workers=2)
    assert sum(ledger.read(t) is not None for t in GRID) == 5


@pytest.mark.long
def test_workers_that_die_are_replaced_and_cost_their_own_trials_alone(ledger):
    """The two costliest trials come first, and end both workers."""
    with pytest.raises(RuntimeError, match=r"2 trial\(s\) failed"):
        run(ledger, [*GRID, Trial(8, "dies"), Trial(9, "dies")], workers=2)
    assert ledger.read(Trial(8, "dies")) is None
    assert all(ledger.read(t) is not None for t in GRID)


def test_workers_end_with_their_parent(ledger, tmp_path):
    """By SIGKILL, while both are in trials of a minute: the locks are free at once."""
    grid = [Trial(n, "slow") for n in range(2)]
    script = tmp_path / "study.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from trials_test import Trial, ledgers, run\n"
        "if __name__ == '__main__':\n"
        f"    ledger = ledgers.Ledger({str(ledger.workdir)!r}, 'squares')\n"
        "    run(ledger, [Trial(n, 'slow') for n in range(2)], workers=2)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len([*ledger.workdir.glob("slow-*")]) < 2:
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    start = time.monotonic()
    for trial in grid:
        with ledger.claim(trial):
            pass
    assert time.monotonic() - start < 20


@pytest.mark.long
def test_a_full_disk_ends_the_run_and_keeps_what_is_finished(ledger):
    run(ledger, GRID[:3])
    with pytest.raises(OSError, match="No space left"):
        run(ledger, [*GRID, Trial(9, "full")], workers=2)
    assert sum(ledger.read(t) is not None for t in GRID) >= 3


def test_what_an_interrupted_trial_finished_is_remembered(tmp_path):
    context = trials.Context(tmp_path, lambda amount, note: None)
    assert context.remember("a", lambda: {"x": 1}) == {"x": 1}
    assert context.remember("a", lambda: {"x": 2}) == {"x": 1}


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


def test_records_say_what_they_are(ledger):
    run(ledger, GRID[:1])
    record = json.loads(ledger.path(GRID[0]).read_text())
    assert record["study"] == "squares"
    assert record["id"] == ledgers.trial_id(GRID[0])
    assert record["trial"] == {"number": 0, "kind": "good"}


def test_a_workdir_of_another_study_is_refused(tmp_path, ledger):
    with pytest.raises(ValueError, match="holds the study 'squares', not 'cubes'"):
        ledgers.Ledger(ledger.workdir, "cubes")
    files.write_json(tmp_path / "run" / "config.json", {})
    with pytest.raises(ValueError, match="holds a training run"):
        ledgers.Ledger(tmp_path / "run", "squares")


def test_a_lost_study_json_is_found_again_from_the_records(ledger):
    run(ledger, GRID[:1])
    (ledger.workdir / "study.json").write_text('{"stu')
    with pytest.raises(ValueError, match="holds the study 'squares'"):
        ledgers.Ledger(ledger.workdir, "cubes")
    assert ledgers.Ledger(ledger.workdir, "squares").read(GRID[0])["result"] == 0


def test_an_edited_record_is_not_believed(ledger, caplog):
    run(ledger, GRID)
    text = ledger.path(GRID[3]).read_text()
    ledger.path(GRID[3]).write_text(text.replace('"result": 9', '"result": 8'))
    assert ledger.read(GRID[3]) is None
    assert "not what was recorded" in caplog.text


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        ledgers.Ledger(tmp_path / "file" / "w", "squares")
