"""Encode blocks of optimizer state as codes of few bits, and decode them.

A codec turns each block of `BLOCK` numbers into codes below 2^bits and a few bytes of scale.  The number of
bits is data, so one program serves all widths.  `Companded` is for signed states (momentum), `Logarithmic`
for non-negative states (second moments).
"""

import abc
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jaxtyping as jt

from jaxquant.checks import check_whole

BLOCK = 128

Blocks = jt.Float32[jax.Array, "*blocks 128"]
Numbers = jt.Int32[jax.Array, "*blocks 128"]
Largest = jt.Int32[jax.Array, "*blocks 1"]
Codes = jt.UInt8[jax.Array, "*blocks 128"]
Scale = jt.Shaped[jax.Array, "*blocks entries"]
Bits = jt.Int32[jax.Array, "*#blocks"]
Draws = jt.Float32[jax.Array, "*blocks 128"]


class Codec(abc.ABC):
    """A codec for blocks of state; subclasses are frozen and hashable.

    The scale of a block is computed from the maxima of some integers.  Compilers vectorize integer maxima,
    but not float maxima, because NaN has no order.

    Attributes:
        signed: whether the codec holds negative numbers.
        least_bits: the minimum width of a code.
        scale: shape and type of the scale of a block.
    """

    @property
    @abc.abstractmethod
    def signed(self) -> bool: ...
    @property
    @abc.abstractmethod
    def least_bits(self) -> int: ...
    @property
    @abc.abstractmethod
    def scale(self) -> jax.ShapeDtypeStruct: ...

    @abc.abstractmethod
    def measures(self, x: Blocks) -> tuple[Numbers, ...]:
        """Returns the integers whose maxima over each block determine its scale."""

    @abc.abstractmethod
    def scaled(self, largest: Sequence[Largest], bits: Bits) -> Scale:
        """Returns the scale, given the maximum of each of `measures`."""

    @abc.abstractmethod
    def codes(self, x: Blocks, scale: Scale, bits: Bits, draws: Draws) -> Codes:
        """Returns the codes.  `draws` are uniform in [0, 1), and unused if rounding is to nearest."""

    @abc.abstractmethod
    def decode(self, codes: Codes, scale: Scale, bits: Bits) -> Blocks:
        """Returns the values of codes.  If codes and scale are zero, the values are zero."""

    def encode(self, x: Blocks, bits: Bits, draws: Draws) -> tuple[Codes, Scale]:
        """Returns (codes, scale)."""
        scale = self.scaled(largest_of(self.measures(x)), bits)
        return self.codes(x, scale, bits, draws), scale


def largest_of(numbers: Sequence[Numbers]) -> list[Largest]:
    """Returns the maxima of several arrays over each block, in one pass."""
    axis = numbers[0].ndim - 1
    start = [jnp.iinfo(jnp.int32).min] * len(numbers)
    found = jax.lax.reduce(tuple(numbers), tuple(map(jnp.int32, start)), _larger, (axis,))
    return [jnp.expand_dims(x, axis) for x in found]


def largest_of_each(numbers: Sequence[Numbers]) -> list[Largest]:
    """Returns the same maxima, one array after another."""
    return [jnp.max(x, axis=-1, keepdims=True) for x in numbers]


def _larger(some: Sequence[jax.Array], others: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.maximum, some, others))


