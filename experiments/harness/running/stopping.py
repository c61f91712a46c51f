"""Being told to stop: a preempted machine's SIGTERM, answered with a checkpoint and an exit status."""

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
    """A run was told to stop, and has saved where it was."""

    def __init__(self, step: int):
        super().__init__(
            f"stopped by SIGTERM; saved at step {step}, the same command goes on from there"
        )


def end_to_restart() -> None:
    """From here on SIGTERM ends this process with the status `RESTART`, but while `told_to_stop` is open.

    It is of the main thread, and of runs that write whole files or none.
    """

    def end(*_: Any) -> None:
        # No exception, which a library might take for its own, and no stream, which it may be within.
        os.write(2, b"error: stopped by SIGTERM; the same command goes on from what is saved\n")
        os._exit(RESTART)

    signal.signal(signal.SIGTERM, end)


@contextlib.contextmanager
def told_to_stop() -> Iterator[Callable[[int], bool]]:
    """While it is open, SIGTERM stops nothing: the function that it gives says whether one has come.

    It is called with each step.  With several processes, of which any may be told, it answers all of them
    alike, at a step that all have yet to reach.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came, heard = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return

    def asked(step: int) -> bool:
        if came.is_set():
            heard.set()
        return came.is_set()

    before: Any = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
        if came.is_set() and not heard.is_set():  # nobody asked any more
            signal.raise_signal(signal.SIGTERM)
