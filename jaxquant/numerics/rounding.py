"""Rounding of real numbers to integers, and the gradient that passes through it.

A format scales its own grid to the integers and calls one of these, so each rounding mode is written
once and serves every format.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxtyping as jt

from jaxquant.stats import renamed_names

__getattr__ = renamed_names(globals(), {"mixed": "mix_bits"})

_PARTS = 256  # of a sum on a GPU, which one of its threads adds up


def nearest(
    x: jt.Float[jax.Array, "*shape"], key: jax.Array | None = None
) -> jt.Float[jax.Array, "*shape"]:
    """Rounds to the nearest integer, ties to even.

    Args:
        x: values.
        key: not needed; accepted so that every rounding mode is called alike.

    >>> nearest(jnp.array([0.5, 1.5, -0.6]))
    Array([ 0.,  2., -1.], dtype=float32)
    """
    del key
    return jnp.round(x)


def stochastic(
    x: jt.Float[jax.Array, "*shape"], key: jax.Array | None = None
) -> jt.Float[jax.Array, "*shape"]:
    """Rounds up with probability x − ⌊x⌋ and down otherwise, so that E[stochastic(x)] = x.

    Each element's draw is a hash of the key and of its place in the array (row by row), so that it is
    the same however the array is sharded, and costs a few integer operations.

    Args:
        x: values.
        key: a PRNG key; the same key repeats the same result.

    Raises:
        ValueError: no key.

    Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3.1.

    >>> draws = stochastic(jnp.full(10_000, 0.25), jax.random.key(0))
    >>> bool(abs(draws.mean() - 0.25) < 0.02)
    True
    """
    return _up_where(x, random_bits(key, x.shape, "stochastic rounding"))


def dithered(
    x: jt.Float[jax.Array, "*shape"], key: jax.Array | None = None
) -> jt.Float[jax.Array, "*shape"]:
    """Rounds up where x − ⌊x⌋ exceeds a threshold that steps evenly from element to element.

    The thresholds are the fractional parts of u + i/φ, with i an element's place in the array, φ the
    golden ratio, and u uniform by the key.  Each result is as unbiased as `stochastic`'s, but neighbours'
    thresholds are spread evenly, so that the error of a sum over n neighbours grows like log n
    instead of √n.

    Args:
        x: values.
        key: a PRNG key; the same key repeats the same result.

    Raises:
        ValueError: no key.

    Source: Weyl's sequence as ordered dither; Wu 2021, arXiv 2102.10732, on dither rounding.

    >>> draws = dithered(jnp.full(10_000, 0.25), jax.random.key(0))
    >>> bool(abs(draws.mean() - 0.25) < 0.001)
    True
    """
    first, _ = _words("dithered rounding", key)
    golden = jnp.uint32(0x9E3779B9)  # 2^32 / φ
    return _up_where(x, first + _indices(x.shape) * golden)


@dataclasses.dataclass(frozen=True)
class Eden:
    """EDEN: elements are rounded to nearest, and their scales are corrected to be unbiased.

    For each block of `block` neighbours x of a tensor in randomly rotated coordinates, with values
    x̂ = s · q rounded to nearest, the scales are multiplied by

        c = ⟨x, x⟩ / ⟨x, x̂⟩,

    so that ⟨x, c · x̂⟩ = ⟨x, x⟩ in every draw of the rotation, and E[c · x̂] = x under one that is
    uniformly random.  The random Hadamard rotation is nearly so for a block with many values that are
    alike in size; a block of two values has a bias that no sign removes.  The corrected scales are
    rounded to their format stochastically (MS-EDEN).  The squared error is that of rounding to nearest
    and a little more, less than half that of stochastic rounding.

    A `Quantizer` with this rounding needs a key, a `Block`'s format or blocks, and one contracting axis
    that `block` divides; `BackwardOperands` with the same `hadamard` rotates what it quantizes.

    Args:
        block: how many neighbours one correction is for: the block of the rotation.
        top: the largest scale of a two-level Block before the correction, which may raise it; None for
            the format's own largest.

    Raises:
        ValueError: a block below 1 or a top that is no positive number.

    Source: Vargaftik et al. 2022, arXiv 2108.08842, for EDEN; Panferov et al. 2026, arXiv 2601.22813,
    for MS-EDEN and the top of 255.99, with which E4M3's scales have room for the correction.

    >>> Eden(128)(jnp.array([0.5, 1.5, -0.6]))
    Array([ 0.,  2., -1.], dtype=float32)
    """

    block: int
    top: float | None = 255.99

    def __post_init__(self):
        if not isinstance(self.block, int) or isinstance(self.block, bool) or self.block < 1:
            raise ValueError(f"Eden takes a block of at least 1 neighbour; got {self.block!r}")
        is_number = isinstance(self.top, int | float) and not isinstance(self.top, bool)
        if self.top is not None and not (is_number and 0 < self.top < float("inf")):
            raise ValueError(
                f"Eden takes a top that is a positive number or None; got {self.top!r}"
            )

    def __call__(
        self, x: jt.Float[jax.Array, "*shape"], key: jax.Array | None = None
    ) -> jt.Float[jax.Array, "*shape"]:
        """Rounds elements to nearest; `key` is for the scales."""
        return nearest(x, key)


def needs_key(rounding: Callable[..., jax.Array]) -> bool:
    """Returns whether a rounding draws at random.

    >>> needs_key(stochastic), needs_key(nearest)
    (True, False)
    """
    return rounding in (stochastic, dithered) or isinstance(rounding, Eden)


def random_bits(
    key: jax.Array | None, shape: tuple[int, ...], use: str = "a random draw"
) -> jt.UInt[jax.Array, "*shape"]:
    """Returns 32 random bits for each element: a hash of the key and of its place, row by row.

    Args:
        key: a PRNG key.
        shape: of the result.
        use: what it is for, which errors name.

    Raises:
        ValueError: no key, or something else.
    """
    first, second = _words(use, key)
    return mix_bits(mix_bits(_indices(shape) ^ first) + second)


def _words(use: str, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns two random 32-bit words from a key, the seeds of all elements' draws."""
    if key is None:
        raise ValueError(f"{use} needs a PRNG key, as jax.random.key(0); got key=None")
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (is_typed and key.ndim == 0) and not (dtype == jnp.uint32 and key.ndim == 1):
        raise ValueError(f"{use} takes one PRNG key, as jax.random.key(0); got {key!r}")
    words = (jax.random.key_data(key) if is_typed else key).ravel()
    low, high = (
        mix_bits(words[0] ^ jnp.uint32(0x85EBCA6B)),
        mix_bits(words[-1] ^ jnp.uint32(0xC2B2AE35)),
    )
    return jax.lax.platform_dependent(
        low + high, low ^ high, cuda=_mixed_together, default=_mixed_alone
    )