@dataclasses.dataclass(frozen=True)
class Companded(Codec):
    r"""Signed levels that are denser near zero.

    Let L = 2^(b−1) − 1 and let the scale s be the block's largest |x| (bfloat16).  Code L + k represents

        s · sign(k) (c t + (1 − c) t²),  t = |k| / L,  |k| ≤ L.

    c = 1 gives uniform steps.  At c = 0.3 and 5 bits, the squared error on Gaussian and heavier tails is at
    most that of a 5-bit NF codebook, and neither direction needs a table.

    With rounding to nearest, momentum does not change if its step (1 − β) |g − m| is less than half the
    distance to the next level.  This is rare at β = 0.9 and 5 bits, and common at β = 0.99: if gradients
    change sign around an optimum, momentum overshoots, and more bits need not help.  At 3, 4, 5 and 6 bits
    the resulting error was 1.7, 1.9, 2.0 and 0.8, against 0.003 in float32; with stochastic rounding it was
    0.2, 0.03, 0.008 and 0.004.  Use `stochastic` in that case.

    Args:
        linear: c, from 1/256 to 1, rounded to a multiple of 1/256 so that products are exact.
        stochastic: round up with the probability that preserves the mean, instead of to nearest.

    Raises:
        ValueError: if c is out of range.

    >>> codes, scale = Companded(1.0).encode(jnp.linspace(-1, 1, 128), jnp.int32(2), jnp.zeros(128))
    >>> [int(code) for code in codes[::31]]
    [0, 0, 1, 1, 2]
    """

    linear: float = 0.3
    stochastic: bool = False

    def __post_init__(self):
        if not 1 / 256 <= self.linear <= 1:
            raise ValueError(f"linear must be from 1/256 to 1; got {self.linear!r}")

    @property
    def signed(self) -> bool:
        return True

    @property
    def least_bits(self) -> int:
        return 2

    @property
    def scale(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1,), jnp.bfloat16)

    def measures(self, x):
        return (_magnitude(x),)

    def scaled(self, largest, bits):
        return _real(largest[0]).astype(jnp.bfloat16)

    def codes(self, x, scale, bits, draws):
        s, levels, c = scale.astype(jnp.float32), _levels(bits), self._linear
        y = _at_most(jnp.abs(x) * (1 / jnp.where(s == 0, 1.0, s)), 1.0)
        if self.stochastic:
            k = jnp.clip(_nearest(self._place(y, levels) - 0.5), 0, levels.astype(jnp.int32) - 1)
            low, unit = k.astype(jnp.float32), 1 / (levels * levels)
            below, above = self._value(low, levels) * unit, self._value(low + 1, levels) * unit
            k = k + (draws * (above - below) < y - below).astype(jnp.int32)
        else:
            # The midpoint in value, not in place, gives exactly the nearest level.
            k = _nearest(self._place(y - (1 - c) / (4 * levels * levels), levels))
        return (levels.astype(jnp.int32) + jnp.where(x < 0, -k, k)).astype(jnp.uint8)

    def decode(self, codes, scale, bits):
        levels = _levels(bits)
        unit = scale.astype(jnp.float32) / (levels * levels)
        return self._value(codes.astype(jnp.float32) - levels, levels) * unit

    @property
    def _linear(self) -> float:
        return round(self.linear * 256) / 256

    def _value(self, k: jax.Array, levels: jax.Array) -> jax.Array:
        """Returns L² times the value of level k, exactly."""
        return k * (self._linear * levels + (1 - self._linear) * jnp.abs(k))

    def _place(self, y: jax.Array, levels: jax.Array) -> jax.Array:
        """Returns the place of y among the levels."""
        c, curve = self._linear, 1 - self._linear
        if curve == 0:
            return _at_most(y * levels, levels)
        base = c * levels / (2 * curve)
        root = jnp.sqrt(_at_least(y + c * c / (4 * curve), 0.0)) * (levels / curve**0.5)
        return _at_least(root, base) - base


def _levels(bits: jax.Array) -> jax.Array:
    """Returns the number of levels on each side of zero, with an axis for the elements of a block."""
    # A shift, because exp2 is not exact on every platform.
    return (jnp.left_shift(jnp.int32(1), bits).astype(jnp.float32) * 0.5 - 1)[..., None]


def straight_log2(x: jax.Array) -> jax.Array:
    """Returns ℓ(x) of `Logarithmic`: log₂ x, linear between powers of two, 0 to 0.086 below it.

    The arithmetic is exact.  The last bit of a true logarithm would depend on the shape in which it is
    computed.

    >>> straight_log2(jnp.array([0.5, 1.0, 3.0]))
    Array([-1. ,  0. ,  1.5], dtype=float32)
    """
    return (_bits(x) - _bits(jnp.float32(1))).astype(jnp.float32) / _MANTISSA


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _magnitude(x: jax.Array) -> jax.Array:
    """Returns the bits of |x|.  NaN has the largest; its sign bit, which processors may set, is cleared."""
    return _bits(x) & jnp.int32(0x7FFFFFFF)


