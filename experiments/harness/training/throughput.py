"""Throughput and memory: the time of a step, the rates that follow from it, and the bytes of arrays."""

import statistics
import time
from typing import Any

import jax

from experiments.harness.training import chips


class Throughput:
    """Times the steps between looks at the loss, the compilation and all that is not training left out."""

    def __init__(self, tokens: int, flops: int, devices: list[Any]):
        """Starts with the first `start`.

        Args:
            tokens: of a step.
            flops: of a step, those that the model needs.
            devices: that take part.
        """
        self._tokens, self._flops, self._devices = tokens, flops, devices
        self._started: float | None = None
        self._intervals: list[dict[str, float]] = []

    def start(self) -> None:
        """Starts the measurement."""
        self._started = time.perf_counter()

    def interval(self, steps: int, saving: float, waiting: float) -> dict[str, float]:
        """Returns the figures of the steps since `start`, which it calls again.

        Args:
            steps: how many.
            saving: seconds of these spent on checkpoints, which do not count.
            waiting: seconds of these spent on waiting for input, which do.

        Returns:
            ``seconds_per_step``, ``tokens_per_second``, ``input_wait`` (a share), and ``mfu`` where the
            device's peak is known (`peak`).  Empty where it was not started.
        """
        found = {}
        if self._started is not None:
            seconds = time.perf_counter() - self._started - saving
            found = self._figures(seconds / steps, min(1.0, waiting / seconds))
            self._intervals.append(found)
        self.start()
        return found

    def medians(self) -> dict[str, float]:
        """Returns the medians of the step time and of the wait for input, and the rates for that time."""
        if not self._intervals:
            return {}
        seconds, wait = (
            statistics.median(one[name] for one in self._intervals)
            for name in ("seconds_per_step", "input_wait")
        )
        return self._figures(seconds, wait)

    def _figures(self, seconds: float, wait: float) -> dict[str, float]:
        found = {
            "seconds_per_step": seconds,
            "tokens_per_second": self._tokens / seconds,
            "input_wait": wait,
        }
        most = peak(self._devices)
        return found | ({} if most is None else {"mfu": self._flops / seconds / most})


def peak(devices: list[Any]) -> float | None:
    """Returns operations a second of all devices together, in bfloat16; None where no peak is published here.

    Model FLOPs utilization is a share of this, whatever type the products really have: in int8 it can
    pass 1.

    Source: Chowdhery et al. 2022, arXiv 2204.02311, Appendix B.
    """
    rates = [
        chips.CHIPS[d.device_kind].peak["bf16"] / chips.CHIPS[d.device_kind].cores
        for d in devices
        if d.device_kind in chips.CHIPS
    ]
    return sum(rates) if len(rates) == len(devices) else None


def array_bytes(tree: Any) -> dict[str, int]:
    """Returns bytes of real arrays: ``all`` together, and those on this process's first ``device``.

    >>> import jax.numpy as jnp
    >>> array_bytes({"a": jnp.zeros(3), "b": jnp.zeros(2, jnp.int8)})
    {'all': 14, 'device': 14}
    """
    leaves = jax.tree.leaves(tree)
    first = jax.local_devices()[0]
    shards = [s for x in leaves for s in x.addressable_shards if s.device == first]
    return {"all": sum(x.nbytes for x in leaves), "device": sum(s.data.nbytes for s in shards)}
