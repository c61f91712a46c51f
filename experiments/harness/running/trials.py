"""Run trials: each returns one record.  Finished trials are skipped, and interrupted ones resume.

A `Launch` says where they run: in this process, in several processes of this machine, in one of several jobs,
or on a Ray cluster (`harness.ray_launcher`).
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

from experiments.harness.running import files, memory, ray_launcher, stopping
from experiments.harness.running.checkpoints import Checkpoints, Spacing
from experiments.harness.running.ray_launcher import Ray
from experiments.harness.running.record_store import RecordStore, trial_id


@dataclasses.dataclass(frozen=True)
class Context:
    """The resources of a running trial.

    Attributes:
        scratch: the trial's folder, kept until its record is written.
        progress: called with (work done since the last call, a short status).
        keeps_checkpoints: whether the folder is kept, with the final state of each run.
        seconds_between_saves: at least, for each run; each save leaks memory (see `Spacing`).
    """

    scratch: Path
    progress: Callable[[float, str], None]
    keeps_checkpoints: bool = False
    seconds_between_saves: float = 300.0
    _spacings: dict[str, Spacing] = dataclasses.field(default_factory=dict, compare=False)

    def checkpoints(self, name: str) -> Checkpoints:
        """Opens the checkpoints of one of the trial's runs, `seconds_between_saves` apart."""
        spacing = Spacing(self.seconds_between_saves, self.keeps_checkpoints)
        spacing = self._spacings.setdefault(name, spacing)
        return Checkpoints(self.scratch / name, spacing=spacing)

    def cached(self, name: str, compute: Callable[[], dict]) -> dict:
        """Returns compute(), or its saved result from before the trial was interrupted."""
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
    """Where to run a study's trials.

    Attributes:
        workers: processes on this machine; None uses the config's number.
        shard: (i, n) runs every n-th trial from the i-th, as one of n jobs; reports cover finished trials.
        keep_checkpoints: whether scratch folders are kept after their record is written.
        ray: the cluster to use instead of workers, if any.
    """

    workers: int | None = None
    shard: tuple[int, int] = (0, 1)
    keep_checkpoints: bool = False
    ray: Ray | None = None


HERE = Launch()


def run(
    trials: Sequence[Any],
    run_trial: RunTrial,
    store: RecordStore,
    *,
    cost: Callable[[Any], float],
    compile_key: Callable[[Any], Any],
    launch: Launch = HERE,
    workers: int = 1,
) -> list[dict]:
    """Runs the trials that have no record yet, grouped by compile key, the most expensive first.

    Args:
        trials: distinct trials.
        run_trial: a module-level function from (trial, context) to the record's results.
        store: the records.
        cost: work of a trial, in any unit; the trial's progress should sum to it.
        compile_key: a module-level function of a trial.  Trials with equal keys run the same compiled
            programs.  A process clears JAX's caches when the key changes; a worker process runs trials of
            one key only.
        launch: where they run.
        workers: processes on this machine if `launch` gives no number; the cores are divided among them.

    Returns:
        The records of all finished trials, in the order of the trials.

    Raises:
        ValueError: the number of workers is negative, or no cluster answers.
        RuntimeError: trials failed in worker processes or on a cluster; all others were run and recorded.
            In this process the first failure raises its own error.
        OSError: a record could not be written.
    """
    workers = worker_count(launch.workers, workers)
    index, count = launch.shard
    mine = sorted(trials, key=trial_id)[index::count]
    pending = _in_order([t for t in mine if store.read(t) is None], cost, compile_key)
    one = functools.partial(_run_one, run_trial, compile_key, store, launch.keep_checkpoints)
    with _Bar(mine, pending, cost) as bar:
        if launch.ray is not None:
            quiet = functools.partial(_run_quietly, one)
            failures = ray_launcher.run(pending, quiet, store, launch.ray, bar.finish)
            if failures:
                raise RuntimeError(_failure_message(failures))
        elif workers == 1:
            _run_here(pending, one, store, bar)
        else:
            _run_in_processes(pending, one, compile_key, store, workers, bar)
    return [record for trial in trials if (record := store.read(trial)) is not None]


def _in_order(
    trials: Sequence[Any], cost: Callable[[Any], float], compile_key: Callable[[Any], Any]
) -> list[Any]:
    """Sorts by compile key, the key of the most expensive trial first; then by decreasing cost."""
    most: dict[Any, float] = {}
    for trial in trials:
        most[compile_key(trial)] = max(most.get(compile_key(trial), 0.0), cost(trial))
    return sorted(
        trials, key=lambda t: (-most[compile_key(t)], repr(compile_key(t)), -cost(t), trial_id(t))
    )


def worker_count(asked: int | None, configured: int) -> int:
    """Returns how many processes to run: `asked`, else `configured`; 0 means one per core on a CPU.

    Raises:
        ValueError: the number is negative.
    """
    count = configured if asked is None else asked
    if count < 0:
        raise ValueError(f"workers must be at least 1, or 0 for one per core; got {count}")
    if count or jax.default_backend() != "cpu":
        return count or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Bar:
    """The progress bar of the whole study."""

    def __init__(self, trials: Sequence[Any], pending: Sequence[Any], cost: Callable[[Any], float]):
        self._cost, self._note = cost, "starting" if pending else "nothing left to run"
        self._trials, self._finished = len(trials), len(trials) - len(pending)
        total = sum(map(cost, trials))
        self._done = total - sum(map(cost, pending))
        self._running: dict[Any, float] = {}
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
        so_far = self._running.get(trial, 0.0) + amount
        self._running[trial] = min(so_far, self._cost(trial))
        self._show()

    def finish(self, trial: Any) -> None:
        self._finished += 1
        self._done += self._cost(trial)
        self._running.pop(trial, None)
        self._show(refresh=True)

    def _show(self, refresh: bool = False) -> None:
        self._bar.set_description_str(
            f"{self._finished} of {self._trials} trials done, {self._note}", refresh=False
        )
        self._bar.update(self._done + sum(self._running.values()) - self._bar.n)
        if refresh:
            self._bar.refresh()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()


