"""Drift: are live activations still within the ranges they were calibrated for?

`activation_statistics` is a pair of pure functions that may be jitted and costs a few passes over what it
watches; `drift` reads the statistics outside of jit.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant.artifacts.plain import plain

Level = Literal["ok", "watch", "alarm"]
_LEVELS: tuple[Level, ...] = ("ok", "watch", "alarm")
# A magnitude r for [−r, r], or (low, high); scalars, or arrays with one range per channel.
Range = Any


class ActivationStatistics(NamedTuple):
    """Statistics of one activation: extremes in the shape of its range, and shares of all values.

    Attributes:
        low, high: the least and largest finite values.
        saturated: the share beyond the calibrated range.
        nonfinite: the share that is NaN or infinite.
        total: values seen.
    """

    low: jt.Float[jax.Array, "*range"]
    high: jt.Float[jax.Array, "*range"]
    saturated: jt.Float[jax.Array, ""]
    nonfinite: jt.Float[jax.Array, ""]
    total: jt.Float[jax.Array, ""]


State = dict[str, ActivationStatistics]


@dataclasses.dataclass(frozen=True)
class Alarm:
    """When to watch, and when to alarm; the worst of the conditions counts.

    The defaults suit ranges that were to cover everything (absmax).  For a range that clips by design, a
    percentile for example, give ratios and saturations above those expected.

    Attributes:
        watch_ratio, alarm_ratio: live range over calibrated, beyond which to watch or alarm.
        watch_saturation, alarm_saturation: the same of the share of values beyond the range.
        watch_unused: a ratio below this leaves part of the grid unused (0.5 is a bit).
    """

    watch_ratio: float = 1.1
    alarm_ratio: float = 2.0
    watch_saturation: float = 1e-4
    alarm_saturation: float = 1e-2
    watch_unused: float = 0.5

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float | np.number):
                raise ValueError(f"{field.name} is a number; got {value!r}")
        if not 0 <= self.watch_unused <= self.watch_ratio <= self.alarm_ratio:
            raise ValueError(
                "ratios rise from watch_unused over watch_ratio to alarm_ratio; got"
                f" {self.watch_unused}, {self.watch_ratio}, {self.alarm_ratio}"
            )
        if not 0 <= self.watch_saturation <= self.alarm_saturation <= 1:
            raise ValueError(
                "saturations are shares, and watch's is not above alarm's; got"
                f" {self.watch_saturation}, {self.alarm_saturation}"
            )

    def level(self, ratio: float, saturation: float, nonfinite: float) -> Level:
        """Returns the level of one activation."""
        if nonfinite > 0 or ratio > self.alarm_ratio or saturation > self.alarm_saturation:
            return "alarm"
        if (
            ratio > self.watch_ratio
            or ratio < self.watch_unused
            or saturation > self.watch_saturation
        ):
            return "watch"
        return "ok"


@dataclasses.dataclass(frozen=True)
class ActivationDrift:
    """One activation against its calibration.

    Attributes:
        ratio: live extreme over calibrated, of the channel and side where it is largest.
        saturated, nonfinite: shares of all values.
    """

    name: str
    level: Level
    low: float
    high: float
    calibrated_low: float
    calibrated_high: float
    ratio: float
    saturated: float
    nonfinite: float


@dataclasses.dataclass(frozen=True)
class DriftReport:
    """All activations, the worst first; `level` is the worst of them."""

    level: Level
    activations: tuple[ActivationDrift, ...]
    alarm: Alarm

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON has them, None where a ratio is infinite."""
        return plain(self)

    def __str__(self) -> str:
        width = max(10, *(len(a.name) for a in self.activations))
        lines = [
            f"drift: {self.level}",
            f"{'activation':{width}}  level   ratio   saturated   live range vs. calibrated",
        ]
        for a in self.activations:
            broken = f"  not finite {100 * a.nonfinite:.2f} %" if a.nonfinite else ""
            lines.append(
                f"{a.name:{width}}  {a.level:5}{a.ratio:8.3f}{100 * a.saturated:10.4f} %"
                f"   [{a.low:.4g}, {a.high:.4g}] vs."
                f" [{a.calibrated_low:.4g}, {a.calibrated_high:.4g}]{broken}"
            )
        return "\n".join(lines)


