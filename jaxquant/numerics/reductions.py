"""The reduction that ranges are found by: one that no NaN and no Inf gets lost in, whatever compiles it.

A maximum that meets a NaN gives NaN by XLA's definition, but not by all that compute it: XLA's own CPU
library loses NaN in float32 arrays of 4096 elements and more, and collectives of several devices may.  So
none is given to it: what is not finite goes in as Inf, which is the largest everywhere.
"""

import functools

import jax
import jax.numpy as jnp
import jaxtyping as jt

from jaxquant.formats.base import barrier_off_gpu


def largest(
    x: jt.Float[jax.Array, "*shape"], axes: tuple[int, ...] | None = None
) -> jt.Float[jax.Array, "..."]:
    """Returns max(0, max x) over `axes`, which stay with size 1; NaN where a NaN or an Inf is among them.

    Args:
        x: values; −Inf counts as Inf does.
        axes: what the maximum is taken over; all where not given, none of which need hold anything.

    >>> largest(jnp.array([[1.0, -3.0], [-jnp.inf, 2.0], [-4.0, -5.0]]), (1,)).ravel()
    Array([ 1., nan,  0.], dtype=float32)
    """
    axes = tuple(range(x.ndim)) if axes is None else axes
    # One instruction: a NaN compares as false.
    known = jnp.where(jnp.abs(x) < jnp.inf, x, jnp.inf)
    if len(axes) > 1 and x.ndim - 1 in axes:
        # The contiguous axis first, by itself: a CPU's compiler is slow at all axes at once.
        known = jnp.max(known, axis=-1, keepdims=True, initial=0)
        known = barrier_off_gpu(known)
    found = jnp.max(known, axis=axes, keepdims=True, initial=0)
    return jnp.where(found < jnp.inf, found, jnp.nan)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest_magnitude(
    x: jt.Float[jax.Array, "*shape"], axes: tuple[int, ...]
) -> jt.Float[jax.Array, "..."]:
    """Returns max |x| over `axes`, which stay with size 1; NaN where a NaN or an Inf is among them.

    Args:
        x: values.
        axes: what the maximum is taken over; none of which need hold anything.

    >>> largest_magnitude(jnp.array([[1.0, -3.0], [-jnp.inf, 2.0]]), (1,)).ravel()
    Array([ 3., nan], dtype=float32)
    """
    by_bits = _largest_by_bits if x.dtype == jnp.float32 else _largest_magnitude
    magnitude = functools.partial(_largest_magnitude, axes=axes)
    return jax.lax.platform_dependent(
        x, cuda=functools.partial(by_bits, axes=axes), default=magnitude
    )


@largest_magnitude.defjvp
def _largest_magnitude_jvp(axes, primals, tangents):
    return jax.jvp(functools.partial(_largest_magnitude, axes=axes), primals, tangents)


def _largest_magnitude(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return largest(jnp.abs(x), axes)


def _largest_by_bits(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The same by float32's bits, which are in the order of magnitudes, those of Inf and NaN last.

    Integers need no choice before the reduction, which a GPU may make by a pass of its own.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    most = jnp.max(bits, axis=axes, keepdims=True, initial=0)
    found = jax.lax.bitcast_convert_type(most, jnp.float32)
    return jnp.where(found < jnp.inf, found, jnp.nan)
