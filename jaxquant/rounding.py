"""Rounding of real numbers to integers, and the gradient that passes through it.

A format scales its own grid to the integers and calls one of these, so each rounding mode is written
once and serves every format.
"""

import jax
import jax.numpy as jnp
import jaxtyping as jt


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
    if key is None:
        raise ValueError("stochastic rounding needs a PRNG key; got key=None")
    low = jnp.floor(x)
    # Comparing keeps integers fixed: floor(x + u) would lose them where x + u rounds up.
    return low + (jax.random.uniform(key, x.shape, x.dtype) < x - low).astype(x.dtype)


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
