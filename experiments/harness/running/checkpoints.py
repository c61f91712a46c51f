"""Checkpoints with Orbax: the state, the data's position and the history, together or not at all.

``seal.json`` in a checkpoint is its manifest: the SHA-256 of each of its files.  A checkpoint and its
manifest are written to a temporary folder, which is then renamed; a checkpoint without a manifest is damaged
and not used.
"""

import contextlib
import copy
import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from experiments.harness.running import files, processes

_LAYOUT = 2  # raised when what a checkpoint holds changes
_QUARANTINE = "set-aside"
_MANIFEST = "seal.json"
_TEMPORARY = ".unsealed"  # after a step: what is being written, or removed


class Restored(NamedTuple):
    """The content of a checkpoint: arrays, (step, loss) so far, and the losses since the last of these."""

    state: Any
    history: list[tuple[int, float]]
    pending: list[float]


@dataclasses.dataclass
class Spacing:
    """A minimum time of work between the saves of a run.

    Each save of some 60 arrays loses 40 to 65 kB within TensorStore, and a process that saved each minute
    grew by 26 MB in 40 minutes.  So one that runs trials for hours saves by time.  A run may be opened again
    and again: the work since its last save is counted on.

    Attributes:
        seconds: of work from one save to the next, at least.
        saves_ends: whether the state that a run ends in is saved all the same.
        worked: seconds since the last save.
    """

    seconds: float
    saves_ends: bool = False
    worked: float = 0.0


