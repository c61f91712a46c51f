"""Many small robust fits at once: Levenberg-Marquardt on Huber's loss of log residuals, within bounds.

The objective of a fit is Σ_i w_i H_δ(log ŷ_i − log y_i), H_δ(r) = r²/2 up to |r| = δ and δ (|r| − δ/2)
beyond, in the parameters' logarithms.  A step solves (Jᵀ W J + μ diag) s = −Jᵀ W r with the weights W = w ·
min(1, δ/|r|) of iterated least squares, is cut at the bounds, and is taken if the objective falls; μ falls
with success and rises with failure.
"""

import functools
import os
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.laws.law import filled_up, x64

Residual = Callable[[jax.Array, Any], jax.Array]  # (logs of parameters, columns) -> log ŷ
# Steps of all starts by least squares; starts that go on; their steps at δ's that shrink to the one wanted.
_SCREENING, _KEPT, _POLISHING = 15, 6, ((30.0, 8), (5.0, 12), (1.0, 40))
_LANES = 8  # starts that a program takes at once


def huber(residual: jax.Array, delta: float) -> jax.Array:
    """Returns H_δ of each residual.

    Source: Huber 1964, "Robust Estimation of a Location Parameter".

    >>> huber(jnp.array([0.1, 2.0]), 1.0)
    Array([0.005, 1.5  ], dtype=float32)
    """
    size = jnp.abs(residual)
    return jnp.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def solve(
    predict: Residual,
    columns: Any,
    log_target: np.ndarray,
    weights: np.ndarray,
    starts: np.ndarray,
    low: jax.Array,
    high: jax.Array,
    delta: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best fit of each set of weights over all starts.

    All starts take some steps, and the best few go on until they stand still.  One program serves every
    number of fits, of starts and of steps, and about as many runs, since compiling takes longer than most
    fits do.  Threads share the fits among them: a small fit does not fill a core's vectors, let alone two
    cores.

    Args:
        predict: from the logarithms of the parameters and the columns to the prediction's.
        columns: arrays [runs], or numbers.
        log_target: [runs].
        weights: of the runs in each fit, [fits, runs].
        starts: logarithms of the parameters, [fits, starts, parameters].
        low, high: their bounds, [parameters].
        delta: δ.

    Returns:
        (logarithms of the parameters [fits, parameters], objectives [fits]).
    """
    columns = jax.tree.map(lambda x: filled_up(x) if np.ndim(x) else x, columns)
    log_target = filled_up(log_target)
    # Runs that fill up count for nothing.
    weights = np.pad(weights, ((0, 0), (0, len(log_target) - weights.shape[1])))

    def run(i: int) -> tuple[np.ndarray, np.ndarray]:
        with x64():  # of this thread
            improve = functools.partial(
                _improved, predict, columns, log_target, jnp.asarray(weights[i]), low, high
            )
            return _best_of(improve, starts[i], delta)

    first = run(0)  # compiles
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [first, *pool.map(run, range(1, len(weights)))]
    return np.stack([x for x, _ in found]), np.stack([value for _, value in found])


def _best_of(improve: Callable, starts: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (best point, its objective) over all starts."""
    parts = [starts[i : i + _LANES] for i in range(0, len(starts), _LANES)]
    screened = [improve(1.0, _lanes(part), _SCREENING) for part in parts]
    x, value = (np.concatenate([np.asarray(one[k]) for one in screened]) for k in (0, 1))
    kept = _lanes(x[np.argsort(value[: len(starts)], kind="stable")[:_KEPT]])
    value = np.empty(0)
    for factor, steps in _POLISHING:
        kept, value = improve(factor * delta, kept, steps)
    best = int(np.argmin(np.asarray(value)))
    return np.asarray(kept)[best], np.asarray(value)[best]


def _lanes(points: np.ndarray) -> np.ndarray:
    """Returns points as many as a program takes, the last one again for what is missing."""
    return np.pad(points, ((0, _LANES - len(points)), (0, 0)), mode="edge")


@functools.partial(jax.jit, static_argnums=0)
def _improved(
    predict, columns, log_target, weights, low, high, delta, starts, steps
) -> tuple[jax.Array, jax.Array]:
    """Returns (points, objectives) after so many steps from each start."""
    improve = functools.partial(
        _improved_one, predict, columns, log_target, weights, low, high, delta, steps
    )
    return jax.vmap(improve)(starts)


def _improved_one(
    predict, columns, log_target, weights, low, high, delta, steps, start
) -> tuple[jax.Array, jax.Array]:
    """Returns (x, objective) after some steps."""

    def residual(x: jax.Array) -> jax.Array:
        return predict(x, columns) - log_target

    def objective(x: jax.Array) -> jax.Array:
        value = jnp.sum(weights * huber(residual(x), delta))
        return jnp.where(jnp.isfinite(value), value, jnp.inf)

    def step(_, state):
        x, value, damping = state
        r, pushforward = jax.linearize(residual, x)
        jacobian = jax.vmap(pushforward)(jnp.eye(x.size, dtype=x.dtype))  # [parameters, runs]
        w = weights * jnp.minimum(1.0, delta / jnp.maximum(jnp.abs(r), 1e-300))
        weighted = jacobian * w[None, :]
        gradient = weighted @ r
        # What a bound holds back takes no part.
        is_held = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
        matrix = weighted @ jacobian.T
        diagonal = jnp.diagonal(matrix)
        matrix = matrix + jnp.diag(damping * (diagonal + 1e-9 * jnp.max(diagonal) + 1e-30))
        matrix = jnp.where(is_held[:, None] | is_held[None, :], 0.0, matrix)
        matrix = matrix + jnp.diag(is_held.astype(x.dtype))
        move = jax.scipy.linalg.cho_solve(
            (jnp.linalg.cholesky(matrix), True), jnp.where(is_held, 0.0, -gradient)
        )
        there = jnp.clip(x + jnp.clip(move, -3.0, 3.0), low, high)
        new = jnp.where(jnp.all(jnp.isfinite(there)), objective(there), jnp.inf)
        is_better = new < value
        x = jnp.where(is_better, there, x)
        damping = jnp.clip(jnp.where(is_better, damping * 0.2, damping * 5.0), 1e-10, 1e8)
        return x, jnp.where(is_better, new, value), damping

    start = jnp.clip(start, low, high)
    state = start, objective(start), jnp.asarray(1e-2, start.dtype)
    x, value, _ = jax.lax.fori_loop(0, steps, step, state)
    return x, value
