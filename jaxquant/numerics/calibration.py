"""Calibration: from a tensor to the range that its grid must cover.

A calibration is a function of (values, axes, format): `axes` share one range and stay as axes of size
1.  It returns a magnitude r, for the range [−r, r], a pair (low, high) for an asymmetric one, or a `Scale`.
Ranges that are data, found before or learned, are `Range` and `Step`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant.formats import Format, Int
from jaxquant.numerics.reductions import largest, largest_magnitude
from jaxquant.stats import renamed_names

Calibration = Callable[[jax.Array, tuple[int, ...], Format], Any]

__getattr__ = renamed_names(globals(), {"sees_all": "propagates_nonfinite"})


def absmax(
    x: jt.Float[jax.Array, "*shape"], axes: tuple[int, ...], format: Format | None = None
) -> jt.Float[jax.Array, "..."]:
    """Returns the largest magnitude over `axes`: no value is clipped, but by a `Codebook` with unequal ends.

    The largest magnitude is mapped onto a Codebook's longer end, as bitsandbytes does with its tables; values
    beyond the shorter end are clipped to it.

    Args:
        x: values.
        axes: what shares one scale.
        format: not needed.

    Returns:
        max |x| over `axes`, zero where there is nothing to take it of, NaN where one is a NaN or an Inf.

    >>> absmax(jnp.array([[1.0, -3.0], [2.0, 0.5]]), (1,))
    Array([[3.],
           [2.]], dtype=float32)
    """
    del format
    return largest_magnitude(x, axes)


def minmax(
    x: jt.Float[jax.Array, "*shape"], axes: tuple[int, ...], format: Format | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest and the largest value over `axes`, and zero: an asymmetric range without clipping.

    Zero is within the range so that it is represented exactly (Jacob et al. 2018, section 2.1).

    >>> minmax(jnp.array([[1.0, -3.0], [2.0, 0.5]]), (1,))[0]
    Array([[-3.],
           [ 0.]], dtype=float32)
    """
    del format
    return 0 - largest(-x, axes), largest(x, axes)


def rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns √(mean x²) over `axes`, of values whose squares need not be representable."""
    top = absmax(x, axes)
    unit = jnp.where(top >= jnp.finfo(jnp.float32).tiny, top, 1)
    count = max(1, math.prod(x.shape[a] for a in axes))
    shrink = jnp.where(unit > 2.0**100, 2.0**-64, 1)  # or the reciprocal might be flushed
    squares = ((x * shrink) * (1 / (unit * shrink))) ** 2
    # A choice after each product, or it may become one multiply-add with the sum that follows.
    squares = jnp.where(squares < jnp.finfo(jnp.float32).tiny, 0, squares)
    return unit * jnp.sqrt(_sum_by_halves(squares, axes) / count)


def _sum_by_halves(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the sum over `axes`, which stay with size 1: the same to the bit in every program.

    A reduction adds up in an order that depends on what it is compiled with; here each addition is written
    out, of one half of the axis to the other.
    """
    for axis in axes:
        while x.shape[axis] > 1:
            half = x.shape[axis] // 2
            first, second, rest = jnp.split(x, (half, 2 * half), axis=axis)
            both = first + second
            x = both if not rest.shape[axis] else jnp.concatenate([both, rest], axis=axis)
    return x if x.size or not axes else jnp.sum(x, axis=axes, keepdims=True)


def gaussian(
    x: jt.Float[jax.Array, "*shape"], axes: tuple[int, ...], format: Format
) -> jt.Float[jax.Array, "..."]:
    """Returns the range that quantizes a zero-mean normal of x's RMS with the least squared error.

    r = c(format) · √(mean x²), where c minimises E[(z − Q(z))²] for z ~ N(0, 1) over the range of the
    grid.  An `Int` may have traced bits (whole widths); other formats are static.

    Raises:
        ValueError: a traced format other than an Int.

    Source: Max 1960, "Quantizing for Minimum Distortion", for uniform grids; QuEST (Panferov et al.
    2025, arXiv 2502.05003), section 3.1, for its use.

    >>> from jaxquant.formats import Int
    >>> round(float(gaussian(jnp.ones((1, 8)), (1,), Int(4, "midrise"))[0, 0]), 3)
    2.514
    """
    size = rms(x, axes)
    # Of values near float32's largest the range would be Inf.
    found = jnp.minimum(_gaussian_range(format) * size, jnp.finfo(jnp.float32).max)
    return jnp.where(jnp.isfinite(size), found, size)


