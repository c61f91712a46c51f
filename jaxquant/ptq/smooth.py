"""Scales for a layer's input channels, and the product that applies them: y = (s W)ᵀ (x / s).

In floating point the scales s change nothing.  Quantized, they decide which channels get the finer share of
the grid: `awq_scale` chooses them for a quantized weight alone, `smoothquant_scale` for a quantized weight
and quantized inputs.  `jaxquant.operations.smoothed.Smoothed` wraps a layer's product with them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping as jt

from jaxquant.numerics.qarray import fake_quant
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.reductions import largest
from jaxquant.ptq.solvers import check_grid, check_layer, least_of, objective
from jaxquant.ptq.statistics import InputStatistics

# Channels below this share of the largest one count as that large, so that no scale is zero or Inf.
_LEAST_SHARE = 1e-5


def awq_scale(
    weight: jt.Float[jax.Array, "n m"],
    state: InputStatistics,
    quantizer: Quantizer,
    *,
    grid: int = 20,
) -> jt.Float[jax.Array, " n"]:
    """Returns activation-aware scales: input channels that are large are given the finer share of the grid.

    s_j = (mean |x_j| / g)^α with g the geometric mean over channels, and α among 0, 1/grid, …, 1 the one
    with the least objective of Ŵ = Q(s W) / s, for inputs divided by s.  Equal objectives take the smaller
    α, and α = 0 is rounding to nearest: on the inputs seen the result is never worse than that.

    Args:
        weight: W, inputs by outputs.
        state: of the inputs, with their Hessian.
        quantizer: how s W is quantized along axis 0.
        grid: steps of the search.

    Returns:
        s, positive: what the weight's rows are multiplied with and the inputs divided by.

    Raises:
        ValueError: shapes that do not fit; statistics without a Hessian; a grid below 1.

    Source: Lin et al. 2023, arXiv 2306.00978, section 3.2.

    >>> from jaxquant.formats import Int
    >>> x = jax.random.normal(jax.random.key(0), (64, 8)) * jnp.array([30.0] + [1.0] * 7)
    >>> weight = jax.random.normal(jax.random.key(1), (8, 4))
    >>> from jaxquant.ptq.statistics import statistics, update
    >>> state = update(statistics(8), x)
    >>> scale = awq_scale(weight, state, Quantizer(Int(3), "channel"))
    >>> bool(scale[0] > scale[1:].max())
    True
    """
    check_layer(weight, state.hessian, quantizer)
    check_grid(grid)
    return _awq_scale(weight, state.absmean, state.hessian, quantizer, grid)


@functools.partial(jax.jit, static_argnames="grid")
def _awq_scale(
    weight: jax.Array, absmean: jax.Array, hessian: jax.Array, quantizer: Quantizer, grid: int
) -> jax.Array:
    weight = weight.astype(jnp.float32)
    logs = jnp.log(_floor(absmean))
    logs = logs - jnp.mean(logs)

    def loss(exponent: jax.Array) -> jax.Array:
        scale = jnp.exp(exponent * logs)[:, None]
        return objective(weight, fake_quant(weight * scale, quantizer, 0) / scale, hessian)

    exponents = jnp.linspace(0, 1, grid + 1)
    return jnp.exp(exponents[least_of(jax.lax.map(loss, exponents))] * logs)


def smoothquant_scale(
    weight: jt.Float[jax.Array, "n m"], state: InputStatistics, alpha: float = 0.5
) -> jt.Float[jax.Array, " n"]:
    """Returns scales that move the difficulty of quantizing from the inputs to the weight:

        s_j = max |x_j|^α / max |W_j|^(1 − α).

    Magnitudes below 10⁻⁵ of the largest channel's count as that large, so that a channel without inputs
    gets a small s, and one without weights a large one; where all are zero they count as one.

    Args:
        weight: W, inputs by outputs; several that share their inputs are joined along the outputs.
        state: of the inputs.
        alpha: α, from 0, all to the inputs, to 1, all to the weight.

    Returns:
        s, positive: what the weight's rows are multiplied with and the inputs divided by.

    Raises:
        ValueError: alpha outside [0, 1]; shapes that do not fit.

    Source: Xiao et al. 2022, arXiv 2211.10438, equation 4.

    >>> from jaxquant.ptq.statistics import statistics, update
    >>> state = update(statistics(2, hessian=False), jnp.array([[8.0, 1.0]]))
    >>> smoothquant_scale(jnp.array([[0.5], [1.0]]), state)
    Array([4., 1.], dtype=float32)
    """
    check_layer(weight, None, None)
    if state.largest.shape != weight.shape[:1]:
        raise ValueError(
            f"statistics of {state.largest.shape[0]} channels do not fit a weight of shape {weight.shape}"
        )
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha is from 0 to 1; got {alpha!r}")
    rows = largest(jnp.abs(weight.astype(jnp.float32)), (1,))[:, 0]
    return _floor(state.absmax) ** alpha / _floor(rows) ** (1 - alpha)


def _floor(magnitudes: jax.Array) -> jax.Array:
    """Magnitudes of channels, none less than a small share of the largest; ones where all are zero."""
    top = largest(magnitudes)
    return jnp.where(top == 0, 1, jnp.maximum(magnitudes, _LEAST_SHARE * top))


def rescale(state: InputStatistics, scale: jt.Float[jax.Array, " n"]) -> InputStatistics:
    """Returns the statistics of x / scale, of those of x: what a smoothed layer's weight is multiplied with.

    Args:
        state: of x.
        scale: positive, one for each channel.

    >>> from jaxquant.ptq.statistics import statistics, update
    >>> rescale(update(statistics(1), jnp.array([[6.0]])), jnp.array([2.0])).hessian
    Array([[9.]], dtype=float32)
    """
    inverse = 1 / scale
    products = state.products
    if products is not None:
        products = products * inverse[:, None] * inverse[None, :]
    return dataclasses.replace(
        state,
        products=products,
        largest=state.largest * inverse,
        magnitudes=state.magnitudes * inverse,
    )
