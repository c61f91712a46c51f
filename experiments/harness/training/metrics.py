"""Write a run's metrics to TensorBoard and Weights & Biases through one small interface."""

import importlib
import importlib.util
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from experiments.harness.running import files
from jaxquant.artifacts.files import read_bytes

WRITERS = ("tensorboard", "wandb")
Counts = Sequence[Sequence[int]]  # pairs (floor(log2 |x|), how many)


class Writer(Protocol):
    """A writer of metrics by name; steps may go back to an earlier one."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def write_histograms(self, step: int, counts: Mapping[str, Counts]) -> None:
        """Writes, by name, the count of magnitudes from each power of two."""
        ...

    def close(self) -> None: ...


def make_writers(names: Sequence[str], workdir: Path, config: Mapping[str, Any]) -> list[Writer]:
    """Returns the writers of a run.

    Args:
        names: of `WRITERS`.
        workdir: the run's.
        config: the run's, for those that show it.

    Raises:
        ValueError: another name, one that is not installed, or a service that lets nobody in.
    """
    check(names)
    make = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return [make[name](workdir, config) for name in names]


def check(names: Sequence[str]) -> None:
    """Raises a ValueError unless all of these are writers, and installed."""
    for name in names:
        if name not in WRITERS:
            raise ValueError(f"--metrics is a list of {', '.join(WRITERS)}, or empty; got {name!r}")
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise ValueError("--metrics=wandb needs Weights & Biases: pip install -e '.[wandb]'")


class TensorBoard:
    """Event files under ``tensorboard``; those of a stopped run's later steps are superseded."""

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        del config
        self._folder = workdir / "tensorboard"
        self._events: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._open(step)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def write_histograms(self, step: int, counts: Mapping[str, Counts]) -> None:
        """Histograms of log2 |x|, whose bins are one wide."""
        self._open(step)
        for name, pairs in counts.items():
            if not pairs:
                continue
            low, high = pairs[0][0], pairs[-1][0] + 1
            own = {exponent: count for exponent, count in pairs}
            numbers = [own.get(exponent, 0) for exponent in range(low, high)]
            middles = [exponent + 0.5 for exponent in range(low, high)]
            self._events.add_histogram_raw(
                name,
                min=low,
                max=high,
                num=sum(numbers),
                sum=sum(n * m for n, m in zip(numbers, middles, strict=True)),
                sum_squares=sum(n * m * m for n, m in zip(numbers, middles, strict=True)),
                bucket_limits=[low, *range(low + 1, high + 1)],
                bucket_counts=[0, *numbers],
                global_step=step,
            )
        self._events.flush()

    def _open(self, step: int) -> None:
        if self._events is None:  # not sooner: the first step says which ones are superseded
            from tensorboardX import SummaryWriter

            # Two of one second would have one name.
            self._events = SummaryWriter(
                str(self._folder), purge_step=step, filename_suffix=f".{step}"
            )

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


class WeightsAndBiases:
    """One run of the service for a workdir, however often it is stopped.

    ``WANDB_PROJECT``, ``WANDB_MODE=offline`` and its other variables hold; the project is else "jaxquant".
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        wandb: Any = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "jaxquant"),
                dir=str(workdir),
                id=_identity(workdir / "wandb" / "id"),
                resume="allow",
                config=dict(config),
            )
        except wandb.Error as error:
            raise ValueError(
                f"Weights & Biases does not let this run in ({error}); WANDB_MODE=offline keeps it here"
            ) from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # Its own count of steps never goes back.
        self._run.log({"step": step, **values})

    def write_histograms(self, step: int, counts: Mapping[str, Counts]) -> None:
        wandb: Any = importlib.import_module("wandb")
        shown = {}
        for name, pairs in counts.items():
            if pairs:
                low, high, own = pairs[0][0], pairs[-1][0] + 1, {e: n for e, n in pairs}
                bins = [own.get(e, 0) for e in range(low, high)], [*range(low, high + 1)]
                shown[name] = wandb.Histogram(np_histogram=bins)
        self._run.log({"step": step, **shown})

    def close(self) -> None:
        self._run.finish()


def _identity(path: Path) -> str:
    """Returns the service's id of the run, kept in the run's folder."""
    if not path.exists():
        files.write(path, uuid.uuid4().hex[:16])
    return read_bytes(path, 1024).decode()
