"""What the laws are made of: shared parameters, terms of the loss, and efficiencies as functions of bits."""

import functools
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np

from jaxquant.laws.law import Columns, Parameter, Values, log_sum

_TERM = (1e-5, 10.0, (0.03, 0.7))  # bounds and starts of a term of the loss, in units of the loss


def coefficient(name: str, exponent: str, column: str, unit: str) -> Parameter:
    """Of column^−exponent in the loss."""
    return Parameter(name, *_TERM, unit, ((exponent, column, -1),))


A = coefficient("A", "alpha", "N", "nats · parameters^α")
B = coefficient("B", "beta", "D", "nats · tokens^β")
E = Parameter("E", 1e-4, 20.0, (0.3, 3.0), "nats")
ALPHA = Parameter("alpha", 0.01, 2.0, (0.15, 0.8))
BETA = Parameter("beta", 0.01, 2.0, (0.15, 0.8))
TENSORS = ("w", "a", "kv")
_FLOOR = 1e-3  # of efficiencies, which the published form lets fall below zero


def gamma(name: str) -> Parameter:
    """The scale of P in an efficiency."""
    return Parameter(f"gamma_{name}", 0.05, 30.0, (0.5, 4.0), "bits")


def bias(name: str) -> Parameter:
    """The shift n of an efficiency."""
    return Parameter(f"n_{name}", 1e-3, 10.0, (0.05, 2.0))


def positive(x: Any) -> Any:
    """x, above a floor and smoothly so."""
    return jnp.where(x > _FLOOR, x, _FLOOR * jnp.exp(jnp.minimum(x / _FLOOR - 1, 0.0)))


def saturating(p: Values, name: str, bits: Any, biased: bool, suffix: str = "") -> Any:
    """1 − exp(−P/γ + n)."""
    shift = p[f"n_{name}{suffix}"] if biased else 0.0
    return positive(1 - jnp.exp(-bits / p[f"gamma_{name}{suffix}"] + shift))


def kumar_efficiency(p: Values, r: Values, biased: bool, suffix: str = "") -> Any:
    """f = Π_x (1 − exp(−P_x/γ_x + n_x))."""
    factors = (saturating(p, x, r[f"P_{x}"], biased, suffix) for x in TENSORS)
    return functools.reduce(lambda a, b: a * b, factors)


def same_bits(bits: Any) -> dict[str, Any]:
    """The columns of runs whose weights, activations, keys and values have one width."""
    return {f"P_{x}": jnp.asarray(bits) for x in TENSORS}


def power(
    p: Values, r: Values, scale: str, exponent: str, column: str, efficiency: Any = 1.0
) -> Any:
    """log of scale · (column · efficiency)^−exponent."""
    return jnp.log(p[scale]) - p[exponent] * (jnp.log(r[column]) + jnp.log(efficiency))


def log_loss(p: Values, r: Values, of_n: Any = 1.0, of_d: Any = 1.0) -> Any:
    """log(A (N of_n)^−α + B (D of_d)^−β + E)."""
    terms = power(p, r, "A", "alpha", "N", of_n), power(p, r, "B", "beta", "D", of_d)
    return log_sum(*terms, jnp.log(p["E"]))


def efficiency_at(p: Values, prefix: str, widths: tuple[int, ...], bits: Any) -> Any:
    """The efficiency of each width, 1 beyond the widest."""
    found = jnp.ones_like(jnp.asarray(bits, float))
    for width in widths:
        found = jnp.where(jnp.asarray(bits) == width, p[f"{prefix}_{width}"], found)
    return found


# E[(z − Q(z))²] of a unit normal on its best uniform grid of 2^b levels.
_GAUSSIAN_MSE = {1: 0.3634, 2: 0.11885, 3: 0.03744, 4: 0.011543, 8: 8.782e-5}


def check_one_bit(columns: Columns) -> None:
    """Raises a ValueError for integers of less than one bit, which have no grid."""
    if np.any(columns["P_w"] < 1):
        raise ValueError(f"a grid has one bit or more; P_w has {columns['P_w'].min():g}")


def gaussian_mse(bits: Any) -> Any:
    """The mean squared error of a unit normal's best uniform grid of 2^b levels.

    Between the published widths its logarithm is interpolated, and beyond 8 bits it falls as 4^−b.

    Source: Panferov et al. 2025, arXiv 2506.01863.

    Raises:
        ValueError: fewer than one bit, where bits are no traced array.

    >>> round(float(gaussian_mse(4.0)), 5)
    0.01154
    """
    if not isinstance(bits, jax.core.Tracer) and np.any(np.asarray(bits) < 1):
        raise ValueError(f"a grid has one bit or more; got {np.min(np.asarray(bits)):g}")
    known = jnp.array([float(b) for b in _GAUSSIAN_MSE])
    logs = jnp.log(jnp.array(list(_GAUSSIAN_MSE.values())))
    bits = jnp.asarray(bits, float)
    beyond = jnp.maximum(bits - known[-1], 0) * np.log(4)
    return jnp.exp(jnp.interp(bits, known, logs) - beyond)
