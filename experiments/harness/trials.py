"""Trials: data in, one record each out; finished ones are skipped, started ones go on.

A trial is a frozen dataclass.  Its id is the hash of its content, so the same trial has the same
record wherever it comes up.  A record holds only what follows from the trial, the code and the machine
(no times: those lie in ``timings/``), so that records can be compared byte for byte.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

from experiments.harness import files

_log = logging.getLogger(__name__)

SCHEMA = 2  # raised when the form of a record changes, or the arithmetic behind its numbers


def trial_id(trial: Any) -> str:
    """Twelve hexadecimal digits of the hash of the trial's fields.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Trial:
    ...     bits: int
    >>> trial_id(Trial(4)) == trial_id(Trial(4)), trial_id(Trial(4)) == trial_id(Trial(5))
    (True, False)
    """
    content = json.dumps({"schema": SCHEMA, **dataclasses.asdict(trial)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


class Ledger:
    """A study's folder: ``study.json``, ``trials/*.json``, and scratch space for what is under way."""

    def __init__(self, workdir: str | Path, study: str):
        """Opens or makes the folder.

        Raises:
            ValueError: a folder that cannot be made or written, or that holds another study.
        """
        self.workdir, self.study = Path(workdir).absolute(), study
        try:
            if (self.workdir / "config.json").exists():
                raise ValueError(
                    f"workdir '{workdir}' holds a training run; choose another --workdir"
                )
            marker = files.read_json(self.workdir / "study.json") or self._recorded_study()
            if marker is None:
                files.write_json(self.workdir / "study.json", {"study": study, "schema": SCHEMA})
                marker = {"study": study}
            probe = self.workdir / ".writable"
            files.write(probe, "")
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"workdir '{workdir}' cannot be written: {error.strerror}") from None
        found = marker.get("study") if isinstance(marker, dict) else marker
        if found != study:
            raise ValueError(
                f"workdir '{workdir}' holds the study {found!r}, not {study!r}; choose another --workdir"
            )

    def _recorded_study(self) -> dict | None:
        """Whose records lie here, where study.json was lost."""
        for path in sorted(self.workdir.glob("trials/*.json")):
            record = files.read_json(path)
            if isinstance(record, dict) and "study" in record:
                return {"study": record["study"]}
        return None

    def path(self, trial: Any) -> Path:
        return self.workdir / "trials" / f"{trial_id(trial)}.json"

    def read(self, trial: Any) -> dict | None:
        """The trial's record, or None; a damaged one is set aside."""
        path = self.path(trial)
        record = files.read_json(path)
        if record is None:
            return None
        expected = {"study": self.study, "trial": _as_json(trial)}
        if not isinstance(record, dict) or any(record.get(k) != v for k, v in expected.items()):
            files.set_aside(path, "it is not this trial's record")
            return None
        if record.pop("checksum", None) != _checksum(record):
            files.set_aside(path, "its content is not what was recorded")
            return None
        return record

    def write(self, trial: Any, results: dict, seconds: float) -> None:
        head = {
            "schema": SCHEMA,
            "study": self.study,
            "id": trial_id(trial),
            "trial": _as_json(trial),
        }
        record = json.loads(json.dumps(head | results))
        files.write_json(self.path(trial), record | {"checksum": _checksum(record)})
        files.write_json(
            self.workdir / "timings" / self.path(trial).name, {"seconds": round(seconds, 1)}
        )

    @contextlib.contextmanager
    def claim(self, trial: Any) -> Iterator[Path]:
        """Holds the trial's scratch folder; waits while another process, perhaps dying, holds it."""
        folder = self.workdir / "scratch" / trial_id(trial)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning("waiting for another process that runs trial %s here", folder.name)
                fcntl.flock(lock, fcntl.LOCK_EX)
            folder.mkdir(parents=True, exist_ok=True)
            yield folder


