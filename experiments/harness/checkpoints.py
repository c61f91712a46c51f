"""Checkpoints with Orbax: the state, the data's position and the history, together or not at all."""

import copy
import json
import logging
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

_LAYOUT = 1  # raised when what a checkpoint holds changes
_SET_ASIDE = "set-aside"


class Checkpoints:
    """The newest checkpoints of one run in one folder.

    A checkpoint that cannot be read whole, or that holds other arrays than the state at hand, is moved
    to ``set-aside`` with a warning, and the one before it is used.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self._folder = Path(folder).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep)
        return ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: Any, batches: Any, history: list) -> None:
        """Saves in the background; `close` waits for it."""
        position = batches.get_state()
        if isinstance(position, bytes):
            position = json.loads(position)
        extra = {
            "layout": _LAYOUT,
            "arrays": _describe(state),
            "batches": copy.deepcopy(position),
            "history": list(history),  # written later, when the caller's has grown
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra)
            ),
        )

    def restore(self, state: Any, batches: Any, at_most: int) -> tuple[Any, list] | None:
        """The newest usable (state, history) up to step `at_most`, laid out as `state` is, or None.

        Sets `batches` to the position that goes with it.
        """
        for step in sorted((s for s in self._manager.all_steps() if s <= at_most), reverse=True):
            try:
                restored = self._read(step, state)
            except Exception as error:  # a damaged file can surface as almost any exception
                self._set_aside(step, error)
                continue
            position = restored["extra"]["batches"]
            batches.set_state(
                json.dumps(position).encode()
                if isinstance(batches.get_state(), bytes)
                else position
            )
            return restored["state"], [(int(s), float(x)) for s, x in restored["extra"]["history"]]
        return None

    def _read(self, step: int, state: Any) -> Any:
        extra = self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))[
            "extra"
        ]
        if extra.get("layout") != _LAYOUT:
            raise ValueError(f"its layout is {extra.get('layout')}, not {_LAYOUT}")
        # Orbax would cast a wrong type silently.
        if extra["arrays"] != _describe(state):
            raise ValueError("its arrays have other shapes or types than this run's")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        arrays = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )["state"]
        return {"state": arrays, "extra": extra}

    def _set_aside(self, step: int, error: Exception) -> None:
        self._manager.close()
        target = self._folder.parent / _SET_ASIDE / f"{self._folder.name}-{step}-{time.time_ns()}"
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
        self._manager = self._open()

    def close(self) -> None:
        """Waits for what is still being written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _describe(state: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
