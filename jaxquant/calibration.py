"""Calibration: from a tensor to the range that its grid must cover."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxtyping as jt

Calibration = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def absmax(x: jt.Float[jax.Array, "*shape"], axes: tuple[int, ...]) -> jt.Float[jax.Array, "..."]:
    """The largest magnitude over `axes`, which stay as axes of size 1: no value is clipped.

    Args:
        x: values.
        axes: what shares one scale.

    Returns:
        max |x| over `axes`, zero where there is nothing to take it of.

    >>> absmax(jnp.array([[1.0, -3.0], [2.0, 0.5]]), (1,))
    Array([[3.],
           [2.]], dtype=float32)
    """
    return jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
