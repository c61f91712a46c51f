"""Checksums of files: of each in a folder, and of a record that says so and holds its own.

They find damage.  They are no signatures: whoever may write to a folder may write others.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jaxquant.artifacts import files


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns size in bytes and SHA-256 of every file in a folder, by its path there.

    Raises:
        ValueError: something else lies there than folders and files, or a link that leads out of it.
    """
    check_links(folder)
    found = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": files.check_regular(path),
            "sha256": files.sha256(path),
        }
        for path in found
    }


def check_digests(folder: Path, listed: Any, needed: tuple[str, ...] = ()) -> None:
    """Raises a ValueError where a file is not as it was when `digests` was taken.

    Args:
        folder: where the files are; none that lies elsewhere is looked at, whatever its name says.
        listed: what `digests` gave.
        needed: files, or folders with files, that must be among them.
    """
    entries = listed.values() if isinstance(listed, Mapping) else [None]
    if not all(isinstance(e, dict) and set(e) == {"bytes", "sha256"} for e in entries):
        raise ValueError(f"{folder} does not say which files it has; got {str(listed)[:200]}")
    for name in needed:
        if not any(file == name or file.startswith(f"{name}/") for file in listed):
            raise ValueError(f"{folder} does not list its file {name}")
    for name, wanted in listed.items():
        path = _inside(folder, name)
        try:
            size = files.check_regular(path)
        except files.Missing:
            raise ValueError(f"{path} is missing") from None
        if size != wanted["bytes"]:
            raise ValueError(f"{path} has {size:,} bytes; {wanted['bytes']!r} were written")
        if files.sha256(path) != wanted["sha256"]:
            raise ValueError(f"{path} is damaged: its SHA-256 is not that of what was written")


def _inside(folder: Path, name: str) -> Path:
    """Returns the path of a name in a folder.

    Raises:
        ValueError: the name, or a link by that name, leads out of the folder.
    """
    parts = PurePosixPath(name).parts
    if "\0" in name or not parts or "/".join(parts) != name or ".." in parts or parts[0] == "/":
        raise ValueError(f"{folder} lists {name!r}; what it lists are names of files within it")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link that leads out of {folder}")
    return path


def check_links(folder: Path) -> None:
    """Raises a ValueError for a link that leads out of a folder."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            _inside(folder, path.relative_to(folder).as_posix())


def with_checksum(kind: str, version: int, body: Mapping[str, Any]) -> str:
    """Returns JSON that says what it is, with its own SHA-256."""
    content = {"kind": kind, "version": version, **body}
    return json.dumps({**content, "sha256": _checksum(content)}, indent=1, allow_nan=False) + "\n"


def read_checked(path: Path, kind: str, *versions: int) -> dict[str, Any]:
    """Reads a file of `with_checksum`, in one of these versions.

    Raises:
        ValueError: no such file, or one of another kind or version, or one that was changed.
    """
    try:
        content = files.read_json(path)
    except files.Missing:
        raise ValueError(f"{path} is missing") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ValueError(f"{path} is not of a {kind}")
    version = content.get("version")
    if type(version) is not int or version not in versions:
        raise ValueError(f"{path} is of version {version}; this is version {max(versions)}")
    expected = content.pop("sha256", None)
    if expected != _checksum(content):
        raise ValueError(f"{path} is damaged: its SHA-256 is not that of what was written")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
