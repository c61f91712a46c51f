"""Files: regular ones alone are read, up to a sensible size; they are written whole or not at all.

What cannot be read is a ValueError of one line that names the file, what was found and what would be right,
whether it is missing, a folder, a pipe, a device, too large, or not JSON.  What cannot be written is an
OSError that names it, and nothing of it stays.  Paths are those of pathlib, or of ``etils.epath`` on storage
that is no file system (``gs://`` and the like), whose own errors are left as they are.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import stat
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

JSON = 2**26  # bytes of a JSON file, at most; lists of nothing take 30 times as many in memory
LARGEST = 2**36  # of a file that is held in memory, at most
DEPTH = 100  # of lists and objects of JSON within each other, at most

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# Opening a pipe waits for who writes to it, but so.
_FLAGS = sum(getattr(os, f"O_{name}", 0) for name in ("NONBLOCK", "CLOEXEC", "BINARY"))
_CODE = re.compile(r"os[ _]error(?:_code)?\W+(\d+)")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp(/|$)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Missing(ValueError):
    """No file is there."""


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is on storage that is no file system.

    >>> is_remote("gs://bucket/study"), is_remote("runs/study")
    (True, False)
    """
    return "://" in os.fspath(path)


# ---------------------------------------------------------------------------------------------------
# Reading


@contextlib.contextmanager
def open_regular(
    path: Any, most: int | None = LARGEST, name: str | None = None
) -> Iterator[BinaryIO]:
    """Opens a regular file for reading; a pipe is refused instead of blocking.

    Args:
        path: of the file.
        most: bytes that it may have; None for any number, where it is read piece by piece.
        name: what it is called in messages; its path where not given.

    Raises:
        ValueError: it is no regular file, too large, or the system refuses to read it.
        Missing: nothing is there.
    """
    name = str(path) if name is None else name
    if is_remote(path):
        with _report_unreadable(name), path.open("rb") as file:
            yield file
        return
    with _report_unreadable(name):
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
        try:
            _check(os.fstat(descriptor), most, name)
        except ValueError:
            os.close(descriptor)
            raise
        with os.fdopen(descriptor, "rb") as file:
            yield file


def read_bytes(path: Any, most: int = LARGEST, name: str | None = None) -> bytes:
    """Returns a regular file's content.

    Raises:
        ValueError: as of `open_regular`.

    >>> read_bytes("/dev/zero")
    Traceback (most recent call last):
    ValueError: /dev/zero cannot be read: it is a device; it must be a regular file
    """
    name = str(path) if name is None else name
    with open_regular(path, most, name) as file:
        # One byte more tells of one that grows, as some of the system's own do without an end.
        limit = most if is_remote(path) else os.fstat(file.fileno()).st_size
        content = file.read(limit + 1)
    if content is None or len(content) > limit:
        raise ValueError(f"{name} is longer than {limit:,} bytes, which is all that is read of it")
    return content


def check_regular(path: Any, most: int | None = None, name: str | None = None) -> int:
    """Returns the size in bytes of a regular file that a library will open by its path.

    Raises:
        ValueError: as of `open_regular`.
    """
    with open_regular(path, most, name) as file:
        return os.fstat(file.fileno()).st_size


def check_stored(archive: zipfile.ZipFile) -> None:
    """Raises a ValueError where something in an archive takes more bytes than it has there."""
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{entry.filename} is compressed, and nothing there should be")


def sha256(path: Any) -> str:
    """Returns the SHA-256 of a regular file of any size.

    Raises:
        ValueError: as of `open_regular`.
    """
    digest = hashlib.sha256()
    with open_regular(path, None) as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: Any, most: int = JSON, name: str | None = None) -> Any:
    """Returns the value of a JSON file.

    Raises:
        ValueError: as `open_regular`; or the JSON is invalid, nests deeper than 100 levels, or repeats a key.
    """
    name = str(path) if name is None else name
    return parse_json(read_bytes(path, most, name), name)


def parse_json(text: str | bytes, name: str) -> Any:
    """Returns the value of JSON.

    Args:
        text: of it.
        name: what it is called in messages.

    Raises:
        ValueError: it is not whole JSON, nests deeper than 100 levels, or has a key twice.

    >>> parse_json('{"a": 1, "a": 2}', "the card")
    Traceback (most recent call last):
    ValueError: the card is not whole JSON: the key 'a' stands there twice
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        _check_depth(value)
    except (RecursionError, ValueError, TypeError) as error:
        # How deep a parser goes before it gives up differs from one Python to the next.
        if isinstance(error, RecursionError) or _nesting_depth(text) > DEPTH:
            error = f"it nests deeper than {DEPTH} levels"
        raise ValueError(f"{name} is not whole JSON: {error}") from None
    return value


def _nesting_depth(text: str | bytes) -> int:
    """Returns the largest number of open brackets in a text."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    brackets = re.sub(r'"(?:[^"\\]|\\.)*"|[^\[\]{}"]+', "", text)
    depths = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets)
    return max(depths, default=0)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} stands there twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        values = (x.values() if isinstance(x, dict) else x for x in level)
        level = [y for x in values for y in x if isinstance(y, dict | list)]
        if not level:
            return
    raise RecursionError


@contextlib.contextmanager
def _report_unreadable(name: str) -> Iterator[None]:
    """Names the file in errors of the system."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Missing(f"{name} cannot be read: {error.strerror or error}") from None
    except OSError as error:
        if error.errno is None:  # a library's, of what it found in the file
            raise
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None


def _check(found: os.stat_result, most: int | None, name: str) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(
            f"{name} cannot be read: it is {_KINDS.get(kind, 'no file')}; it must be a regular file"
        )
    if most is not None and found.st_size > most:
        raise ValueError(f"{name} has {found.st_size:,} bytes; at most {most:,} are read")


# ---------------------------------------------------------------------------------------------------
# Writing


def write(path: Any, content: str | bytes) -> None:
    """Writes a file atomically: a reader, or a crash, meets the old content or the new, never a part.

    Any number of processes on any number of machines may write to one folder: what they write first has a
    name that no other takes.

    Raises:
        OSError: as the system says (no space, no permission); the old content is then untouched.
    """
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)  # objects appear whole
        return
    with replacing(Path(path)) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """`write` of what is written piece by piece, to the file that this gives.

    Raises:
        OSError: as of `write`.
    """
    temporary = beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """Returns a name in the same folder that nothing has: for what takes its place when it is whole."""
    return path.with_name(f".{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def writing(path: Any) -> Iterator[None]:
    """Trouble in writing as an OSError with the path, whichever library met it.

    One that names another file than what takes the path's place keeps that name.
    """
    try:
        yield
    except OSError as error:
        is_named = error.filename is not None and not _TEMPORARY.search(str(error.filename))
        if error.errno is None or is_named:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        code = _system_code(str(error))
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def _system_code(text: str) -> int | None:
    """Returns the system's code, which libraries have somewhere in their messages."""
    if match := _CODE.search(text):
        return int(match[1])
    return next((code for code in _FULL if os.strerror(code) in text), None)
