"""Statistics of quantizing one tensor, as sums: clipping, underflow and noise."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping as jt
from jax.sharding import PartitionSpec

from jaxquant.formats.base import exp2, exponent_of, in_float32
from jaxquant.numerics.qarray import QArray, dequantize, to_float32_rotated, to_grid
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.reductions import largest
from jaxquant.numerics.sharding import call_with_auto_axes

# The histogram's bins: floor(log2 |x|) from the first to the last, which hold what lies beyond them too.
LOWEST, BINS = -44, 64
# What a scale's own rounding may add to the largest value, which is no clipping.
_SLACK = 1 + 2.0**-20


class Sums(NamedTuple):
    """Sums over one tensor, all float32; the sums of several uses add up, except for the largest value.

    Attributes:
        uses: 1.
        total: elements.
        nonfinite: those that are NaN or infinite.
        nonzero: those that are finite and not zero.
        clipped: those that are finite and beyond the grid's ends at their scale; NaN of one in float.
        underflow: those of `nonzero` that become zero; NaN of one in float.
        noise: Σ (x − q(x))² / Σ x²; NaN of one in float, of zeros, and where x or q(x) is not finite.
        amax: the largest finite |x|.
        histogram: of `nonzero`, by floor(log2 |x|) from `LOWEST`.
    """

    uses: jt.Float[jax.Array, "*turns"]
    total: jt.Float[jax.Array, "*turns"]
    nonfinite: jt.Float[jax.Array, "*turns"]
    nonzero: jt.Float[jax.Array, "*turns"]
    clipped: jt.Float[jax.Array, "*turns"]
    underflow: jt.Float[jax.Array, "*turns"]
    noise: jt.Float[jax.Array, "*turns"]
    amax: jt.Float[jax.Array, "*turns"]
    histogram: jt.Float[jax.Array, "*turns bins"]


def zero_sums(turns: tuple[int, ...] = ()) -> Sums:
    """Returns the sums of an empty tensor.

    Args:
        turns: axes in front.
    """
    zero = jnp.zeros(turns, jnp.float32)
    return Sums._make([*[zero] * 8, jnp.zeros((*turns, BINS), jnp.float32)])


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("x", "quantizer"), meta_fields=("axes", "key")
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A tensor, and how it is quantized.

    Attributes:
        x: an array; or one that is stored, whose values are then as they are.
        quantizer: None where it stays in float.
        axes: that are summed over, as `jaxquant.quantize` takes them.
        key: likewise.
    """

    x: jax.Array | QArray
    quantizer: Quantizer | None
    axes: tuple[int, ...] = ()
    key: Callable[[jax.Array], jax.Array] | None = None


def measure(tensor: Quantized) -> Sums:
    """Measures the quantization of a tensor, in the coordinates in which it is quantized.

    SQNR = −10 · log10(noise) decibels, where q(x) is what the grid holds, before any rounding to x's type.

    Args:
        tensor: with its quantizer.

    >>> from jaxquant.formats import INT8
    >>> found = measure(Quantized(jnp.array([127.0, 0.2, 0.0]), Quantizer(INT8), (0,)))
    >>> found.nonzero, found.underflow, found.clipped
    (Array(2., dtype=float32), Array(1., dtype=float32), Array(0., dtype=float32))
    """
    x = dequantize(tensor.x) if isinstance(tensor.x, QArray) else tensor.x
    quantizer, axes, key = tensor.quantizer, tensor.axes, tensor.key
    if not x.size:
        return zero_sums()
    return call_with_auto_axes(
        lambda x, quantizer: _measure(x, quantizer, axes, key),
        (x, None if isinstance(tensor.x, QArray) else quantizer),
        PartitionSpec,
    )


