"""From blocks of optimizer state to codes of few bits, and back.

A codec turns each block of `BLOCK` numbers into codes below 2^bits and a few bytes of scale.  The number of
bits is data: one program serves them all.  `Companded` is for states of either sign (momentum),
`Logarithmic` for states that are never negative (second moments).
"""

import abc
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jaxtyping as jt

BLOCK = 128

Blocks = jt.Float32[jax.Array, "*blocks 128"]
Numbers = jt.Int32[jax.Array, "*blocks 128"]
Largest = jt.Int32[jax.Array, "*blocks 1"]
Codes = jt.UInt8[jax.Array, "*blocks 128"]
Scale = jt.Shaped[jax.Array, "*blocks entries"]
Bits = jt.Int32[jax.Array, "*#blocks"]
Draws = jt.Float32[jax.Array, "*blocks 128"]


class Codec(abc.ABC):
    """How blocks of state become codes; a frozen, hashable value.

    A block's scale comes from the largest of some whole numbers, which compilers find many at a time; of
    floats, they do not: those are in no order where one of them is no number.

    Attributes:
        signed: whether it holds negative numbers.
        least_bits: of a code, at least.
        scale: shape and type of what is kept beside each block's codes.
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
        """The whole numbers of which the largest in each block say what its scale is."""

    @abc.abstractmethod
    def scaled(self, largest: Sequence[Largest], bits: Bits) -> Scale:
        """The scale, from the largest of each of `measures`."""

    @abc.abstractmethod
    def codes(self, x: Blocks, scale: Scale, bits: Bits, draws: Draws) -> Codes:
        """The codes; `draws` are uniform in [0, 1), and unused where rounding is to nearest."""

    @abc.abstractmethod
    def decode(self, codes: Codes, scale: Scale, bits: Bits) -> Blocks:
        """What codes and scales stand for; codes and scales of zero are zeros."""

    def encode(self, x: Blocks, bits: Bits, draws: Draws) -> tuple[Codes, Scale]:
        """Codes and scales."""
        scale = self.scaled(largest_of(self.measures(x)), bits)
        return self.codes(x, scale, bits, draws), scale


def largest_of(numbers: Sequence[Numbers]) -> list[Largest]:
    """The largest of each in every block, in one pass."""
    axis = numbers[0].ndim - 1
    start = [jnp.iinfo(jnp.int32).min] * len(numbers)
    found = jax.lax.reduce(tuple(numbers), tuple(map(jnp.int32, start)), _larger, (axis,))
    return [jnp.expand_dims(x, axis) for x in found]


def largest_of_each(numbers: Sequence[Numbers]) -> list[Largest]:
    """The same, one after another."""
    return [jnp.max(x, axis=-1, keepdims=True) for x in numbers]


def _larger(some: Sequence[jax.Array], others: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(map(jnp.maximum, some, others))


@dataclasses.dataclass(frozen=True)
class Companded(Codec):
    r"""Signed levels that lie denser towards zero.

    With L = 2^(b−1) − 1 and the block's largest |x| as scale s (bfloat16), code L + k stands for

        s · sign(k) (c t + (1 − c) t²),  t = |k| / L,  |k| ≤ L.

    c = 1 gives even steps.  At c = 0.3 and 5 bits the squared error on Gaussian and heavier tails is that of
    a 5-bit NF codebook, or less, and neither direction looks anything up.

    To nearest, a momentum whose step (1 − β) |g − m| is less than half of the way to the next level stays
    where it is.  At β = 0.9 and 5 bits that is rare.  At β = 0.99 it is the rule: where gradients change
    their signs around an optimum, momentum drives on past it, and more bits need not help.  At 3, 4, 5 and 6
    bits such an error was 1.7, 1.9, 2.0 and 0.8, where float32 has 0.003; rounded stochastically it was 0.2,
    0.03, 0.008 and 0.004.  Then use `stochastic`.

    Args:
        linear: c, from 1/256 to 1; the nearest multiple of 1/256 is taken, whose products are exact.
        stochastic: round up with the probability that keeps the mean, instead of to nearest.

    Raises:
        ValueError: c out of range.

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
            # Midway between two levels in value, not in place: exactly the nearest level.
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
        """L² times the value of the level k from zero, without any rounding."""
        return k * (self._linear * levels + (1 - self._linear) * jnp.abs(k))

    def _place(self, y: jax.Array, levels: jax.Array) -> jax.Array:
        """Where among the levels y lies."""
        c, curve = self._linear, 1 - self._linear
        if curve == 0:
            return _at_most(y * levels, levels)
        base = c * levels / (2 * curve)
        root = jnp.sqrt(_at_least(y + c * c / (4 * curve), 0.0)) * (levels / curve**0.5)
        return _at_least(root, base) - base


def _levels(bits: jax.Array) -> jax.Array:
    """Levels on each side of zero, with an axis for the elements of a block."""
    # Shifted: exp2 is not exact on every platform.
    return (jnp.left_shift(jnp.int32(1), bits).astype(jnp.float32) * 0.5 - 1)[..., None]