def read_records(workdir: str | Path, study: str) -> list[dict]:
    """All whole records of a study that lie in a folder, whichever grid they are of.

    Raises:
        ValueError: no such record lies there.
    """
    found = []
    for path in sorted(Path(workdir).glob("trials/*.json")):
        record = files.read_json(path)
        if not isinstance(record, dict) or record.get("study") != study:
            continue
        if record.pop("checksum", None) != _checksum(record):
            _log.warning("%s is left out: its content is not what was recorded", path)
            continue
        found.append(record)
    if not found:
        raise ValueError(f"'{workdir}' is not the workdir of a {study} study: no record lies there")
    return found


def _checksum(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _as_json(trial: Any) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(trial)))


@dataclasses.dataclass(frozen=True)
class Context:
    """What a running trial may use of its surroundings.

    Attributes:
        scratch: a folder of its own, kept until its record is written.
        progress: called with (work done since the last call, a few words on how it goes).
    """

    scratch: Path
    progress: Callable[[float, str], None]

    def remember(self, name: str, compute: Callable[[], dict]) -> dict:
        """compute(), or what it gave before the trial was interrupted."""
        path = self.scratch / f"{name}.json"
        value = files.read_json(path)
        if value is None:
            value = compute()
            files.write_json(path, value)
        return value


RunTrial = Callable[[Any, Context], dict]


def run(
    trials: Sequence[Any],
    run_trial: RunTrial,
    ledger: Ledger,
    *,
    cost: Callable[[Any], float],
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
    keep_checkpoints: bool = False,
) -> list[dict]:
    """Runs the trials that have no record yet, the costly ones first.

    Args:
        trials: distinct trials.
        run_trial: a module's function; from (trial, context) to the record's results.
        ledger: where records lie.
        cost: work of a trial, in any unit; a trial's progress should add up to it.
        workers: processes on this machine; each has its share of the cores.
        shard: (i, n) runs every n-th trial from the i-th, as one of n jobs.
        keep_checkpoints: whether scratch folders stay after their record is written.

    Returns:
        The records of all trials that have one, in the order of the trials.

    Raises:
        RuntimeError: trials failed; the others are finished and recorded.
        OSError: a record could not be written.
    """
    index, count = shard
    mine = sorted(trials, key=trial_id)[index::count]
    pending = sorted(
        (t for t in mine if ledger.read(t) is None), key=lambda t: (-cost(t), trial_id(t))
    )
    with _Bar(mine, pending, cost) as bar:
        if workers == 1:
            for trial in pending:
                with ledger.claim(trial) as scratch:
                    progress = functools.partial(bar.add, trial)
                    _run_one(trial, run_trial, ledger, scratch, keep_checkpoints, progress)
                bar.finish(trial)
        else:
            _run_in_processes(pending, run_trial, ledger, workers, keep_checkpoints, bar)
    return [record for trial in trials if (record := ledger.read(trial)) is not None]


def worker_count(asked: int | None, configured: int) -> int:
    """How many processes to run: what was asked for, else what the config says; 0 is one per core on a CPU.

    Raises:
        ValueError: a negative number.
    """
    count = configured if asked is None else asked
    if count < 0:
        raise ValueError(f"workers is at least 1, or 0 for one per core; got {count}")
    if count or jax.default_backend() != "cpu":
        return count or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Bar:
    """One line of progress for the whole study."""

    def __init__(self, trials: Sequence[Any], pending: Sequence[Any], cost: Callable[[Any], float]):
        self._cost, self._note = cost, "starting" if pending else "nothing left to run"
        self._trials, self._finished = len(trials), len(trials) - len(pending)
        total = sum(map(cost, trials))
        self._done = total - sum(map(cost, pending))
        self._under_way: dict[Any, float] = {}
        self._bar = tqdm(
            total=total,
            initial=self._done,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed} passed, {remaining} left, {desc}",
            dynamic_ncols=True,
            mininterval=0.5,
        )
        self._show(refresh=True)

    def add(self, trial: Any, amount: float, note: str) -> None:
        self._note = note or self._note
        so_far = self._under_way.get(trial, 0.0) + amount
        self._under_way[trial] = min(so_far, self._cost(trial))
        self._show()

    def finish(self, trial: Any) -> None:
        self._finished += 1
        self._done += self._cost(trial)
        self._under_way.pop(trial, None)
        self._show(refresh=True)

    def _show(self, refresh: bool = False) -> None:
        self._bar.set_description_str(
            f"{self._finished} of {self._trials} trials done, {self._note}", refresh=False
        )
        self._bar.update(self._done + sum(self._under_way.values()) - self._bar.n)
        if refresh:
            self._bar.refresh()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()


