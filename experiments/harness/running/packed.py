"""Finished records as one table: a line of JSON for each, with its time.

    records.jsonl      {"seconds": 12.3, "record": {…}}, in the order of the trials' ids
    records.jsonl.gz   the same, where it is larger than a megabyte

A workdir may hold a table, single files under ``trials/``, or both; whatever reads records reads either.
"""

import dataclasses
import gzip
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.harness.running import files
from jaxquant.artifacts.files import Missing, parse_json, read_bytes

_log = logging.getLogger(__name__)
_PLAIN, _ZIPPED = "records.jsonl", "records.jsonl.gz"
_LARGEST = 2**20  # bytes of a table that is not compressed


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        record: as its own file holds it, checksum included.
        seconds: how long the trial took; None where that is not known.
    """

    record: dict[str, Any]
    seconds: float | None


def checksum(record: dict[str, Any]) -> str:
    """Returns sixteen hexadecimal digits of the hash of a record without its checksum."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def is_whole(record: dict[str, Any]) -> bool:
    """Returns whether a record is what its checksum says."""
    content = {name: x for name, x in record.items() if name != "checksum"}
    return record.get("checksum") == checksum(content)


def version(workdir: str | os.PathLike) -> tuple:
    """Returns what changes when a workdir's table is written anew."""
    found = []
    for name in (_PLAIN, _ZIPPED):
        try:
            about: Any = (files.at(workdir) / name).stat()
        except OSError:
            continue
        # On shared storage these two have other names.
        is_local = hasattr(about, "st_size")
        size, modified = ("st_size", "st_mtime") if is_local else ("length", "mtime")
        found.append((name, getattr(about, size), getattr(about, modified)))
    return tuple(found)


def read(workdir: str | os.PathLike) -> dict[str, Row]:
    """Returns the rows of a workdir's table, by the trials' ids; none where there is no table.

    A line that is no record is left out with a warning, and so its trial is run again.

    Raises:
        ValueError: something else than a file is there, or what cannot be unpacked.
    """
    found = {}
    for name in (_PLAIN, _ZIPPED):
        path = files.at(workdir) / name
        try:
            content = read_bytes(path)
        except Missing:
            continue
        if name == _ZIPPED:
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError) as error:
                raise ValueError(f"{path} is no table of records: {error}") from None
        for number, line in enumerate(content.splitlines(), 1):
            row = _row(line, f"line {number} of {path}")
            if row is not None:
                found[row.record["id"]] = row
    return found


def _row(line: bytes, name: str) -> Row | None:
    try:
        held = parse_json(line, name)
        record, seconds = held["record"], held["seconds"]
        if isinstance(record["id"], str) and isinstance(seconds, int | float | None):
            return Row(record, seconds)
    except (ValueError, TypeError, KeyError):
        pass
    _log.warning("%s is left out: it is no record with its time", name)
    return None


def write(workdir: str | os.PathLike, rows: Iterable[Row]) -> Path:
    """Writes a workdir's table, in place of the one that is there."""
    ordered = sorted(rows, key=lambda row: row.record["id"])
    lines = [
        json.dumps({"seconds": row.seconds, "record": row.record}, allow_nan=False)
        for row in ordered
    ]
    content = "".join(f"{line}\n" for line in lines).encode()
    is_large = len(content) > _LARGEST
    names = (_ZIPPED, _PLAIN) if is_large else (_PLAIN, _ZIPPED)
    path, other = (files.at(workdir) / name for name in names)
    files.write(path, gzip.compress(content, mtime=0) if is_large else content)
    other.unlink(missing_ok=True)
    return path


def pack(workdir: str | os.PathLike) -> tuple[Path, int]:
    """Makes a workdir's records one table, and takes away the single files that are in it.

    Returns:
        The table, and how many records it has.

    Raises:
        ValueError: no whole record lies there.
    """
    folder = files.at(workdir)
    rows, single = read(workdir), list[Path]()
    for path in sorted(folder.glob("trials/*.json")):
        record = files.read_json(path)
        if not isinstance(record, dict) or record.get("id") != path.stem:
            continue
        if not is_whole(record):
            _log.warning("%s stays as it is: its content is not what was recorded", path)
            continue
        timing = files.read_json(folder / "timings" / path.name)
        seconds = timing.get("seconds") if isinstance(timing, dict) else None
        rows[path.stem] = Row(record, seconds)
        single += [path, folder / "timings" / path.name]
    if not rows:
        raise ValueError(f"'{workdir}' holds no records of a study: no trials/*.json lie there")
    table = write(workdir, rows.values())
    if {n: r.record for n, r in read(workdir).items()} != {n: r.record for n, r in rows.items()}:
        raise RuntimeError(f"{table} does not read back as it was written; the single files stay")
    for path in single:
        path.unlink(missing_ok=True)
    for name in ("trials", "timings"):
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()
    return table, len(rows)
