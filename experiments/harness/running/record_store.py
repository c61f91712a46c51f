"""A study's folder: one record for each finished trial, here or on storage that machines share.

A trial is a frozen dataclass.  Its id is the hash of its content, so the same trial has the same
record wherever it comes up.  A field that came later (`later`) is left out at its default, so that trials
that were there before it keep their ids.  A record holds only what follows from the trial, the code and the
machine (no times: those lie in ``timings/``), so that records can be compared byte for byte.  Records that
are kept may lie in one table (`experiments.harness.running.packed`), and are read from there.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.running import files, packed

_log = logging.getLogger(__name__)

SCHEMA = 2  # raised when the form of a record changes, or the arithmetic behind its numbers


def later(default: Any) -> Any:
    """Returns a trial's field that records which were made before it lack: those of its default.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Old:
    ...     bits: int
    >>> @dataclasses.dataclass(frozen=True)
    ... class New:
    ...     bits: int
    ...     solver: str = later("nearest")
    >>> trial_id(Old(4)) == trial_id(New(4)), trial_id(Old(4)) == trial_id(New(4, "gptq"))
    (True, False)
    """
    return dataclasses.field(default=default, metadata={_LATER: True})


_LATER = "left out of records at its default"


def trial_id(trial: Any) -> str:
    """Returns twelve hexadecimal digits of the hash of the trial's fields.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Trial:
    ...     bits: int
    >>> trial_id(Trial(4)) == trial_id(Trial(4)), trial_id(Trial(4)) == trial_id(Trial(5))
    (True, False)
    """
    content = json.dumps({"schema": SCHEMA, **_content(trial)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


class RecordStore:
    """A study's folder: ``study.json``, ``trials/*.json``, and scratch space for what is under way."""

    def __init__(self, workdir: str | Path, study: str):
        """Opens or makes the folder.

        Raises:
            ValueError: a folder that cannot be made or written, or that holds another study.
        """
        self.workdir, self.study = files.at(workdir), study
        self._table: tuple[Any, dict[str, packed.Row]] | None = None
        if not files.is_remote(workdir):
            self.workdir = self.workdir.absolute()
        try:
            if (self.workdir / "config.json").exists():
                raise ValueError(
                    f"workdir '{workdir}' holds a training run; choose another --workdir"
                )
            marker = files.read_json(self.workdir / "study.json") or self._recorded_study()
            if marker is None:
                files.write_json(self.workdir / "study.json", {"study": study, "schema": SCHEMA})
                marker = {"study": study}
            probe = self.workdir / ".writable"
            files.write(probe, "")
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"workdir '{workdir}' cannot be written: {error.strerror}") from None
        found = marker.get("study") if isinstance(marker, dict) else marker
        if found != study:
            raise ValueError(
                f"workdir '{workdir}' holds the study {found!r}, not {study!r}; choose another --workdir"
            )

    def _recorded_study(self) -> dict | None:
        """Returns the study that the records belong to, for a folder without study.json."""
        for path in sorted(self.workdir.glob("trials/*.json")):
            record = files.read_json(path)
            if isinstance(record, dict) and "study" in record:
                return {"study": record["study"]}
        for row in self._packed.values():
            return {"study": row.record.get("study")}
        return None

    @property
    def _packed(self) -> dict[str, packed.Row]:
        """The table's rows, read again where another process has packed single records meanwhile."""
        at = packed.version(self.workdir)
        if self._table is None or self._table[0] != at:
            self._table = at, packed.read(self.workdir)
        return self._table[1]

    def check_grid(self, trials: Sequence[Any]) -> None:
        """Raises a ValueError where a kept table has records, and none is of these trials.

        It is then another grid's, whose report would be lost to this one's, and days of training begun.
        """
        if self._packed and all(trial_id(t) not in self._packed for t in trials):
            raise ValueError(
                f"workdir '{self.workdir}' keeps {len(self._packed)} records, none of them of this grid; "
                "give the --preset and the flags that they were made with, or another --workdir"
            )

    def path(self, trial: Any) -> Path:
        return self.workdir / "trials" / f"{trial_id(trial)}.json"

    def read(self, trial: Any) -> dict | None:
        """Returns the trial's record, or None; a damaged one is moved away, or skipped in a table."""
        path = self.path(trial)
        record = files.read_json(path)
        if record is not None:
            reason = self._damage(record, trial)
            if reason:
                files.quarantine(path, reason)
                return None
        elif (row := self._packed.get(trial_id(trial))) is not None:
            record = dict(row.record)
            reason = self._damage(record, trial)
            if reason:
                _log.warning("the record of trial %s is left out: %s", trial_id(trial), reason)
                return None
        return record

    def _damage(self, record: Any, trial: Any) -> str:
        """Removes a record's checksum and returns what is wrong with the record, or ""."""
        expected = {"study": self.study, "trial": _as_json(trial)}
        if not isinstance(record, dict) or any(record.get(k) != v for k, v in expected.items()):
            return "it is not this trial's record"
        if record.pop("checksum", None) != packed.checksum(record):
            return "its content is not what was recorded"
        return ""

    def write(self, trial: Any, results: dict, seconds: float) -> None:
        """Writes the record of a trial: what it is, and beside that the results as they are.

        Raises:
            ValueError: results that are no dictionary of finite JSON values, or that take the place of what
                a record says of its trial.
        """
        head = {
            "schema": SCHEMA,
            "study": self.study,
            "id": trial_id(trial),
            "trial": _as_json(trial),
        }
        if not isinstance(results, dict):
            raise ValueError(f"run_trial must return a dictionary; got {type(results).__name__}")
        if taken := sorted({*head, "checksum"} & set(results)):
            raise ValueError(
                f"results must not have the names of a record's own fields; got {taken}"
            )
        try:
            record = json.loads(json.dumps(head | results, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"results must be finite JSON values: {error}") from None
        files.write_json(self.path(trial), record | {"checksum": packed.checksum(record)})
        files.write_json(
            self.workdir / "timings" / self.path(trial).name, {"seconds": round(seconds, 1)}
        )

    @contextlib.contextmanager
    def lock(self, trial: Any) -> Iterator[Path]:
        """Holds the trial's scratch folder; waits while another process, perhaps dying, holds it.

        Where the store is on shared storage that has no locks, scratch lies on this machine and goes with
        the claim: a trial that is tried again starts anew.
        """
        if files.is_remote(self.workdir):
            with tempfile.TemporaryDirectory(prefix=f"{self.study}-{trial_id(trial)}-") as scratch:
                yield Path(scratch)
            return
        folder = self.workdir / "scratch" / trial_id(trial)
        folder.mkdir(parents=True, exist_ok=True)
        with files.open_lock(folder.with_suffix(".lock")) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning("waiting for another process that runs trial %s here", folder.name)
                fcntl.flock(lock, fcntl.LOCK_EX)
            folder.mkdir(parents=True, exist_ok=True)
            yield folder


def read_records(workdir: str | Path, study: str) -> list[dict]:
    """Returns all whole records of a study that lie in a folder, whichever grid they are of.

    Raises:
        ValueError: no such record lies there.
    """
    single = sorted(files.at(workdir).glob("trials/*.json"))
    held = {path.stem: (str(path), files.read_json(path)) for path in single}
    for name, row in packed.read(workdir).items():
        held.setdefault(name, (f"the record of trial {name}", dict(row.record)))
    found = []
    for _, (where, record) in sorted(held.items()):
        if not isinstance(record, dict) or record.get("study") != study:
            continue
        if record.pop("checksum", None) != packed.checksum(record):
            _log.warning("%s is left out: its content is not what was recorded", where)
            continue
        found.append(record)
    if not found:
        raise ValueError(f"'{workdir}' is not the workdir of a {study} study: no record lies there")
    return found


def _content(trial: Any) -> dict:
    """A trial's fields, without later ones that are at their default."""
    left_out = {
        field.name
        for field in dataclasses.fields(trial)
        if field.metadata.get(_LATER) and getattr(trial, field.name) == field.default
    }
    return {k: v for k, v in dataclasses.asdict(trial).items() if k not in left_out}


def _as_json(trial: Any) -> dict:
    return json.loads(json.dumps(_content(trial)))
