"""From blocks of optimizer state to codes of few bits, and back.

A codec turns each block of `BLOCK` numbers into codes below 2^bits and a few bytes of scale.  The number of
bits is data: one program serves them all.  `Companded` is for states of either sign (momentum),
`Logarithmic` for states that are never negative (second moments).
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import jaxtyping as jt

BLOCK = 128

Blocks = jt.Float32[jax.Array, "*blocks 128"]
Codes = jt.UInt8[jax.Array, "*blocks 128"]
Scale = jt.Shaped[jax.Array, "*blocks entries"]
Bits = jt.Int32[jax.Array, "*#blocks"]
Draws = jt.Float32[jax.Array, "*blocks 128"]


class Codec(Protocol):
    """How blocks of state become codes; a frozen, hashable value.

    Attributes:
        signed: whether it holds negative numbers.
        least_bits: of a code, at least.
        scale: shape and type of what is kept beside each block's codes.
    """

    @property
    def signed(self) -> bool: ...
    @property
    def least_bits(self) -> int: ...
    @property
    def scale(self) -> jax.ShapeDtypeStruct: ...
    def encode(self, x: Blocks, bits: Bits, draws: Draws) -> tuple[Codes, Scale]:
        """Codes and scales; `draws` are uniform in [0, 1), and unused where rounding is to nearest."""
        ...

    def decode(self, codes: Codes, scale: Scale, bits: Bits) -> Blocks:
        """What codes and scales stand for; codes and scales of zero are zeros."""
        ...


@dataclasses.dataclass(frozen=True)
class Companded:
    r"""Signed levels that lie denser towards zero.

    With L = 2^(b−1) − 1 and the block's largest |x| as scale s (bfloat16), code L + k stands for

        s · sign(k) (c t + (1 − c) t²),  t = |k| / L,  |k| ≤ L.

    c = 1 gives even steps.  At c = 0.3 and 5 bits the squared error on Gaussian and heavier tails is that of
    a 5-bit NF codebook, or less, and neither direction looks anything up.

    Args:
        linear: c, in (0, 1].
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
        if not 0 < self.linear <= 1:
            raise ValueError(f"linear is in (0, 1]; got {self.linear!r}")

    @property
    def signed(self) -> bool:
        return True

    @property
    def least_bits(self) -> int:
        return 2

    @property
    def scale(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1,), jnp.bfloat16)

    def encode(self, x, bits, draws):
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.bfloat16)
        s = scale.astype(jnp.float32)
        levels = _levels(bits)
        y = jnp.minimum(jnp.abs(x) * (1 / jnp.where(s == 0, 1.0, s)), 1.0)
        if self.stochastic:
            low = jnp.floor(self._place(y) * levels)
            below, above = self._value(low / levels), self._value((low + 1) / levels)
            k = low + (draws * (above - below) < y - below).astype(jnp.float32)
        else:
            # Midway between two levels in value, not in place: exactly the nearest level.
            k = jnp.round(self._place(y - (1 - self.linear) / (4 * levels * levels)) * levels)
        k = jnp.minimum(k, levels)
        return (levels + jnp.where(x < 0, -k, k)).astype(jnp.uint8), scale

    def decode(self, codes, scale, bits):
        levels = _levels(bits)
        k = codes.astype(jnp.float32) - levels
        s = scale.astype(jnp.float32)
        even, curved = s * self.linear / levels, s * (1 - self.linear) / (levels * levels)
        return k * (even + curved * jnp.abs(k))

    def _value(self, t: jax.Array) -> jax.Array:
        return t * (self.linear + (1 - self.linear) * t)

    def _place(self, y: jax.Array) -> jax.Array:
        """t with value y; 0 where y is negative."""
        c, curve = self.linear, 1 - self.linear
        y = jnp.maximum(y, 0.0)
        return y if curve == 0 else (jnp.sqrt(c * c + 4 * curve * y) - c) / (2 * curve)


def _levels(bits: jax.Array) -> jax.Array:
    """Levels on each side of zero, with an axis for the elements of a block."""
    return _power(bits) * 0.5 - 1