def _mixed_alone(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    return mix_bits(first), mix_bits(second)


def _mixed_together(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same numbers by one kernel on a GPU."""
    first, second = mix_bits(jnp.stack([first, second]))
    return first, second


def _indices(shape: tuple[int, ...]) -> jax.Array:
    """Returns each element's place, counted row by row modulo 2^32; an iota per axis, so that it shards."""
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        place = place + along * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return place


def mix_bits(word: jax.Array) -> jax.Array:
    """Returns a bijection of 32-bit words whose every output bit depends on every input bit."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def _up_where(x: jax.Array, word: jax.Array) -> jax.Array:
    """Returns ⌊x⌋, plus one if the fraction exceeds the word's top 24 bits as a number in [0, 1)."""
    low = jnp.floor(x)
    threshold = (word >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)
    # Comparing keeps integers fixed: floor(x + u) would lose them where x + u rounds up.
    return low + (threshold < (x - low).astype(jnp.float32)).astype(x.dtype)


def key_of(x: jt.Float[jax.Array, "*shape"], seed: int = 0) -> jax.Array:
    """Returns a PRNG key from the content of an array, for where no key can be passed.

    The key, in JAX's raw form, is `seed` beside the wrapped sum of hashes of the values and their
    places.  Integer sums do not depend on their order, so the key is the same under any sharding; it
    changes with the values, and values that are the same get the same draws.

    >>> key_of(jnp.ones(3)), key_of(jnp.ones(4))
    (Array([         0, 1122135831], dtype=uint32), Array([        0, 511603173], dtype=uint32))
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # Mixed with their places, or powers of two, whose bits are few, would have few sums.
    words = mix_bits(bits ^ mix_bits(_indices(x.shape)))
    total = jax.lax.platform_dependent(words, cuda=_sum_by_parts, default=_sum)
    return jnp.stack([jnp.uint32(seed), total])


def _sum(words: jax.Array) -> jax.Array:
    return jnp.sum(words, dtype=jnp.uint32)


def _sum_by_parts(words: jax.Array) -> jax.Array:
    """The same number on a GPU, by kernels that are there anyway.

    Parts are summed where the words are made, and the parts where their sum is mixed.  A whole sum would be
    a kernel of its own, behind one that writes the words.
    """
    if not all(isinstance(n, int) for n in words.shape) or words.size <= _PARTS:
        return _sum(words)
    # Blocks of the longest axis, so that no other's sharding is touched.
    axis = max(range(words.ndim), key=words.shape.__getitem__)
    n = words.shape[axis]
    parts = math.gcd(n, max(1, _PARTS * n // words.size))
    blocks = words.reshape(*words.shape[:axis], parts, n // parts, *words.shape[axis + 1 :])
    return _sum(jax.lax.optimization_barrier(jnp.sum(blocks, axis + 1, jnp.uint32)))


@jax.custom_vjp
def straight_through(
    x: jt.Float[jax.Array, "*shape"], value: jt.Float[jax.Array, "*shape"]
) -> jt.Float[jax.Array, "*shape"]:
    """Returns `value` with the gradient of `x`: ∂/∂x = 1, ∂/∂value = 0.

    Args:
        x: what was rounded.
        value: what it was rounded to, of the same shape and type.

    Reverse mode only: JAX refuses forward mode (jvp, jacfwd) on a custom_vjp.

    Source: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".

    >>> jax.grad(lambda x: straight_through(x, jnp.round(x)) ** 2)(1.2)
    Array(2., dtype=float32, weak_type=True)
    """
    return value


def _straight_through_forward(x, value):
    # Through the rule again, so that second derivatives are straight-through too.
    return straight_through(x, value), None


def _straight_through_backward(_, gradient):
    return gradient, None


straight_through.defvjp(_straight_through_forward, _straight_through_backward)