def straight_log2(x: jax.Array) -> jax.Array:
    """ℓ(x) of `Logarithmic`: log₂ x, straight between powers of two, 0 to 0.086 below it.

    It is exact arithmetic, where a logarithm's last bit depends on the shape in which it is computed.

    >>> straight_log2(jnp.array([0.5, 1.0, 3.0]))
    Array([-1. ,  0. ,  1.5], dtype=float32)
    """
    return (_bits(x) - _bits(jnp.float32(1))).astype(jnp.float32) / _MANTISSA


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _magnitude(x: jax.Array) -> jax.Array:
    """The bits of |x|, which is NaN's largest too: processors make NaNs with the sign bit set."""
    return _bits(x) & jnp.int32(0x7FFFFFFF)


def _real(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


# A product that a sum takes may be rounded or not, as a compiler likes, and a code be another; one that has
# been compared is rounded.  And where one operand is no number these give the other, in one operation.


def _at_most(x: jax.Array, most: jax.Array | float) -> jax.Array:
    return jnp.where(x < most, x, most)


def _at_least(x: jax.Array, least: jax.Array | float) -> jax.Array:
    return jnp.where(x > least, x, least)


def _nearest(x: jax.Array) -> jax.Array:
    """The nearest whole number of an x from 0 to 2^22, halves to even; something below 1 where x is negative.

    Added to 2^23, a float's lowest bit is 1: two operations, where conversions with their special cases are
    several.
    """
    return _bits(x + _MANTISSA) - _bits(jnp.float32(_MANTISSA))


_MOST = jnp.iinfo(jnp.int32).max
_MANTISSA = 2.0**23  # a float32's bits, read as an integer, count its logarithm in steps of 2^−23


@dataclasses.dataclass(frozen=True)
class Logarithmic(Codec):
    r"""Non-negative levels that are even in the logarithm, from a block's smallest to its largest.

    Read as an integer, a float32's bits are its logarithm to base 2, straight between powers of two:
    ℓ(x) = e + f for x = 2^e (1 + f), 0 ≤ f < 1.  A block keeps two bytes: the power of two at or above its
    largest value, 2^h, and the one at or below its smallest that is not zero, 2^l, with h − l ≤ `range`
    and ≤ 2^b − 2.  Code k stands for the x with

        ℓ(x) = min(l + k (h − l) / (2^b − 1), h),

    the step rounded up to a multiple of 2^−23.  Smaller values, zeros among them, become 2^l, so that what
    a second moment divides never explodes; a block of zeros alone stays so.  What is no number becomes
    infinite.

    The range keeps an update bounded.  A momentum rounded to nearest stops decaying at its smallest level,
    some hundredth of its block's largest, while v decays on: with 32 binades, updates of a head's unused rows
    grew to 582 times the learning rate, and 5 + 4 bits cost 0.05 in loss; with 10 to 16, nothing seen.

    Levels lie less than a binade apart, since the noise of wider ones feeds itself: it widens the block, and
    so the levels.  Over β₂ = 0.999 and noise of one variance, 3 bits in 14 binades held most √v at a fifth of
    what it was, though their mean was right; in 6 binades they hold it within a factor of two.

    Args:
        range: binades that a block's levels span at most.
        stochastic: round up with the probability that keeps the mean of x (not of its logarithm), instead
            of to the nearest ℓ.  Nearest rounding never registers a decay by less than half a step.

    Raises:
        ValueError: range that is not 1 to 64.

    >>> x = jnp.exp2(jnp.arange(128) % 6)
    >>> codes, scale = Logarithmic().encode(x, jnp.int32(4), jnp.zeros(128))
    >>> scale, bool(jnp.allclose(Logarithmic().decode(codes, scale, jnp.int32(4)), x, rtol=1e-6))
    (Array([127, 132], dtype=uint8), True)
    """

    range: int = 14
    stochastic: bool = True

    def __post_init__(self):
        is_whole = isinstance(self.range, int) and not isinstance(self.range, bool)
        if not is_whole or not 1 <= self.range <= 64:
            raise ValueError(
                f"range must be an integer number of binades from 1 to 64; got {self.range!r}"
            )

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
            last = top.astype(jnp.float32) - 0.75  # rounded down to the last level but one
            k = jnp.maximum(_nearest(_at_most(place, last) - 0.5), 0)
            below, above = _at(k, step, low, high), _at(k + 1, step, low, high)
            # What is no number is not below anything: it goes up, to infinity.
            k = jnp.where(draws * (above - below) >= x - below, k, k + 1)
        else:
            k = jnp.maximum(_nearest(_at_most(place, top.astype(jnp.float32))), 0)
        return jnp.where(high == 0, 0, k).astype(jnp.uint8)

    def decode(self, codes, scale, bits):
        low, high = _ends(scale)
        found = _at(codes.astype(jnp.int32), _step(low, high, bits), low, high)
        return jnp.where(high == 0, 0.0, found)


def _ends(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The exponents of a block's smallest and largest level."""
    return scale[..., :1].astype(jnp.int32), scale[..., 1:].astype(jnp.int32)


def _top(bits: jax.Array) -> jax.Array:
    """The uppermost code, with an axis for the elements of a block."""
    return (jnp.left_shift(jnp.int32(1), bits) - 1)[..., None]


def _step(low: jax.Array, high: jax.Array, bits: jax.Array) -> jax.Array:
    """From one level to the next in units of 2^−23 binades, rounded up: the uppermost is 2^high."""
    top, span = _top(bits), jnp.maximum(high - low, 1) << 23
    return (span + top - 1) // top


def _at(k: jax.Array, step: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The value of code k, in whole numbers until the end: no compiler rounds it otherwise."""
    return _real(jnp.minimum((low << 23) + k * step, high << 23))