def _power(bits: jax.Array) -> jax.Array:
    """2^bits, with an axis for the elements of a block; exp2 is not exact on every platform."""
    return jnp.left_shift(jnp.int32(1), bits).astype(jnp.float32)[..., None]


_MANTISSA = 2.0**23  # a float32's bits, read as an integer, count its logarithm in steps of 2^−23


@dataclasses.dataclass(frozen=True)
class Logarithmic:
    r"""Non-negative levels that are even in the logarithm, from a block's smallest to its largest.

    Read as an integer, a float32's bits are its logarithm to base 2, straight between powers of two:
    ℓ(x) = e + f for x = 2^e (1 + f), 0 ≤ f < 1.  A block keeps two bytes: the power of two at or above its
    largest value, 2^h, and the one at or below its smallest that is not zero, 2^l, with h − l ≤ `range`.
    Code k stands for the x with

        ℓ(x) = l + k (h − l) / (2^b − 1).

    Smaller values, zeros among them, become 2^l, so that what a second moment divides never explodes; a
    block of zeros alone stays so.  What is no number becomes infinite.

    Args:
        range: binades that a block's levels span at most.
        stochastic: round up with the probability that keeps the mean of x (not of its logarithm), instead
            of to the nearest ℓ.  Nearest rounding never registers a decay by less than half a step.

    Raises:
        ValueError: range that is not 1 to 64.

    >>> x = jnp.exp2(jnp.arange(128) % 8)
    >>> codes, scale = Logarithmic().encode(x, jnp.int32(3), jnp.zeros(128))
    >>> scale, bool((Logarithmic().decode(codes, scale, jnp.int32(3)) == x).all())
    (Array([127, 134], dtype=uint8), True)
    """

    range: int = 32
    stochastic: bool = True

    def __post_init__(self):
        if isinstance(self.range, bool) or not 1 <= self.range <= 64:
            raise ValueError(f"range is 1 to 64 binades; got {self.range!r}")

    @property
    def signed(self) -> bool:
        return False

    @property
    def least_bits(self) -> int:
        return 1

    @property
    def scale(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2,), jnp.uint8)

    def encode(self, x, bits, draws):
        log = _bits(x)
        maximum = jnp.max(x, axis=-1, keepdims=True)
        smallest = _bits(jnp.min(jnp.where(x > 0, x, maximum), axis=-1, keepdims=True))
        largest = _bits(maximum)
        high = jnp.minimum((largest + jnp.int32(_MANTISSA - 1)) >> 23, 255)
        low = jnp.maximum(jnp.maximum(smallest >> 23, high - self.range), 1)
        high = jnp.where(largest == 0, 0, jnp.maximum(high, low + 1))
        low = jnp.where(largest == 0, 0, low)
        step, top = _steps(low, high, bits)
        place = jnp.clip((log - (low << 23)).astype(jnp.float32) * (1 / step), 0.0, top)
        if self.stochastic:
            k = jnp.minimum(jnp.floor(place), top - 1)
            below, above = _at(k, step, low), _at(k + 1, step, low)
            k = k + (draws * (above - below) < x - below).astype(jnp.float32)
        else:
            k = jnp.round(place)
        codes = jnp.where(high == 0, 0.0, k).astype(jnp.uint8)
        return codes, jnp.concatenate([low, high], axis=-1).astype(jnp.uint8)

    def decode(self, codes, scale, bits):
        low, high = scale[..., :1].astype(jnp.int32), scale[..., 1:].astype(jnp.int32)
        step, _ = _steps(low, high, bits)
        return jnp.where(high == 0, 0.0, _at(codes.astype(jnp.float32), step, low))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _steps(low: jax.Array, high: jax.Array, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A step in units of 2^−23 binades, and the uppermost code."""
    top = _power(bits) - 1
    return jnp.maximum((high - low).astype(jnp.float32), 1.0) * _MANTISSA / top, top


def _at(k: jax.Array, step: jax.Array, low: jax.Array) -> jax.Array:
    """The value of code k."""
    return jax.lax.bitcast_convert_type((low << 23) + (k * step).astype(jnp.int32), jnp.float32)