def activation_statistics(
    calibrated: Mapping[str, Range],
) -> tuple[Callable[[], State], Callable[[State, Mapping[str, jax.Array]], State]]:
    """Returns running statistics of activations, as a pair (init, update) of pure functions.

    Args:
        calibrated: by name, a magnitude r for [−r, r] or a pair (low, high) with low ≤ 0 ≤ high, as
            `jaxquant.calibration` finds them; arrays hold one range for each channel, and broadcast with
            the activation, whose other axes are reduced.

    Returns:
        ``init() -> state`` and ``update(state, {name: activation}) -> state``.

    Raises:
        ValueError: no ranges, or one that is not finite or does not hold zero; from `update`, other
            names than calibrated or an activation that its range does not broadcast with.

    >>> init, update = activation_statistics({"up": 2.0})
    >>> state = jax.jit(update)(init(), {"up": jnp.array([-1.0, 3.0, 0.5, 1.0])})
    >>> float(state["up"].high), float(state["up"].saturated)
    (3.0, 0.25)
    """
    ranges = _ranges(calibrated)

    def init() -> State:
        zero = jnp.zeros((), jnp.float32)
        return {
            name: ActivationStatistics(
                jnp.full(low.shape, jnp.inf, jnp.float32),
                jnp.full(high.shape, -jnp.inf, jnp.float32),
                zero,
                zero,
                zero,
            )
            for name, (low, high) in ranges.items()
        }

    def update(state: State, activations: Mapping[str, jax.Array]) -> State:
        if set(activations) != set(ranges):
            raise ValueError(
                f"activations are those calibrated, {sorted(ranges)}; got {sorted(activations)}"
            )
        return {
            name: _update(name, state[name], activations[name], ranges[name]) for name in ranges
        }

    return init, update


def _update(
    name: str, state: ActivationStatistics, x: jax.Array, bounds: tuple[np.ndarray, np.ndarray]
) -> ActivationStatistics:
    shape = bounds[0].shape
    padded = (1,) * (x.ndim - len(shape)) + shape
    if len(shape) > x.ndim or any(p not in (1, s) for p, s in zip(padded, x.shape, strict=True)):
        raise ValueError(
            f"the range of {name!r} has shape {shape}, which does not broadcast with {x.shape}"
        )
    if not x.size:
        return state
    x = x.astype(jnp.float32)
    low, high = (jnp.asarray(b, jnp.float32).reshape(padded) for b in bounds)
    axes = tuple(i for i, size in enumerate(padded) if size == 1)
    finite = jnp.isfinite(x)
    least = jnp.min(x, axis=axes, initial=jnp.inf, where=finite).reshape(shape)
    most = jnp.max(x, axis=axes, initial=-jnp.inf, where=finite).reshape(shape)
    # Shares rather than counts: float32 holds a share of 10⁹ values well, and a count of them not.
    total = state.total + x.size
    weight = x.size / total

    def share(old: jax.Array, what: jax.Array) -> jax.Array:
        return old + weight * (jnp.mean(what.astype(jnp.float32)) - old)

    return ActivationStatistics(
        jnp.minimum(state.low, least),
        jnp.maximum(state.high, most),
        share(state.saturated, finite & ((x < low) | (x > high))),
        share(state.nonfinite, ~finite),
        total,
    )


