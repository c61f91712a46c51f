"""The fast Walsh-Hadamard transform, blockwise: an orthogonal rotation that spreads outliers."""

import functools
import operator

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant.numerics import rounding
from jaxquant.numerics.sharding import call_with_auto_axes, spec_of

# What its products are named in a program, so that they can be told from a model's own.
ROTATION = "hadamard_rotation"
# Factors of at most this size are multiplied as matrices, which suits matrix units and vector lanes.
_RADIX = 16


def check_block(block: object) -> int:
    """Returns a power of two, as an int, or a ValueError."""
    try:
        size = operator.index(block)  # pyright: ignore[reportArgumentType]
    except TypeError:
        size = 0
    if isinstance(block, bool) or size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard block is a power of two; got {block!r}")
    return size


def random_signs(key: jax.Array, length: int) -> jt.Float[jax.Array, " length"]:
    """Returns ±1 for each place along an axis: a hash of the key and the place, as stochastic rounding's.

    Args:
        key: a PRNG key.
        length: of the axis.

    >>> bool(jnp.all(jnp.abs(random_signs(jax.random.key(0), 64)) == 1))
    True
    """
    top = rounding.random_bits(key, (length,), "a random Hadamard rotation") >> 31
    return 1 - 2 * top.astype(jnp.float32)


def hadamard(
    x: jt.Float[jax.Array, "*shape"], block: int, axis: int = -1, key: jax.Array | None = None
) -> jt.Float[jax.Array, "*shape"]:
    """Multiplies blocks of neighbours along an axis by the orthonormal Hadamard matrix H_n / √n.

    H_1 = (1), H_2n = [[H_n, H_n], [H_n, −H_n]] (Sylvester's order).  The transform is its own inverse
    and keeps norms and inner products.  It costs O(log n) passes: one matrix of at most 16 × 16 per
    factor of n.

    Args:
        x: values.
        block: n, a power of two that divides the axis.
        axis: along which neighbours are mixed.
        key: where given, x is multiplied by `random_signs` of it along the axis first.  Two operands that
            are rotated by one key along what their product sums over have the same product as before.

    Raises:
        ValueError: a block that is no power of two, or does not divide the axis; no such axis.

    >>> hadamard(jnp.array([1.0, 1.0, 0.0, 2.0]), 2)
    Array([ 1.4142135,  0.       ,  1.4142135, -1.4142135], dtype=float32)
    """
    size = check_block(block)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"only floating-point arrays can be rotated; got {x.dtype}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is not an axis of an array of shape {x.shape}")
    axis %= x.ndim
    if x.shape[axis] % size:
        raise ValueError(
            f"a Hadamard block of {size} does not divide axis {axis} of shape {x.shape}"
        )
    rotate = functools.partial(_transform, size=size, axis=axis)
    return call_with_auto_axes(rotate, (x, key), lambda: spec_of(x))


def _transform(x: jax.Array, key: jax.Array | None, size: int, axis: int) -> jax.Array:
    if key is not None:
        along = tuple(-1 if a == axis else 1 for a in range(x.ndim))
        x = x * random_signs(key, x.shape[axis]).reshape(along).astype(x.dtype)
    before, length, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    inner = 1
    while inner < size:
        radix = min(_RADIX, size // inner)
        view = x.reshape(*before, length // (radix * inner), radix, inner, *after)
        matrix = jnp.asarray(_matrix(radix), x.dtype)
        with jax.named_scope(ROTATION):
            mixed = jax.lax.dot_general(
                matrix, view, (((1,), (axis + 1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
            )
        x = jnp.moveaxis(mixed, 0, axis + 1).reshape(*before, length, *after)
        inner *= radix
    return x


def rotate(x: jt.Float[jax.Array, "*shape"], block: int, axis: int) -> jax.Array:
    """`hadamard` of finite values without overflow: a coordinate saturates at the type's largest value.

    >>> rotate(jnp.array([3e38, 3e38]), 2, -1)[0]
    Array(3.4028235e+38, dtype=float32)
    """
    shrink, top = _shrink(block), float(jnp.finfo(x.dtype).max)
    turned = hadamard(x * shrink, block, axis)
    kept = jnp.clip(turned, -top * shrink, top * shrink)
    return jnp.where(jnp.isfinite(turned), kept, turned) * (1 / shrink)


def rotate_back(values: jt.Float[jax.Array, "*shape"], block: int, axis: int) -> jax.Array:
    """Rotates back from rotated coordinates; values beyond the type's largest become Inf, never NaN."""
    shrink, top = _shrink(block), float(jnp.finfo(values.dtype).max)
    return hadamard(jnp.clip(values, -top, top) * shrink, block, axis) * (1 / shrink)


def _shrink(block: int) -> float:
    """Returns the power of two that prevents overflow in a rotation: coordinates grow by up to √block."""
    return 2.0 ** -(block.bit_length() // 2)


@functools.cache
def _matrix(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)