def _run_one(run_trial, compile_key, store, keep_checkpoints, trial, scratch, progress) -> None:
    """Runs a trial in its scratch folder and write its record, unless another process has."""
    if store.read(trial) is None:  # another process may have finished it meanwhile
        memory.clear_compiled(compile_key(trial))

        def trim_and_report(amount: float, note: str) -> None:
            memory.trim(at_most_every=_SECONDS_BETWEEN_TRIMS)
            progress(amount, note)

        start = time.monotonic()
        results = run_trial(trial, Context(scratch, trim_and_report, keep_checkpoints))
        store.write(trial, results, time.monotonic() - start)
    if not keep_checkpoints:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_quietly(one: Callable[..., None], trial: Any, scratch: Path) -> None:
    """Runs a trial on another machine, without progress."""
    one(trial, scratch, lambda amount, note: None)


def _run_here(pending, one, store, bar) -> None:
    """Runs the trials one after another in this process; one that fails costs itself alone."""
    failures = []
    for trial in pending:
        try:
            with store.lock(trial) as scratch:
                one(trial, scratch, functools.partial(bar.add, trial))
        except (OSError, stopping.Preempted):
            raise
        except Exception as error:
            failures.append((trial, f"{type(error).__name__}: {error}", traceback.format_exc()))
        else:
            bar.finish(trial)
    if failures:
        raise RuntimeError(_failure_message(failures))


def _run_in_processes(pending, one, compile_key, store, workers, bar) -> None:
    """Sends trials one by one to worker processes over pipes; a lost worker loses only its own trial.

    A process runs trials of one compile key.  Compiling and running them leaks 20 to 70 MB, which the system
    gets back when the process ends.
    """
    context = multiprocessing.get_context("spawn")
    queue, busy, failures = list(pending), {}, []

    # A worker's share of the cores does not depend on how many trials are left: on some versions of XLA
    # the number of threads changes the last bits of a sum.
    def begin(number: int) -> None:
        here, there = context.Pipe()
        process = context.Process(
            target=_work, args=(there, number, workers, one, store), daemon=True
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
                ended = _listen(pipe, compile_key, queue, busy, failures, bar)
                if ended is not None and queue:
                    begin(ended)
    finally:
        for worker in busy.values():
            worker.process.kill()
    if failures:
        raise RuntimeError(_failure_message(failures))


def _start(process: Any) -> None:
    """Starts a worker that ignores Ctrl-C from the start; the parent handles it."""
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
    """A worker process, its number, and its current trial."""

    process: Any
    number: int
    trial: Any = None


def _hand_out(pipe, compile_key, queue: list, busy: dict) -> int | None:
    """Sends the next trial if it has this worker's key; otherwise end the worker and return its number."""
    worker = busy[pipe]
    has_same_key = queue and compile_key(queue[0]) == compile_key(worker.trial)
    worker.trial = queue.pop(0) if has_same_key else None
    _send(pipe, worker)
    if worker.trial is not None:
        return None
    worker.process.join()
    del busy[pipe]
    return worker.number


def _send(pipe: Any, worker: _Busy) -> None:
    with contextlib.suppress(OSError):  # the worker has ended; `_listen` sees that next
        pipe.send(worker.trial)


def _listen(
    pipe: Any, compile_key, queue: list, busy: dict, failures: list, bar: _Bar
) -> int | None:
    """Handles one message of a worker; return the worker's number if it has ended, else None."""
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
    return _hand_out(pipe, compile_key, queue, busy)


def _failure_message(failures: list) -> str:
    """Returns the error message for a list of (trial, reason, trace)."""
    trial, reason, trace = failures[0]
    return f"{trace}{len(failures)} trial(s) failed; the first, {trial}: {reason}"


def _work(pipe: Connection, number: int, workers: int, one, store: RecordStore) -> None:
    """Runs a worker process: take trials until None arrives or the parent ends."""
    _take_share_of_cores(number, workers)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def progress(amount: float, note: str) -> None:
        try:
            pipe.send(("progress", amount, note))
        except OSError:  # the parent has ended; checkpoints are kept
            os._exit(1)

    while True:
        try:
            trial = pipe.recv()
        except EOFError:
            os._exit(1)
        if trial is None:
            return
        try:
            with store.lock(trial) as scratch:
                one(trial, scratch, progress)
            pipe.send(("done",))
        except OSError as error:
            pipe.send(("system", error.errno, error.strerror, str(error.filename or store.workdir)))
        except Exception as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}", traceback.format_exc()))


def _end_with_parent() -> None:
    """Ends this process as soon as its parent ends, even while it compiles or waits for a lock.

    Checkpoints are kept.  A worker that outlived its parent would hold the locks that the next run needs.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _take_share_of_cores(number: int, workers: int) -> None:
    """Pins a worker to an equal share of the cores, before JAX sizes its thread pool."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= workers:
        os.sched_setaffinity(0, cores[number::workers][: len(cores) // workers])