def _real(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


# A compiler may fuse a product into a sum without rounding it, which would change codes; a comparison forces
# the rounding.  If x is NaN, these return the other operand, in one operation.


def _at_most(x: jax.Array, most: jax.Array | float) -> jax.Array:
    return jnp.where(x < most, x, most)


def _at_least(x: jax.Array, least: jax.Array | float) -> jax.Array:
    return jnp.where(x > least, x, least)


def _nearest(x: jax.Array) -> jax.Array:
    """Returns the nearest integer of x in [0, 2^22], halves to even; a value below 1 if x is negative.

    After adding 2^23, the lowest bit of a float is 1.  That takes two operations; a conversion takes
    several.
    """
    return _bits(x + _MANTISSA) - _bits(jnp.float32(_MANTISSA))


_MOST = jnp.iinfo(jnp.int32).max
_MANTISSA = 2.0**23  # a float32's bits, read as an integer, count its logarithm in steps of 2^−23


@dataclasses.dataclass(frozen=True)
class Logarithmic(Codec):
    r"""Non-negative levels that are uniform in the logarithm, from a block's smallest value to its largest.

    Read as an integer, the bits of a float32 are its base-2 logarithm, linear between powers of two: ℓ(x) =
    e + f for x = 2^e (1 + f), 0 ≤ f < 1.  A block stores two bytes: the power of two at or above its largest
    value, 2^h, and the one at or below its smallest non-zero value, 2^l, with h − l ≤ `range` and ≤ 2^b − 2.
    Code k represents the x with

        ℓ(x) = min(l + k (h − l) / (2^b − 1), h),

    where the step is rounded up to a multiple of 2^−23.  Smaller values, including zeros, become 2^l, so
    that division by a second moment never explodes; a block of zeros stays zero.  NaN becomes infinite.

    The range bounds an update.  Momentum rounded to nearest stops decaying at its smallest level, about a
    hundredth of its block's largest value, while v continues to decay.  With 32 binades, updates of a head's
    unused rows grew to 582 times the learning rate, and 5 + 4 bits cost 0.05 in loss; with 10 to 16 there
    was no visible effect.

    Levels are less than a binade apart, because the noise of wider steps amplifies itself: it widens the
    block, and therefore the steps.  At β₂ = 0.999 and noise of constant variance, 3 bits in 14 binades held
    most √v at a fifth of the true value, although the mean was right; in 6 binades they hold it within a
    factor of two.

    Args:
        range: the maximum number of binades that a block's levels span.
        stochastic: round up with the probability that preserves the mean of x (not of its logarithm),
            instead of to the nearest ℓ.  Rounding to nearest never registers a decay by less than half a
            step.

    Raises:
        ValueError: if range is not from 1 to 64.

    >>> x = jnp.exp2(jnp.arange(128) % 6)
    >>> codes, scale = Logarithmic().encode(x, jnp.int32(4), jnp.zeros(128))
    >>> scale, bool(jnp.allclose(Logarithmic().decode(codes, scale, jnp.int32(4)), x, rtol=1e-6))
    (Array([127, 132], dtype=uint8), True)
    """

    range: int = 14
    stochastic: bool = True

    def __post_init__(self):
        check_whole("range", self.range, 1, 64, "binades")

    @property
    def signed(self) -> bool:
        return False

    @property
    def least_bits(self) -> int:
        return 1

    @property
    def scale(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2,), jnp.uint8)

    def measures(self, x):
        log = _magnitude(x)
        return log, jnp.where(log > 0, -log, -_MOST)

    def scaled(self, largest, bits):
        maximum, smallest = largest[0], jnp.minimum(-largest[1], largest[0])
        above = jax.lax.shift_right_logical(maximum + jnp.int32(_MANTISSA - 1), jnp.int32(23))
        high = jnp.minimum(above, 255)
        span = jnp.clip(jnp.left_shift(1, bits) - 2, 1, self.range)[..., None]
        low = jnp.maximum(jnp.maximum(smallest >> 23, high - span), 1)
        low = jnp.minimum(low, 254)
        ends = jnp.concatenate([low, jnp.maximum(high, low + 1)], axis=-1)
        return jnp.where(maximum == 0, 0, ends).astype(jnp.uint8)

    def codes(self, x, scale, bits, draws):
        low, high = _ends(scale)
        step, top = _step(low, high, bits), _top(bits)
        place = (_magnitude(x) - (low << 23)).astype(jnp.float32) * (1 / step.astype(jnp.float32))
        if self.stochastic:
            last = top.astype(jnp.float32) - 0.75  # rounds down to the second largest level
            k = jnp.maximum(_nearest(_at_most(place, last) - 0.5), 0)
            below, above = _at(k, step, low, high), _at(k + 1, step, low, high)
            # NaN fails every comparison, so it is rounded up, to infinity.
            k = jnp.where(draws * (above - below) >= x - below, k, k + 1)
        else:
            k = jnp.maximum(_nearest(_at_most(place, top.astype(jnp.float32))), 0)
        return jnp.where(high == 0, 0, k).astype(jnp.uint8)

    def decode(self, codes, scale, bits):
        low, high = _ends(scale)
        found = _at(codes.astype(jnp.int32), _step(low, high, bits), low, high)
        return jnp.where(high == 0, 0.0, found)


def _ends(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the exponents of the smallest and the largest level of a block."""
    return scale[..., :1].astype(jnp.int32), scale[..., 1:].astype(jnp.int32)


def _top(bits: jax.Array) -> jax.Array:
    """Returns the largest code, with an axis for the elements of a block."""
    return (jnp.left_shift(jnp.int32(1), bits) - 1)[..., None]


def _step(low: jax.Array, high: jax.Array, bits: jax.Array) -> jax.Array:
    """Returns the distance of levels in units of 2^−23 binades, rounded up: the largest level is 2^high."""
    top, span = _top(bits), jnp.maximum(high - low, 1) << 23
    return (span + top - 1) // top


def _at(k: jax.Array, step: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Returns the value of code k.  Integer arithmetic until the end makes every compiler round alike."""
    return _real(jnp.minimum((low << 23) + k * step, high << 23))
