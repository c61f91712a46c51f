"""A workdir's files, on this machine or, by ``gs://`` and the like, on shared storage."""

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from etils import epath

from jaxquant.artifacts import files as regular
from jaxquant.artifacts.files import is_remote


def at(path: str | os.PathLike) -> Any:
    """Returns a path as of pathlib, here or on shared storage."""
    return epath.Path(path) if is_remote(path) else Path(path)


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file atomically: a reader, or a crash, meets the old content or the new, never a part.

    Raises:
        OSError: as the system says (no space, no permission); the old content is then untouched.
    """
    regular.write(at(path), content)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whose floats read back as the same numbers; NaN and Inf raise a ValueError."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any | None:
    """Returns the value of a JSON file; None if it does not exist, or is damaged (it is then moved away).

    Raises:
        ValueError: something else than a file is there, or one that cannot be read.
    """
    path = at(path)
    try:
        content = regular.read_bytes(path, regular.JSON)
    except regular.Missing:
        return None
    try:
        return regular.parse_json(content, "it")
    except ValueError as error:
        quarantine(path, str(error))
        return None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a folder; the system lets go of it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_lock(folder / ".lock")
    except OSError as error:
        raise ValueError(f"workdir '{folder}' cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(
                f"workdir '{folder}' is in use by process {lock.read().strip() or '?'}; wait for it, or "
                "choose another --workdir"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def open_lock(path: Path) -> IO[str]:
    """Returns a file to lock, made where there is none; nothing waits for the other end of a pipe.

    Raises:
        OSError: as the system says.
        ValueError: something else than a file is there.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        regular.check_regular(path)
    except ValueError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "r+")


def quarantine(path: Path, reason: str) -> None:
    """Moves a file that must not be used into ``set-aside`` beside it, with a warning."""
    target = path.parent / "set-aside" / f"{path.name}.{time.time_ns()}"
    target.parent.mkdir(exist_ok=True)
    try:
        path.rename(target)
    except FileNotFoundError:  # another process has done so
        return
    logging.getLogger(__name__).warning(
        "%s is unusable (%s); set aside as %s", path, reason, target
    )
