"""A limit to how long the input may keep a run waiting, and a count of how long it did."""

import queue
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

_LIBRARY = Path(threading.__file__).parent
_STANDARD = tuple(
    str(_LIBRARY / part) for part in ("threading.py", "queue.py", "concurrent", "selectors.py")
)


class Hung(RuntimeError):
    """The input pipeline gave no batch in time. Threads of it may never end: leave without joining them."""


class Watched:
    """Batches, of which none may take longer than a limit.

    Attributes:
        seconds: waited for batches so far.
    """

    def __init__(self, batches: Any, limit: float):
        """Watches an iterator.

        Args:
            batches: with `get_state` and `set_state`.
            limit: seconds for one batch; 0 for none.

        Raises:
            ValueError: a limit below 0.
        """
        if not limit >= 0:
            raise ValueError(f"an input's limit is a number of seconds from 0; got {limit}")
        self.seconds = 0.0
        self._batches, self._limit = batches, limit
        self._asked, self._given = queue.SimpleQueue(), queue.SimpleQueue()
        self._reader: threading.Thread | None = None

    def __iter__(self):
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        try:
            return self._read() if self._limit else next(self._batches)
        finally:
            self.seconds += time.perf_counter() - start

    def get_state(self) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)

    def _read(self) -> Any:
        if self._reader is None:
            self._reader = threading.Thread(target=self._serve, daemon=True)
            self._reader.start()
        self._asked.put(None)
        try:
            batch, error = self._given.get(timeout=self._limit)
        except queue.Empty:
            raise Hung(
                f"the input pipeline gave no batch within {self._limit:g} s (it is {self._place()}); the "
                "same command goes on from the last checkpoint, --input_timeout=0 waits for ever"
            ) from None
        if error is not None:
            raise error
        return batch

    def _serve(self) -> None:
        while True:
            self._asked.get()
            try:
                self._given.put((next(self._batches), None))
            except BaseException as error:  # whoever asked gets it
                self._given.put((None, error))

    def _place(self) -> str:
        """Returns the reader's position."""
        frames = sys._current_frames()
        frame = frames.get(self._reader.ident or 0) if self._reader else None
        if frame is None:
            return "no longer there"
        stack = traceback.extract_stack(frame)
        own = [f for f in stack if not f.filename.startswith(_STANDARD)]  # not where locks wait
        found = (own or stack)[-1]
        return f"in {found.name}, {Path(found.filename).name} line {found.lineno}"