def _gaussian_range(format: Format) -> Any:
    """Returns c(format): for traced bits, read from the table of all widths."""
    if jax.tree.leaves(format):
        if not isinstance(format, Int):
            raise ValueError(
                f"gaussian calibration takes a static format or an Int; got {format!r}"
            )
        lowest = 2 if format.levels in ("symmetric", "full") else 1
        widths = range(lowest, 17)
        table = jnp.array(
            [optimal_gaussian_range(Int(b, format.levels))[0] for b in widths], jnp.float32
        )
        place = jnp.asarray(format.bits, jnp.float32)
        return jnp.interp(place, jnp.array(widths, jnp.float32), table)
    return jnp.float32(optimal_gaussian_range(format)[0])


@functools.lru_cache(maxsize=128)
def optimal_gaussian_range(format: Format) -> tuple[float, float]:
    """Returns the optimal range c of a static format's grid for unit normals, and the remaining error.

    The mean squared error is computed exactly, cell by cell, from the normal's partial moments; its
    minimum is bracketed on a logarithmic sweep of c and then narrowed by golden section.

    Returns:
        (c, E[(z − Q(z))²] at c).

    >>> from jaxquant.formats import Int
    >>> round(optimal_gaussian_range(Int(2, "midrise"))[1], 5)
    0.11885
    """
    grid = _grid(format)
    top = float(format.max_value)
    grid = grid[np.isfinite(grid) & (grid >= float(format.min_value)) & (grid <= top)] / top

    def error(log_range: float) -> float:
        return _gaussian_error(grid * math.exp(log_range))

    sweep = np.linspace(math.log(0.3), math.log(12.0), 80)
    best = int(np.argmin([error(c) for c in sweep]))
    low, high = sweep[max(0, best - 1)], sweep[min(len(sweep) - 1, best + 1)]
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return math.exp((low + high) / 2), error((low + high) / 2)


def _grid(format: Format) -> np.ndarray:
    """Returns a static format's values in rising order."""
    if isinstance(
        format, Int
    ):  # without JAX, so that it works while a program is traced by shard_map
        low, high = int(format.min_value), int(format.max_value)
        return np.arange(low, high + 1, format.step).astype(np.float64)
    with jax.ensure_compile_time_eval():
        return np.unique(np.asarray(format.decode(jnp.arange(2**format.bits)), np.float64))


def _gaussian_error(grid: np.ndarray) -> float:
    """Returns E[(z − Q(z))²] for z ~ N(0, 1) and rounding to the nearest of `grid`'s values."""
    edges = (grid[1:] + grid[:-1]) / 2
    distribution = np.array([0.0, *(math.erf(e / math.sqrt(2)) / 2 + 0.5 for e in edges), 1.0])
    density = np.array([0.0, *(np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)), 0.0])
    mass = np.diff(distribution)
    first = -np.diff(density)  # ∫ z φ over each cell
    return float(1 - 2 * (grid * first).sum() + (grid**2 * mass).sum())


@dataclasses.dataclass(frozen=True)
class scaled_absmax:
    """A share of the largest magnitude: r = share · max |x|; what lies beyond is clipped.

    Args:
        share: over 0.

    >>> scaled_absmax(0.5)(jnp.array([[1.0, -3.0, 2.0]]), (1,), None)
    Array([[1.5]], dtype=float32)
    """

    share: float

    def __post_init__(self):
        _check_share("scaled_absmax", self.share)

    def __call__(self, x: jax.Array, axes: tuple[int, ...], format: Format | None) -> jax.Array:
        del format
        return self.share * absmax(x, axes)


