"""Looking on while a run trains, which changes nothing of what it trains: figures, a profile, a watchdog."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.harness.running import files, processes
from experiments.harness.running.watchdog import Watched
from experiments.harness.training import metrics, throughput, train
from experiments.train.monitoring import Monitor

_LONGEST = 1e9  # the system's clocks of waiting threads have an end


@dataclasses.dataclass(frozen=True)
class Watching:
    """What to record of a run.

    Attributes:
        metrics: writers, of `metrics.WRITERS`.
        profile: (first, last) step of which to take a profile, into ``profile``.
        input_timeout: seconds that a batch may take; 0 for any number.
    """

    metrics: Sequence[str] = ()
    profile: tuple[int, int] | None = None
    input_timeout: float = 0.0

    def check(self, steps: int) -> None:
        """Raises a ValueError for what no run of so many steps could do."""
        metrics.check(self.metrics)
        if not 0 <= self.input_timeout <= _LONGEST:
            raise ValueError(
                f"--input_timeout is a number of seconds from 0 to {_LONGEST:g}; got {self.input_timeout}"
            )
        if self.profile is not None and not 0 < self.profile[0] <= self.profile[1] <= steps:
            raise ValueError(
                f"--profile is FIRST:LAST of the run's steps, 1 to {steps}; got "
                f"{self.profile[0]}:{self.profile[1]}"
            )


class Watch:
    """Looks on at one run: its loop takes `batches`, a `step` and `on_log` from here.

    Attributes:
        batches: the run's, with a limit to waiting for them.
    """

    def __init__(
        self,
        watching: Watching,
        workdir: Path,
        config: Mapping[str, Any],
        batches: Any,
        schedule: train.Schedule,
        meter: throughput.Throughput,
        monitor: Monitor | None = None,
    ):
        names = watching.metrics if processes.is_first() else ()
        self.batches = Watched(batches, watching.input_timeout)
        self._writers = metrics.make_writers(names, workdir, config)
        self._profile = _Profile(watching.profile, workdir / "profile")
        self._workdir, self._schedule, self._meter = workdir, schedule, meter
        self._monitor = monitor or Monitor(None, 0, workdir)
        self._at = self._trained = 0
        self._saving = self._waiting = 0.0
        self._taken: dict[str, Any] = {}

    def step(self, step: Any) -> Callable:
        """Returns a step that does the same, compiled when it is first called."""
        compiled = None

        def watched(state: Any, *arguments: Any) -> tuple[Any, jax.Array]:
            nonlocal compiled
            if compiled is None:
                compiled = self._compiled(step, state, *arguments)
            at = self._at + self._trained + 1
            self._monitor.before(at, state, arguments[0], self._writers)
            self._profile.before(at)
            found = compiled(state, *arguments)
            self._profile.after(at, found)
            self._trained += 1
            return found

        return watched

    def _compiled(self, step: Any, state: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        compiled = step.lower(state, *arguments).compile()
        memory = compiled.memory_analysis()
        self._taken = {
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "compile_seconds": time.perf_counter() - start,
            "bytes": {
                "parameters": throughput.array_bytes(state.params),
                "optimizer_state": throughput.array_bytes(state.opt_state),
                # Activations and all else that comes and goes: the compiler's count, nothing measured.
                "temporaries_by_the_compiler": getattr(memory, "temp_size_in_bytes", None),
            },
        }
        return compiled

    def on_log(self, steps: int, loss: float, saving: float) -> None:
        """Handles a progress report of `train.fit`.

        Args:
            steps: done since the last call; below zero where it went back.
            loss: the mean over these.
            saving: seconds spent on checkpoints so far.
        """
        self._at += steps
        trained, self._trained = self._trained, 0
        saving += self._monitor.seconds  # neither is training
        pauses = saving - self._saving, self.batches.seconds - self._waiting
        self._saving, self._waiting = saving, self.batches.seconds
        if not trained:  # it has read a checkpoint
            return
        if steps != trained:  # it went back to one
            self._meter.start()
            return
        figures = self._meter.interval(steps, *pauses)
        rate = float(self._schedule(self._at - 1))
        self._write({"loss/train": loss, "learning_rate": rate} | figures)

    def on_end(self, losses: Mapping[str, float]) -> None:
        """Writes the losses by split, and what the run took as ``performance.json``."""
        self._profile.warn()
        self._monitor.on_end()
        self._write({f"loss/{split}": loss for split, loss in losses.items()})
        if not self._taken or not processes.is_first():
            return
        most = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if most is not None:
            self._taken["bytes"]["peak_by_the_device"] = most
        content = self._taken | {"medians": self._meter.medians()}
        files.write_json(self._workdir / "performance.json", content)

    def _write(self, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(self._at, values)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._profile.close()
        for writer in self._writers:
            writer.close()


class _Profile:
    """JAX's profile of a range of steps, taken by the first process."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps = steps if processes.is_first() else None
        self._folder, self._is_open, self._begun = folder, False, False

    def before(self, at: int) -> None:
        if self._steps is not None and at == self._steps[0] and not self._begun:
            jax.profiler.start_trace(str(self._folder))
            self._is_open = self._begun = True

    def after(self, at: int, found: Any) -> None:
        if self._is_open and self._steps is not None and at == self._steps[1]:
            jax.block_until_ready(found)
            self.close()

    def close(self) -> None:
        if self._is_open:
            jax.profiler.stop_trace()
        self._is_open = False

    def warn(self) -> None:
        """Warns if the run has ended without a profile."""
        if (
            self._steps is not None
            and not self._begun
            and not any(self._folder.rglob("*.xplane.pb"))
        ):
            logging.getLogger(__name__).warning(
                "no profile was taken: step %d was behind this run, which had gone on later",
                self._steps[0],
            )
