"""Files that are whole or not there, on this machine or, by ``gs://`` and the like, on shared storage."""

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath


def at(path: str | os.PathLike) -> Any:
    """A path as of pathlib, here or on shared storage."""
    return epath.Path(path) if is_remote(path) else Path(path)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is on storage that is no file system.

    >>> is_remote("gs://bucket/study"), is_remote("runs/study")
    (True, False)
    """
    return "://" in os.fspath(path)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: a reader, or a crash, meets the old content or the new, never a part.

    Raises:
        OSError: as the system says (no space, no permission); the old content is then untouched.
    """
    path = at(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return  # objects appear whole
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write` of JSON whose floats read back as the same numbers; NaN and Inf are refused."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any | None:
    """The value of a JSON file, or None where there is none; a damaged file is set aside with a warning."""
    path = at(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        set_aside(path, f"it is not whole JSON: {error}")
        return None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a folder; the system lets go of it when the process ends, however it ends.

    Raises:
        ValueError: another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115
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


def set_aside(path: Path, reason: str) -> None:
    """Moves a file that must not be used into ``set-aside`` beside it, with a warning."""
    target = path.parent / "set-aside" / f"{path.name}.{time.time_ns()}"
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    logging.getLogger(__name__).warning(
        "%s is unusable (%s); set aside as %s", path, reason, target
    )
