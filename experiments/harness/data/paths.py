"""The files that a path names: one, those in a folder, those that a glob finds."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from jaxquant.artifacts.files import Missing, check_regular, read_bytes


def files_at(path: str, *suffixes: str) -> list[Path]:
    """Returns the files, sorted.

    Args:
        path: of a file, a folder (with all below it) or a glob.
        suffixes: what their names end in, where it is a folder; any where not given.

    Raises:
        ValueError: none are there, or they cannot be looked for.

    >>> [file.name for file in files_at("setup.*")]
    ['setup.cfg']
    """
    target = Path(path)
    try:
        exists = target.exists()
    except OSError as error:
        raise ValueError(f"data path '{path[:60]}…' cannot be read: {error.strerror}") from None
    if exists and not target.is_dir():
        size(target)
        return [target]
    if exists:
        found = sorted(
            p for p in target.rglob("*") if p.is_file() and p.name.endswith(suffixes or "")
        )
    elif any(c in path for c in "*?["):
        root = Path(target.anchor)  # of a relative one, here
        found = sorted(p for p in root.glob(str(target.relative_to(root))) if p.is_file())
    else:
        found = [target]  # whoever reads it says that it is not there
    if not found:
        raise ValueError(f"no {' or '.join(suffixes) or 'text'} files at {path!r}")
    return found


def read(file: Path) -> bytes:
    """Returns a file's content, of which there is some.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    with _there(file):
        content = read_bytes(file, name=_name(file))
    _check_filled(file, len(content))
    return content


def size(file: Path) -> int:
    """Returns a file's bytes, for what reads it piece by piece.

    Raises:
        ValueError: it is none, is empty, or cannot be read.
    """
    with _there(file):
        found = check_regular(file, name=_name(file))
    _check_filled(file, found)
    return found


@contextlib.contextmanager
def _there(file: Path) -> Iterator[None]:
    try:
        yield
    except Missing:
        raise ValueError(f"{_name(file)} does not exist") from None


def _name(file: Path) -> str:
    return f"data file '{file}'"


def _check_filled(file: Path, found: int) -> None:
    if not found:
        raise ValueError(f"{_name(file)} is empty")
