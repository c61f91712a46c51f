"""Estimators of the gradient of rounding, which is zero almost everywhere.

An estimator takes a `GridTensor` and returns x̂ = s · q with an estimated gradient: for x, and for the
scale s if s is learned.  All arrays are float32 and broadcast against x.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.formats import Format, Int
from jaxquant.numerics.rounding import straight_through as _straight_through
from jaxquant.stats import renamed_names

__getattr__ = renamed_names(globals(), {"Laid": "GridTensor"})


@dataclasses.dataclass(frozen=True)
class GridTensor:
    """A tensor x and its values q on a grid.

    Attributes:
        x: values, differentiable.
        grid: q, the grid's values, less the zero point.
        scale: s, differentiable where it is learned.
        low: the grid's smallest value, less the zero point.
        high: the grid's largest value, less the zero point.
        format: the grid.
        group: how many elements share a scale.
    """

    x: jax.Array
    grid: jax.Array
    scale: jax.Array
    low: Any
    high: Any
    format: Format
    group: int

    @property
    def value(self) -> jax.Array:
        return jax.lax.stop_gradient(self.grid * self.scale)

    @property
    def inside(self) -> jax.Array:
        """Elements within the grid's range; all of them if the range is NaN.

        So a group that contains a NaN passes its gradient on, NaNs included.
        """
        scale = jax.lax.stop_gradient(self.scale)
        return ~((self.x < self.low * scale) | (self.x > self.high * scale))


def straight_through(tensor: GridTensor) -> jax.Array:
    """∂x̂/∂x = 1 everywhere, none to the scale.

    Source: Bengio et al. 2013, arXiv 1308.3432.
    """
    return _straight_through(tensor.x, jnp.broadcast_to(tensor.value, tensor.x.shape))


def clipped(tensor: GridTensor) -> jax.Array:
    """∂x̂/∂x = 1 within the range and 0 where x is clipped, none to the scale.

    Source: Hubara et al. 2016, arXiv 1609.07061, equation 4.
    """
    x = jnp.where(tensor.inside, tensor.x, jax.lax.stop_gradient(tensor.x))
    return _straight_through(x, jnp.broadcast_to(tensor.value, x.shape))


def pact(tensor: GridTensor) -> jax.Array:
    """PACT: the clipping level r = s · max learns from what it clips.

    ∂x̂/∂x = 1 within the range, else 0;  ∂x̂/∂r = 0 within, 1 where x ≥ r, and −1 where x ≤ −r on a
    signed grid (0 where an unsigned grid clips at zero).  Use with `calibration.Range`, which is then r.

    Source: Choi et al. 2018, arXiv 1805.06085, equations 1 to 3 (unsigned activations).
    """
    low, high = tensor.low * tensor.scale, tensor.high * tensor.scale
    x = jnp.where(tensor.x >= high, high, jnp.where(tensor.x <= low, low, tensor.x))
    return _straight_through(x, jnp.broadcast_to(tensor.value, x.shape))


def lsq(tensor: GridTensor) -> jax.Array:
    """LSQ: the step s learns from the rounding error.

    ∂x̂/∂x = 1 within the range, else 0;  ∂x̂/∂s = g · (q − x/s) within, g · q where x is clipped, with
    the gradient scale g = 1/√(N · Q_P), N the elements that share the step and Q_P the grid's largest
    value.  Use with `calibration.Step`, which is then s.

    Source: Esser et al. 2020, arXiv 1902.08153, equations 3 and 5 and section 2.2.
    """
    gradient_scale = 1 / jnp.sqrt(
        jnp.maximum(1, tensor.group) * jnp.asarray(tensor.high, jnp.float32)
    )
    fixed = jax.lax.stop_gradient(tensor.scale)
    # The value of s with g times its gradient.
    scale = fixed + gradient_scale * (tensor.scale - fixed)
    ratio = tensor.x / scale
    ratio = jnp.where(tensor.inside, ratio, jnp.broadcast_to(tensor.grid, ratio.shape))
    grid = _straight_through(ratio, jnp.broadcast_to(tensor.grid, ratio.shape))
    return grid * scale


def trust(tensor: GridTensor) -> jax.Array:
    """QuEST's trust mask: ∂x̂/∂x = 1 where |x̂ − x| ≤ T, else 0, with T half the step between levels.

    What is within the grid's range is always trusted, and so is what lies at most T beyond it.  QuEST is
    this with `calibration.gaussian`, a midrise `Int` and a Hadamard rotation; with those
    T = r/(2^b − 1), as in the paper.

    Raises:
        ValueError: a format other than an Int, whose steps are not all equal.

    Source: Panferov et al. 2025, arXiv 2502.05003, section 3.2.
    """
    if not isinstance(tensor.format, Int):
        raise ValueError(
            f"the trust mask needs an Int, whose steps are equal; got {tensor.format!r}"
        )
    half_step = jax.lax.stop_gradient(tensor.scale) * (tensor.format.step / 2)
    # A value in the middle of a cell errs by exactly half a step, give or take its own rounding.
    slack = 1 + 8 * jnp.finfo(jnp.float32).eps
    trusted = jnp.abs(tensor.value - tensor.x) <= half_step * slack
    x = jnp.where(trusted | tensor.inside, tensor.x, jax.lax.stop_gradient(tensor.x))
    return _straight_through(x, jnp.broadcast_to(tensor.value, x.shape))


def group_size(shape: tuple[int, ...], groups: tuple[int, ...]) -> int:
    """Returns how many elements share one scale."""
    return math.prod(shape) // max(1, math.prod(groups))
