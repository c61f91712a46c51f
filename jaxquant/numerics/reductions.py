"""The reduction that ranges are found by: one that no NaN and no Inf gets lost in, whatever compiles it.

A maximum that meets a NaN gives NaN by XLA's definition, but not by all that compute it: XLA's own CPU
library loses NaN in float32 arrays of 4096 elements and more, and collectives of several devices may.  So
none is given to it: what is not finite goes in as Inf, which is the largest everywhere.
"""

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
