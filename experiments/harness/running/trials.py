"""Trials: data in, one record each out; finished ones are skipped, started ones go on.

Where they run is a `Launch`: in this process, in several of this machine, in one of several jobs, or on a Ray
cluster (`harness.ray_launcher`).
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

from experiments.harness.running import files, memory, ray_launcher
from experiments.harness.running.checkpoints import Checkpoints, Spacing
from experiments.harness.running.ledgers import Ledger, trial_id
from experiments.harness.running.ray_launcher import Ray


@dataclasses.dataclass(frozen=True)
class Context:
    """What a running trial may use of its surroundings.

    Attributes:
        scratch: a folder of its own, kept until its record is written.
        progress: called with (work done since the last call, a few words on how it goes).
        keeps_checkpoints: whether the folder stays, and with it the state that each run ends in.
        seconds_between_saves: of a run, at least; each save loses memory, as `Spacing` says.
    """

    scratch: Path
    progress: Callable[[float, str], None]
    keeps_checkpoints: bool = False
    seconds_between_saves: float = 300.0
    _spacings: dict[str, Spacing] = dataclasses.field(default_factory=dict, compare=False)

    def checkpoints(self, name: str) -> Checkpoints:
        """Where one of the trial's runs is saved: steps apart, and `seconds_between_saves`."""
        spacing = Spacing(self.seconds_between_saves, self.keeps_checkpoints)
        spacing = self._spacings.setdefault(name, spacing)
        return Checkpoints(self.scratch / name, spacing=spacing)

    def remember(self, name: str, compute: Callable[[], dict]) -> dict:
        """compute(), or what it gave before the trial was interrupted."""
        path = self.scratch / f"{name}.json"
        value = files.read_json(path)
        if value is None:
            value = compute()
            files.write_json(path, value)
        return value


RunTrial = Callable[[Any, Context], dict]

_SECONDS_BETWEEN_TRIMS = 30.0


@dataclasses.dataclass(frozen=True)
class Launch:
    """Where a study's trials run.

    Attributes:
        workers: processes on this machine; the config's number where not given.
        shard: (i, n) runs every n-th trial from the i-th, as one of n jobs; reports cover what is finished.
        keep_checkpoints: whether scratch folders stay after their record is written.
        ray: the cluster that takes the place of workers, if any.
    """

    workers: int | None = None
    shard: tuple[int, int] = (0, 1)
    keep_checkpoints: bool = False
    ray: Ray | None = None


HERE = Launch()


def run(
    trials: Sequence[Any],
    run_trial: RunTrial,
    ledger: Ledger,
    *,
    cost: Callable[[Any], float],
    kind: Callable[[Any], Any],
    launch: Launch = HERE,
    workers: int = 1,
) -> list[dict]:
    """Runs the trials that have no record yet, kind by kind, the costly ones first.

    Args:
        trials: distinct trials.
        run_trial: a module's function; from (trial, context) to the record's results.
        ledger: where records lie.
        cost: work of a trial, in any unit; a trial's progress should add up to it.
        kind: a module's function; trials of which it gives the same run the same compiled programs, which are
            dropped, with all else that JAX has cached, when this process comes to another kind; of several
            processes each runs trials of one kind.
        launch: where they run.
        workers: processes on this machine where `launch` names no number; each has its share of the cores.

    Returns:
        The records of all trials that have one, in the order of the trials.

    Raises:
        ValueError: a negative number of workers, or a cluster that is not there.
        RuntimeError: trials failed in processes or on a cluster; the others are finished and recorded.  In
            this process the first that fails ends the run with its own error.
        OSError: a record could not be written.
    """
    workers = worker_count(launch.workers, workers)
    index, count = launch.shard
    mine = sorted(trials, key=trial_id)[index::count]
    pending = _in_order([t for t in mine if ledger.read(t) is None], cost, kind)
    one = functools.partial(_run_one, run_trial, kind, ledger, launch.keep_checkpoints)
    with _Bar(mine, pending, cost) as bar:
        if launch.ray is not None:
            quiet = functools.partial(_run_quietly, one)
            failures = ray_launcher.run(pending, quiet, ledger, launch.ray, bar.finish)
            if failures:
                raise RuntimeError(_failure_message(failures))
        elif workers == 1:
            for trial in pending:
                with ledger.claim(trial) as scratch:
                    one(trial, scratch, functools.partial(bar.add, trial))
                bar.finish(trial)
        else:
            _run_in_processes(pending, one, kind, ledger, workers, bar)
    return [record for trial in trials if (record := ledger.read(trial)) is not None]


def _in_order(
    trials: Sequence[Any], cost: Callable[[Any], float], kind: Callable[[Any], Any]
) -> list[Any]:
    """The kind of the costliest trial first; within a kind, the costly ones."""
    most: dict[Any, float] = {}
    for trial in trials:
        most[kind(trial)] = max(most.get(kind(trial), 0.0), cost(trial))
    return sorted(trials, key=lambda t: (-most[kind(t)], repr(kind(t)), -cost(t), trial_id(t)))


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