def _ranges(calibrated: Mapping[str, Range]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if not isinstance(calibrated, Mapping):
        raise ValueError(f"calibrated ranges are by name; got {calibrated!r}")
    if not calibrated:
        raise ValueError("calibrated ranges are empty; give at least one activation's")
    ranges = {}
    for name, value in calibrated.items():
        try:
            low, high = _sides(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"the range of {name!r} is a magnitude or (low, high); got {value!r}"
            ) from None
        if not np.all(np.isfinite(low) & np.isfinite(high) & (low <= 0) & (high >= 0)):
            raise ValueError(
                f"the range of {name!r} is finite and holds zero, low ≤ 0 ≤ high; got {value!r}"
            )
        ranges[name] = (low, high)
    return ranges


def _sides(value: Range) -> tuple[np.ndarray, np.ndarray]:
    """Returns a range's (low, high), whatever raises where it is none."""
    if not isinstance(value, tuple | list):
        high = np.asarray(value, np.float32)
        return -high, high
    low, high = np.broadcast_arrays(*(np.asarray(side, np.float32) for side in value))
    return low, high


def drift(
    live: Mapping[str, ActivationStatistics],
    calibrated: Mapping[str, Range],
    alarm: Alarm | None = None,
) -> DriftReport:
    """Returns live activations against the ranges they were calibrated for.

    ratio = max(high_live/high, low_live/low), over channels; a share `saturated` lies beyond.

    Args:
        live: the state of `activation_statistics`.
        calibrated: the ranges it was made with.
        alarm: thresholds, by default `Alarm()`.

    Raises:
        ValueError: other names than calibrated, or an activation of which nothing was seen.

    >>> init, update = activation_statistics({"up": 2.0})
    >>> drift(update(init(), {"up": jnp.array([-1.0, 5.0])}), {"up": 2.0}).level
    'alarm'
    """
    alarm = Alarm() if alarm is None else alarm
    if not isinstance(alarm, Alarm):
        raise ValueError(f"alarm is an Alarm; got {alarm!r}")
    ranges = _ranges(calibrated)
    if not isinstance(live, Mapping):
        raise ValueError(f"live statistics are those of activation_statistics; got {live!r}")
    if set(live) != set(ranges):
        raise ValueError(
            f"live statistics are of what was calibrated, {sorted(ranges)}; got {sorted(live)}"
        )
    found = [_one(name, live[name], *ranges[name], alarm) for name in ranges]
    found.sort(key=lambda a: (-_LEVELS.index(a.level), -a.saturated, -a.ratio))
    return DriftReport(found[0].level, tuple(found), alarm)


def _one(
    name: str, seen: ActivationStatistics, low: np.ndarray, high: np.ndarray, alarm: Alarm
) -> ActivationDrift:
    if not isinstance(seen, ActivationStatistics):
        raise ValueError(f"live statistics of {name!r} are ActivationStatistics; got {seen!r}")
    if not float(seen.total) > 0:
        raise ValueError(f"nothing was seen of {name!r}; update the statistics first")
    live_low, live_high = np.asarray(seen.low), np.asarray(seen.high)
    if live_low.shape != low.shape:
        raise ValueError(
            f"statistics of {name!r} are of ranges of shape {live_low.shape}; got {low.shape}"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        above = np.where(live_high > 0, live_high / np.abs(high), 0)
        below = np.where(live_low < 0, -live_low / np.abs(low), 0)
    used = (low < 0) | (high > 0) | (live_low < 0) | (live_high > 0)
    # A channel that was always zero, and is, has no ratio; if all are, nothing changed.
    ratio = float(np.maximum(above, below)[used].max()) if used.any() else 1.0
    saturated, nonfinite = float(seen.saturated), float(seen.nonfinite)
    if math.isclose(nonfinite, 1.0):
        ratio = math.inf
    return ActivationDrift(
        name=name,
        level=alarm.level(ratio, saturated, nonfinite),
        low=float(live_low.min()),
        high=float(live_high.max()),
        calibrated_low=float(low.min()),
        calibrated_high=float(high.max()),
        ratio=ratio,
        saturated=saturated,
        nonfinite=nonfinite,
    )