def _measure(x: jax.Array, quantizer: Quantizer | None, axes: tuple[int, ...], key: Any) -> Sums:
    view = own = in_float32(x)
    clipped = underflow = noise = values = jnp.float32(jnp.nan)
    if quantizer is not None:
        view, values, clipped = _quantize_view(own, quantizer, axes, key)
        underflow = _count(jnp.isfinite(view) & (view != 0) & (values == 0))
    amax = largest(jnp.abs(jnp.where(jnp.isfinite(view), view, 0))).reshape(())
    if quantizer is not None:
        noise = _noise(view, values, amax)
    counts = _histogram(view)
    histogram, bad = counts[:BINS], counts[BINS + 1]
    if quantizer is not None and quantizer.hadamard is not None:
        bad = _count(~jnp.isfinite(own))  # a rotation spreads it over a block
    return Sums(
        jnp.float32(1),
        jnp.float32(x.size),
        bad,
        jnp.sum(histogram),
        clipped,
        underflow,
        noise,
        amax,
        histogram,
    )


def _quantize_view(x: jax.Array, quantizer: Quantizer, axes: tuple[int, ...], key: Any) -> Any:
    """Returns x in the coordinates and groups of its grid, its quantized values, and the clipped count."""
    grid, scales, view = to_grid(to_float32_rotated(x, quantizer, axes), quantizer, axes, key)
    low, high = quantizer.element.min_value, quantizer.element.max_value
    if scales.zero is not None:
        grid, low, high = (v - scales.zero for v in (grid, low, high))
    scale = scales.whole
    is_beyond = (view > high * scale * _SLACK) | (view < low * scale * _SLACK)
    return view, grid * scale, _count(is_beyond & jnp.isfinite(view) & (scale > 0))


def _count(mask: jax.Array) -> jax.Array:
    """Counts true elements, in float32; it counts in int32 where that suffices."""
    if mask.ndim > 1 and mask.size >= 2**31:
        return jnp.sum(jnp.sum(mask, axis=-1, dtype=jnp.int32).astype(jnp.float32))
    return jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32)


def _noise(x: jax.Array, values: jax.Array, amax: jax.Array) -> jax.Array:
    """Returns Σ (x − values)² / Σ x², in units of about the largest, whose square is a float32."""
    exponent = jnp.clip(exponent_of(jnp.where(amax > 0, amax, 1)), -126, 126)
    unit = exp2(-exponent)
    error, own = ((x - values) * unit) ** 2, (x * unit) ** 2
    if x.ndim > 1:
        # Rows first: one sum of all would lose terms that are small beside it.
        rows = jnp.sum(error, axis=-1), jnp.sum(own, axis=-1)
        error, own = jax.lax.optimization_barrier(rows)
    return jnp.sum(error) / jnp.where(amax > 0, jnp.sum(own), jnp.nan)


def _histogram(x: jax.Array) -> jax.Array:
    """Counts the elements of x by floor(log2 |x|), and those that are zero or not finite."""
    place = jnp.clip(exponent_of(x), LOWEST, LOWEST + BINS - 1) - LOWEST
    place = jnp.where(x == 0, BINS, jnp.where(jnp.isfinite(x), place, BINS + 1))

    def compared(place: jax.Array) -> jax.Array:
        bins = jnp.expand_dims(jnp.arange(BINS + 2), tuple(range(place.ndim)))
        is_there = place[..., None] == bins
        if place.ndim < 2 or place.size < 2**31:
            return jnp.sum(is_there, axis=range(place.ndim), dtype=jnp.int32).astype(jnp.float32)
        rows = jnp.sum(is_there, axis=-2, dtype=jnp.int32).astype(jnp.float32)
        return jnp.sum(rows, axis=range(place.ndim - 1))

    def scattered(place: jax.Array) -> jax.Array:
        counts = jnp.zeros(BINS + 2, jnp.int32).at[place.reshape(-1)].add(1)
        return counts.astype(jnp.float32)

    # A CPU's compiler goes over x once for each comparison, others once for all.
    return jax.lax.platform_dependent(place, cpu=scattered, default=compared)