class Checkpoints:
    """The newest checkpoints of one run in one folder.

    A checkpoint that is damaged, or that holds other arrays than the given state, is moved to ``set-aside``
    with a warning, and the one before it is used.
    All processes of a run take part; the first one writes, verifies and renames.

    Attributes:
        seconds: time that callers have waited in `save`.
    """

    def __init__(self, folder: Path, keep: int = 2, every: int = 1, spacing: Spacing | None = None):
        """Opens or makes the folder.

        Args:
            folder: of the checkpoints.
            keep: the newest ones of a multiple of `every` steps stay, so many of them, and the newest of all.
            every: steps between those that a run saves unless it is told to stop.
            spacing: between them, in time; as many as are asked for where not given.
        """
        self.seconds = 0.0
        self._spacing, self._since = spacing, time.monotonic()
        self._every = every
        self._folder = Path(folder).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._manifest_writer: _ManifestWriter | None = None

    def _steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, the newest first."""
        names = (p.name for p in self._folder.iterdir() if p.name.isdecimal())
        return sorted(map(int, names), reverse=True)

    def _remove(self, step: int) -> None:
        """Deletes a checkpoint: out of its place at once."""
        old = self._folder / f"{step}{_TEMPORARY}-old"
        shutil.rmtree(old, ignore_errors=True)
        (self._folder / str(step)).rename(old)
        shutil.rmtree(old)

    def _temporary(self, step: int) -> Path:
        return self._folder / f"{step}{_TEMPORARY}"

    def _prune(self) -> None:
        """Deletes what is older than all that stay, and what no process finished."""
        self._wait()
        if not processes.is_first():
            return
        steps = self._steps()
        regular = [s for s in steps if s % self._every == 0]
        for step in {*steps} - {*steps[:1], *regular[: self._keep]}:
            self._remove(step)
        for pattern in (f"*{_TEMPORARY}*", "*.orbax-checkpoint-tmp*"):
            for path in self._folder.glob(pattern):
                shutil.rmtree(path)

    def _wait(self) -> None:
        """Waits until the checkpoint being written is complete."""
        writer, self._manifest_writer = self._manifest_writer, None
        try:
            self._checkpointer.wait_until_finished()
        finally:
            if writer is not None:
                writer.end()
        if writer is not None and writer.error is not None:
            raise writer.error

    def is_due(self, step: int, last: int, every: int, ends: bool) -> bool:
        """Returns whether a run saves at this step, by its interval of steps or the time between its saves.

        Args:
            step: where the run is.
            last: step of its last save, or where it began.
            every: steps between saves: their multiples, or so many after the last where they are spaced.
            ends: whether this is the run's last step.
        """
        spacing = self._spacing
        if spacing is None:
            return ends or step % every == 0
        if ends and spacing.saves_ends:
            return True
        worked = spacing.worked + time.monotonic() - self._since
        return (ends or step - last >= every) and processes.any_of(worked >= spacing.seconds)

    def save(
        self, step: int, state: Any, batches: Any, history: list, pending: Sequence[float] = ()
    ) -> None:
        """Saves in the background; `close` waits for it.

        Args:
            step: of the state.
            state: arrays.
            batches: whose position is saved.
            history: entries so far.
            pending: losses since the last entry.
        """
        start = time.perf_counter()
        with _report_full_disk(self._folder):
            self._save(step, state, batches, history, pending)
        self.seconds += time.perf_counter() - start
        self._count(0.0)

    def _count(self, worked: float) -> None:
        """Restarts the clock of the seconds of work."""
        self._since = time.monotonic()
        if self._spacing is not None:
            self._spacing.worked = worked

    def _save(
        self, step: int, state: Any, batches: Any, history: list, pending: Sequence[float]
    ) -> None:
        self._prune()
        position = batches.get_state()
        if isinstance(position, bytes):
            position = json.loads(position)
        extra = {
            "layout": _LAYOUT,
            "arrays": _describe(state),
            "batches": copy.deepcopy(position),
            "history": list(history),  # written later, when the caller's has grown
            "pending": [repr(float(x)) for x in pending],  # NaN is no JSON
        }
        temporary = self._temporary(step)
        self._checkpointer.save(
            temporary,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra)
            ),
        )
        if processes.is_first():
            self._manifest_writer = _ManifestWriter(temporary, lambda: self._commit(step))

    def _commit(self, step: int) -> None:
        """Writes the manifest, and renames the temporary folder."""
        temporary, place = self._temporary(step), self._folder / str(step)
        files.write_json(temporary / _MANIFEST, _digests(temporary))
        if place.exists():  # of a run that went on from an earlier step
            self._remove(step)
        temporary.rename(place)

    def restore(self, state: Any, batches: Any, at_most: int) -> Restored | None:
        """Returns the newest usable checkpoint up to step `at_most`, sharded as `state`, or None.

        Sets `batches` to the position that goes with it.
        """
        return self._restore(state, batches, at_most, 1)

    def _restore(self, state: Any, batches: Any, at_most: int, every: int) -> Restored | None:
        for step in (s for s in self._steps() if s <= at_most and s % every == 0):
            restored, problem = None, self._find_damage(step)
            if not processes.any_of(problem is not None):
                try:
                    restored = self._read(step, state)
                except Exception as error:  # a damaged file can surface as almost any exception
                    problem = error
            if processes.any_of(restored is None) or restored is None:
                self._quarantine(step, problem or RuntimeError("another process could not read it"))
                continue
            position = restored["extra"]["batches"]
            batches.set_state(
                json.dumps(position).encode()
                if isinstance(batches.get_state(), bytes)
                else position
            )
            history = [(int(s), float(x)) for s, x in restored["extra"]["history"]]
            return Restored(restored["state"], history, [*map(float, restored["extra"]["pending"])])
        return None

    def roll_back(self, state: Any, batches: Any, at_most: int) -> Restored | None:
        """Returns the newest usable regular checkpoint up to a step; deletes later ones, keeps `batches`."""
        self._wait()
        processes.wait_for_all("roll back")
        position = copy.deepcopy(batches.get_state())
        found = self._restore(state, batches, at_most, self._every)
        batches.set_state(position)
        if processes.is_first() and found is not None:
            for step in (s for s in self._steps() if s > int(found.state.step)):
                self._remove(step)
        return found

    def _find_damage(self, step: int) -> Exception | None:
        """Returns the error that the first process finds in a checkpoint's files, or None."""
        if not processes.is_first():
            return None
        folder = self._folder / str(step)
        try:
            manifest = json.loads((folder / _MANIFEST).read_bytes())
        except OSError as error:
            return ValueError(f"{_MANIFEST} cannot be read: {error.strerror}")
        except (ValueError, RecursionError):
            manifest = None
        if not isinstance(manifest, dict):
            return ValueError(f"{_MANIFEST} is damaged")
        found = _digests(folder)
        if manifest == found:
            return None
        names = sorted(k for k in {*found, *manifest} if manifest.get(k) != found.get(k))
        return ValueError(f"{names[0]} is not what was written")

    def _read(self, step: int, state: Any) -> Any:
        folder = self._folder / str(step)
        extra = self._checkpointer.restore(
            folder, args=ocp.args.Composite(extra=ocp.args.JsonRestore())
        )["extra"]
        if extra.get("layout") != _LAYOUT:
            raise ValueError(f"its layout is {extra.get('layout')}, not {_LAYOUT}")
        # Orbax would cast a wrong type silently.
        if extra["arrays"] != _describe(state):
            raise ValueError("its arrays have other shapes or types than this run's")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        arrays = self._checkpointer.restore(
            folder, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )["state"]
        return {"state": arrays, "extra": extra}

    def _quarantine(self, step: int, error: Exception) -> None:
        if processes.is_first():
            self._move(step, error)
        processes.wait_for_all(f"set aside {step}")

    def _move(self, step: int, error: Exception) -> None:
        target = self._folder.parent / _QUARANTINE / f"{self._folder.name}-{step}-{time.time_ns()}"
        target.parent.mkdir(exist_ok=True)
        (self._folder / str(step)).rename(target)
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        logging.getLogger(__name__).warning(
            "checkpoint %s of %s is unusable (%s); set aside as %s",
            step,
            self._folder,
            reason,
            target,
        )

    def close(self) -> None:
        """Waits for what is still being written."""
        if self._spacing is not None:
            self._count(self._spacing.worked + time.monotonic() - self._since)
        try:
            with _report_full_disk(self._folder):
                self._wait()
        finally:
            self._checkpointer.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _ManifestWriter:
    """Runs a function in the background once Orbax has written a folder.

    Attributes:
        error: what it failed with, if it did.
    """

    def __init__(self, folder: Path, commit: Callable[[], None]):
        self.error: Exception | None = None
        self._folder, self._commit = folder, commit
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._folder.exists():
            if self._is_over.wait(0.02) and not self._folder.exists():
                return
        try:
            self._commit()
        except Exception as error:  # the main thread raises it
            self.error = error

    def end(self) -> None:
        """Waits for it, after Orbax has written the folder or never will."""
        self._is_over.set()
        self._thread.join()


@contextlib.contextmanager
def _report_full_disk(folder: Path) -> Iterator[None]:
    """Raises an OSError for a full disk, which Orbax reports somewhere within a long text."""
    try:
        yield
    except Exception as error:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(code) in str(error):
                raise OSError(code, os.strerror(code), str(folder)) from error
        raise


def _digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file but the manifest."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _describe(state: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
