"""Preemption: on SIGTERM, a run saves a checkpoint and exits with a status that asks for a restart."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

RESTART = 75  # the exit status "a temporary failure, try again" (EX_TEMPFAIL)


class Preempted(RuntimeError):
    """A run received SIGTERM and saved its state."""

    def __init__(self, step: int):
        super().__init__(
            f"stopped by SIGTERM; saved at step {step}, the same command goes on from there"
        )


def end_to_restart() -> None:
    """Makes SIGTERM end this process with status `RESTART`, except inside `preemption_requested`.

    Call it in the main thread, and only for runs that write each file atomically.
    """

    def end(*_: Any) -> None:
        # No exception, which a library might take for its own, and no stream, which it may be within.
        os.write(2, b"error: stopped by SIGTERM; the same command goes on from what is saved\n")
        os._exit(RESTART)

    signal.signal(signal.SIGTERM, end)


@contextlib.contextmanager
def preemption_requested() -> Iterator[Callable[[int], bool]]:
    """Defers SIGTERM, and yields a function that returns whether one has arrived.

    Call that function with each step.  Any of several processes may receive the signal; all of them get the
    same answer, at a step that none has reached yet.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    arrived, reported = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return

    def requested(step: int) -> bool:
        if arrived.is_set():
            reported.set()
        return arrived.is_set()

    before: Any = signal.signal(signal.SIGTERM, lambda *_: arrived.set())
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, before)
        if arrived.is_set() and not reported.is_set():  # nobody asked any more
            signal.raise_signal(signal.SIGTERM)