def _run_one(trial, run_trial, ledger, scratch, keep_checkpoints, progress) -> None:
    if ledger.read(trial) is None:  # another process may have finished it meanwhile
        start = time.monotonic()
        results = run_trial(trial, Context(scratch, progress))
        ledger.write(trial, results, time.monotonic() - start)
    if not keep_checkpoints:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_in_processes(pending, run_trial, ledger, workers, keep_checkpoints, bar) -> None:
    """The parent hands out trials one by one over pipes; a lost worker costs its own trial only."""
    context = multiprocessing.get_context("spawn")
    queue, busy, failures = list(pending), {}, []
    # A worker's share of the cores is the same however few trials are left: on some versions of XLA the
    # number of threads changes the last bits of a sum.
    try:
        for number in range(min(workers, len(pending))):
            here, there = context.Pipe()
            arguments = (there, number, workers, run_trial, ledger, keep_checkpoints)
            process = context.Process(target=_work, args=arguments, daemon=True)
            _start(process)
            there.close()
            busy[here] = (process, None)
            _hand_out(here, queue, busy)
        while busy:
            for pipe in wait(list(busy)):
                _listen(pipe, queue, busy, failures, bar)
    finally:
        for process, _ in busy.values():
            process.kill()
    if failures:
        raise RuntimeError(_failure_message(failures))


def _start(process: Any) -> None:
    """Starts a worker deaf to Ctrl-C from its first moment; that is the parent's to handle."""
    if threading.current_thread() is not threading.main_thread():
        process.start()
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)


def _hand_out(pipe, queue: list, busy: dict) -> None:
    process, _ = busy[pipe]
    trial = queue.pop(0) if queue else None
    pipe.send(trial)
    if trial is None:
        process.join()
        del busy[pipe]
    else:
        busy[pipe] = (process, trial)


def _listen(pipe: Any, queue: list, busy: dict, failures: list, bar: _Bar) -> None:
    process, trial = busy[pipe]
    try:
        kind, *content = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        failures.append((trial, f"its process ended with exit code {process.exitcode}", ""))
        del busy[pipe]
        return
    if kind == "progress":
        bar.add(trial, *content)
        return
    if kind == "system":
        raise OSError(*content)
    if kind == "failed":
        failures.append((trial, *content))
    else:
        bar.finish(trial)
    _hand_out(pipe, queue, busy)


def _failure_message(failures: list) -> str:
    trial, reason, trace = failures[0]
    return f"{trace}{len(failures)} trial(s) failed; the first, {trial}: {reason}"


def _work(pipe: Connection, number: int, workers: int, run_trial, ledger, keep_checkpoints) -> None:
    """A worker process: takes trials until it is handed None or its parent is gone."""
    _take_share_of_cores(number, workers)

    def progress(amount: float, note: str) -> None:
        try:
            pipe.send(("progress", amount, note))
        except OSError:  # the parent is gone; what is checkpointed stays
            os._exit(1)

    while True:
        try:
            trial = pipe.recv()
        except EOFError:
            os._exit(1)
        if trial is None:
            return
        try:
            with ledger.claim(trial) as scratch:
                _run_one(trial, run_trial, ledger, scratch, keep_checkpoints, progress)
            pipe.send(("done",))
        except OSError as error:
            pipe.send(
                ("system", error.errno, error.strerror, str(error.filename or ledger.workdir))
            )
        except Exception as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}", traceback.format_exc()))


def _take_share_of_cores(number: int, workers: int) -> None:
    """Pins a worker to its own cores, as many as every other has, before JAX sizes its threads by them."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= workers:
        os.sched_setaffinity(0, cores[number::workers][: len(cores) // workers])
