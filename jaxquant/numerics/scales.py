"""Scales: what calibration found, as numbers that a format's values are multiplied by."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.formats import Block, Float, Int, divide, is_static
from jaxquant.numerics import calibration as calibrations
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.rounding import Eden

TINY = jnp.finfo(jnp.float32).tiny
TOP = float(jnp.finfo(jnp.float32).max)
# Beyond this a scale's reciprocal is subnormal, which most hardware flushes.
_HUGE = 2.0**100


@dataclasses.dataclass(frozen=True)
class Scales:
    """The scales of grid values, in `split_groups`'s view.

    Attributes:
        scale: float32, a Block's own before storage.
        tensor: the scale above a two-level Block's.
        zero: the zero point of an asymmetric range.
    """

    scale: jax.Array
    tensor: jax.Array | None = None
    zero: jax.Array | None = None

    @property
    def whole(self) -> jax.Array:
        """The factor of the grid's values."""
        return flush_subnormal(self.scale if self.tensor is None else self.scale * self.tensor)


def flush_subnormal(scale: jax.Array) -> jax.Array:
    """Flushes subnormal scales to zero: products of two levels, and E8M0's 2^−127, which means zero."""
    return jnp.where(scale < TINY, 0, scale)


def compute_scales(found: Any, quantizer: Quantizer) -> Scales:
    """Computes scales from a calibrated range."""
    if isinstance(found, tuple):
        low, high = found
        return _asymmetric(low, high, quantizer)
    is_scale = isinstance(found, calibrations.Scale)
    range_ = found.value if is_scale else found
    scale = range_ if is_scale else divide(range_, quantizer.element.max_value)
    if calibrations.propagates_nonfinite(quantizer.calibration):
        scale = scale + 0 * scale  # Inf becomes NaN; none is negative
    else:
        scale = jnp.where(jnp.isinf(scale) | (scale < 0), jnp.nan, scale)
    empty = (range_ < TINY) & ~jnp.isnan(scale)
    if isinstance(quantizer.format, Block):
        top = quantizer.rounding.top if isinstance(quantizer.rounding, Eden) else None
        return Scales(*quantizer.format.scales(scale, empty, top))
    return Scales(_raise_subnormal(scale, empty, quantizer))


def _raise_subnormal(scale: jax.Array, empty: jax.Array, quantizer: Quantizer) -> jax.Array:
    """Raises subnormal scales, which most hardware flushes to zero.  NaN is kept.

    A group that is empty, of zeros alone, gets 0: whatever the grid has nearest to zero, it stands for zero,
    and a gradient that its scale is carried over to is not widened by it.  Floats as wide as float32 hold
    values as they are, at scale 1.  A range that was given, or leaves values out, clips what lies beyond it,
    however small.
    """
    if not calibrations.propagates_nonfinite(quantizer.calibration):
        return jnp.where(scale < TINY, TINY, scale)
    least = 1 if isinstance(quantizer.element, Float) else TINY
    return jnp.where(empty, 0, jnp.where(scale < TINY, least, scale))


def _asymmetric(low: jax.Array, high: jax.Array, quantizer: Quantizer) -> Scales:
    element = quantizer.format
    if not isinstance(element, Int) or element.levels == "midrise":
        raise ValueError(
            "an asymmetric range needs an Int with a zero, whose steps a zero point counts; "
            f"got format {element}"
        )
    levels = jnp.float32(element.max_value) - jnp.float32(element.min_value)
    # Zero is always within the range, so that it has a value of its own; the difference of the ends
    # might not be a float32, half of it is.
    ends_in_order = low <= high
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    half = divide(high / 2 - low / 2, levels)
    half = jnp.where(jnp.isinf(half), jnp.nan, half)
    scale = 2 * jnp.minimum(half, jnp.finfo(jnp.float32).max / 2)
    scale = _raise_subnormal(scale, high - low < TINY, quantizer)
    scale = jnp.where(ends_in_order, scale, jnp.nan)
    zero = jnp.round(element.min_value - low / jnp.where(scale == 0, 1, scale))
    return Scales(scale, None, jnp.clip(zero, element.min_value, element.max_value))


def divide_by_scale(view: jax.Array, scale: jax.Array, quantizer: Quantizer) -> jax.Array:
    """Returns view / scale without an intermediate that is no float32, whatever the scale."""
    scale = jnp.where(scale == 0, 1, scale)  # what is multiplied by 0 afterwards
    # XLA would multiply by the reciprocal anyway, in some programs and not in others (see `divide`).
    if _has_plain_reciprocal(quantizer):
        return view * (1 / scale)
    shrink = jnp.where(scale > _HUGE, 2.0**-64, 1)
    return (view * shrink) * (1 / (scale * shrink))


def _has_plain_reciprocal(quantizer: Quantizer) -> bool:
    """Returns whether no scale can be so large that its reciprocal is flushed to zero."""
    top = quantizer.element.max_value
    is_one_level = not isinstance(quantizer.format, Block)
    return (
        is_one_level
        and calibrations.propagates_nonfinite(quantizer.calibration)
        and is_static(top)
        and float(top) >= 8  # a range is below 2^129, and 2^-126 is no subnormal
    )