@dataclasses.dataclass(frozen=True)
class scaled_rms:
    """A scale that is a share of the root mean square: s = share · √(mean x²); what lies beyond is clipped.

    Args:
        share: over 0.

    Source: Castro et al. 2025, arXiv 2505.14669: 3/4 for E2M1 in Hadamard coordinates, rounded down to a
    power of two.

    >>> scaled_rms(0.75)(jnp.array([[1.0, -1.0, 1.0]]), (1,), None).value
    Array([[0.75]], dtype=float32)
    """

    share: float

    def __post_init__(self):
        _check_share("scaled_rms", self.share)

    def __call__(self, x: jax.Array, axes: tuple[int, ...], format: Format | None) -> "Scale":
        del format
        return Scale(jnp.minimum(self.share * rms(x, axes), jnp.finfo(jnp.float32).max))


def _check_share(name: str, share: Any) -> None:
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if not is_number or not 0 < share < math.inf:
        raise ValueError(f"{name} takes a share over 0; got {share!r}")


@dataclasses.dataclass(frozen=True)
class percentile:
    """A percentile of the magnitudes over `axes`; what lies beyond is clipped.

    Args:
        percent: over 0, up to 100, which is absmax.

    >>> percentile(50)(jnp.array([[1.0, -3.0, 2.0]]), (1,), None)
    Array([[2.]], dtype=float32)
    """

    percent: float

    def __post_init__(self):
        if not isinstance(self.percent, int | float) or not 0 < self.percent <= 100:
            raise ValueError(f"a percentile is over 0 and at most 100; got {self.percent!r}")

    def __call__(self, x: jax.Array, axes: tuple[int, ...], format: Format | None) -> jax.Array:
        if not axes or any(x.shape[a] == 0 for a in axes):
            return absmax(x, axes)
        return jnp.quantile(jnp.abs(x), self.percent / 100, axis=axes, keepdims=True)