def _run_one(run_trial, kind, ledger, keep_checkpoints, trial, scratch, progress) -> None:
    """Runs a trial in its scratch folder and writes its record, unless another process has."""
    if ledger.read(trial) is None:  # another process may have finished it meanwhile
        memory.make_room(kind(trial))

        def trimmed(amount: float, note: str) -> None:
            memory.trim(at_most_every=_SECONDS_BETWEEN_TRIMS)
            progress(amount, note)

        start = time.monotonic()
        results = run_trial(trial, Context(scratch, trimmed, keep_checkpoints))
        ledger.write(trial, results, time.monotonic() - start)
    if not keep_checkpoints:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_quietly(one: Callable[..., None], trial: Any, scratch: Path) -> None:
    """A trial of a machine elsewhere, of whose progress nobody hears."""
    one(trial, scratch, lambda amount, note: None)


def _run_in_processes(pending, one, kind, ledger, workers, bar) -> None:
    """The parent hands out trials one by one over pipes; a lost worker costs its own trial only.

    A process takes trials of one kind, and another one those of the next: what a kind's compiler and programs
    leave behind, of which 20 to 70 MB are not given back, goes with it.
    """
    context = multiprocessing.get_context("spawn")
    queue, busy, failures = list(pending), {}, []

    # A worker's share of the cores is the same however few trials are left: on some versions of XLA the
    # number of threads changes the last bits of a sum.
    def begin(number: int) -> None:
        here, there = context.Pipe()
        process = context.Process(
            target=_work, args=(there, number, workers, one, ledger), daemon=True
        )
        _start(process)
        there.close()
        busy[here] = _Busy(process, number, queue.pop(0))
        _send(here, busy[here])

    try:
        for number in range(min(workers, len(pending))):
            begin(number)
        while busy:
            for pipe in wait(list(busy)):
                gone = _listen(pipe, kind, queue, busy, failures, bar)
                if gone is not None and queue:
                    begin(gone)
    finally:
        for worker in busy.values():
            worker.process.kill()
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


@dataclasses.dataclass
class _Busy:
    """A worker, its number among them, and the trial that it was handed last."""

    process: Any
    number: int
    trial: Any = None


def _hand_out(pipe, kind, queue: list, busy: dict) -> int | None:
    """The next trial, where it is of this worker's kind; else ends the worker, and returns its number."""
    worker = busy[pipe]
    is_of_its_kind = queue and kind(queue[0]) == kind(worker.trial)
    worker.trial = queue.pop(0) if is_of_its_kind else None
    _send(pipe, worker)
    if worker.trial is not None:
        return None
    worker.process.join()
    del busy[pipe]
    return worker.number


def _send(pipe: Any, worker: _Busy) -> None:
    with contextlib.suppress(OSError):  # it is gone: `_listen` hears that next
        pipe.send(worker.trial)


def _listen(pipe: Any, kind, queue: list, busy: dict, failures: list, bar: _Bar) -> int | None:
    """Hears one word of a worker; returns its number where it has gone, with its kind or before."""
    worker = busy[pipe]
    process, trial = worker.process, worker.trial
    try:
        word, *content = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        if trial is not None:
            failures.append((trial, f"its process ended with exit code {process.exitcode}", ""))
        del busy[pipe]
        return worker.number
    if word == "progress":
        bar.add(trial, *content)
        return None
    if word == "system":
        raise OSError(*content)
    if word == "failed":
        failures.append((trial, *content))
    else:
        bar.finish(trial)
    return _hand_out(pipe, kind, queue, busy)


def _failure_message(failures: list) -> str:
    """Of (trial, reason, trace) of each that failed."""
    trial, reason, trace = failures[0]
    return f"{trace}{len(failures)} trial(s) failed; the first, {trial}: {reason}"


def _work(pipe: Connection, number: int, workers: int, one, ledger: Ledger) -> None:
    """A worker process: takes trials until it is handed None or its parent is gone."""
    _take_share_of_cores(number, workers)
    threading.Thread(target=_end_with_parent, daemon=True).start()

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
                one(trial, scratch, progress)
            pipe.send(("done",))
        except OSError as error:
            pipe.send(
                ("system", error.errno, error.strerror, str(error.filename or ledger.workdir))
            )
        except Exception as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}", traceback.format_exc()))


def _end_with_parent() -> None:
    """Ends this process at once when its parent does, whatever it is at: compiling, or waiting for a lock.

    What is checkpointed stays; a worker that outlived its parent would keep trials from the next run.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _take_share_of_cores(number: int, workers: int) -> None:
    """Pins a worker to its own cores, as many as every other has, before JAX sizes its threads by them."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= workers:
        os.sched_setaffinity(0, cores[number::workers][: len(cores) // workers])