@dataclasses.dataclass(frozen=True)
class mse:
    """The range with the least squared quantization error, among evenly spaced shares of absmax.

    r = argmin over c ∈ {1, 1 − 1/n, …, 1/n}·absmax of Σ (x − Q_c(x))², each group for itself; equal
    errors take the larger range.

    Args:
        candidates: n, at least 1.  The search holds one candidate's error at a time.

    Source: as in Banner et al. 2019, arXiv 1810.05723, by search instead of a formula.

    >>> from jaxquant.formats import Int
    >>> x = jnp.array([[*[1.0] * 60, 4.0]])
    >>> float(mse(8)(x, (1,), Int(2))[0, 0])  # ones exactly, the outlier clipped
    1.0
    """

    candidates: int = 64

    def __post_init__(self):
        if not isinstance(self.candidates, int) or self.candidates < 1:
            raise ValueError(f"mse takes candidates of at least 1; got {self.candidates!r}")

    def __call__(self, x: jax.Array, axes: tuple[int, ...], format: Format) -> jax.Array:
        whole = absmax(x, axes)
        x = x / jnp.where(whole > 0, whole, 1)
        top = jnp.asarray(format.max_value, jnp.float32)

        def search(i, best):
            share = 1 - jnp.asarray(i, jnp.float32) / self.candidates
            scale = share / top
            error = jnp.sum(
                (x - scale * format.round(x / scale, jnp.round)) ** 2, axes, keepdims=True
            )
            return tuple(
                jnp.where(error < best[0], new, old)
                for new, old in zip((error, share), best, strict=True)
            )

        start = tuple(jnp.full(whole.shape, v, jnp.float32) for v in (jnp.inf, 1))
        return whole * jax.lax.fori_loop(0, self.candidates, search, start)[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Range:
    """A range that is data: found before, by running statistics, or learned.

    Args:
        value: the magnitude r, or the pair (low, high): one number, or one for each group in the shape of
            the scales, as `jaxquant.calibrate` gives them.  A negative one makes its group NaN.

    >>> from jaxquant.formats import Int
    >>> Range(jnp.float32(3.0))(jnp.ones((2, 4)), (1,), Int(4)).shape
    (2, 1)
    """

    value: Any

    def __call__(self, x: jax.Array, axes: tuple[int, ...], format: Format) -> Any:
        del format
        groups = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        return jax.tree.map(lambda v: _over_groups(jnp.asarray(v, jnp.float32), groups), self.value)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A calibration's result that is the scale s, instead of the range s · format.max_value."""

    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """A step size that is data, as LSQ learns it: the scale itself, positive; a negative one makes NaN.

    >>> from jaxquant.formats import Int
    >>> Step(jnp.float32(0.5))(jnp.ones((1, 4)), (0, 1), Int(4)).value
    Array([[0.5]], dtype=float32)
    """

    value: Any

    def __call__(self, x: jax.Array, axes: tuple[int, ...], format: Format) -> Scale:
        return Scale(Range(self.value)(x, axes, format))


def learned(x: jax.Array, axes: tuple[int, ...], format: Format) -> Any:
    """Marks a step size that training learns: a model's parameter, which `jq.nnx.quantize` makes.

    Raises:
        ValueError: wherever it is called, for then no parameter has taken its place.
    """
    del x, axes, format
    raise ValueError(
        "a learned step is a model's parameter: put the recipe into an NNX model with jq.nnx.quantize, with "
        "example inputs where other code than Flax's layers multiplies by the weight, and call "
        "jq.nnx.calibrate; or give the step yourself with calibration.Step"
    )


def propagates_nonfinite(calibration: Calibration) -> bool:
    """Returns whether a NaN or an Inf anywhere in a group always shows in the calibration's result."""
    return calibration in (absmax, minmax, gaussian) or isinstance(calibration, mse)


def _over_groups(value: jax.Array, groups: tuple[int, ...]) -> jax.Array:
    """Returns one range for all groups, or one for each, in the view's shape."""
    if value.size == 1:
        return jnp.broadcast_to(value.reshape((1,) * len(groups)), groups)
    # The view adds and leaves out axes of size 1 only.
    if [n for n in value.shape if n != 1] != [n for n in groups if n != 1]:
        raise ValueError(
            "a range is one number, or one for each group in the scales' shape; got shape "
            f"{value.shape} for groups {tuple(g for g in groups if g != 1) or (1,)}"
        )
    return value.reshape(groups)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningRange:
    """Ranges seen so far.

    Attributes:
        total: the decayed sum of ranges.
        weight: the decayed count of batches, so that total / weight is their average from the first on.
    """

    total: Any
    weight: jt.Float[jax.Array, ""]

    def range(self) -> Range:
        """Returns the average so far, as a calibration; NaN before the first update."""
        return Range(jax.tree.map(lambda total: total / self.weight, self.total))


class Running(NamedTuple):
    """A pair of pure functions, as in optax.

    Attributes:
        init: from values to a `RunningRange` that has seen nothing.
        update: from (state, values) to the next.
    """

    init: Callable[[jax.Array], RunningRange]
    update: Callable[[RunningRange, jax.Array], RunningRange]


def running(find: Callable[[jax.Array], Any], decay: float = 0.99) -> Running:
    """Running statistics of ranges: an exponential average without initial bias.

    r_t = Σ_i decay^(t−i) · find(x_i) / Σ_i decay^(t−i).

    Args:
        find: from values to their range, as `jaxquant.calibrate` with a quantizer is.
        decay: from 0, the last batch alone, to 1, the plain mean of all.

    Raises:
        ValueError: a decay outside [0, 1].

    >>> init, update = running(lambda x: absmax(x, (0, 1)), decay=0.5)
    >>> state = init(jnp.zeros((1, 4)))
    >>> for largest in (1.0, 4.0):
    ...     state = update(state, jnp.full((1, 4), largest))
    >>> state.range()  # a calibration
    Range(value=Array([[3.]], dtype=float32))
    """
    if not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise ValueError(f"decay is from 0 to 1; got {decay!r}")

    def init(x: jax.Array) -> RunningRange:
        shapes = jax.eval_shape(find, x)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return RunningRange(zeros, jnp.zeros((), jnp.float32))

    def update(state: RunningRange, x: jax.Array) -> RunningRange:
        total = jax.tree.map(lambda old, new: decay * old + new, state.total, find(x))
        return RunningRange(total, decay * state.weight + 1)

    return Running(init, update)
