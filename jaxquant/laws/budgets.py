"""The best precision for a budget of compute, or for a size: of any law of N, D and bits.

`optimal_precision` has one answer for every budget, which only a law has whose bits take away parameters.  A
penalty that grows with training makes the best precision grow with compute; then it is asked for at a budget.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.checks import check_positive
from jaxquant.laws.constants import Published
from jaxquant.laws.fitting import Fit
from jaxquant.laws.law import Law, Values, x64
from jaxquant.laws.optimum import (
    FULL_BITS,
    MAC_FLOPS,
    Optimum,
    bits_linear,
    candidates,
    check_cost,
    check_range,
    optimum_of,
    parts,
    resolve_confidence,
)
from jaxquant.laws.sizes import training_bits
from jaxquant.stats import renamed

_SIZES = 121  # of N, evenly in the logarithm, between which the least loss is interpolated
_STEP = 0.05  # bits between points of the search


@renamed("confidence", "confidence_level")
def precision_at_budget(
    law: Law | Fit | Published,
    params: Values | None = None,
    *,
    flops: float,
    N: float | None = None,
    sizes: tuple[float, float] | None = None,
    cost: Callable[[Any], Any] = bits_linear,
    low: float = 2.0,
    high: float = float(FULL_BITS),
    confidence_level: float | None = None,
) -> Optimum:
    """Returns P*(C): the bits with the least loss for a budget C = 6 N D c(P), weights, activations and
    cache alike.

    At each P the law's loss is least over N, with D = C / (6 N c(P)); or N is given, and D alone follows.

    Args:
        law, params: as of `optimal_precision`; any law of N, D and bits.
        flops: C, in operations that cost as 16-bit ones.
        N: a size that is given; the best of `sizes` at each P where not.
        sizes: the range of N that is searched; from a tenth of the least that was fitted to ten times the
        largest
            where not given, or 1e3 to 1e13 for constants.
        cost: c(P), of a product beside a 16-bit one.
        low, high: the bits between which P* is sought.
        confidence_level: of the interval over bootstraps; the fit's where not given.

    Raises:
        ValueError: a law that does not read N, D and bits; numbers that are not positive; an empty range.

    >>> from jaxquant.laws.constants import KUMAR_2024
    >>> print(precision_at_budget(KUMAR_2024, flops=1e21))
    7.00
    """
    form, numbers, samples = parts(law, params)
    own = training_bits(form)
    if not own:
        raise ValueError(
            f"law must read N, D and bits of training alone; {form.name} reads {', '.join(form.columns)}"
        )
    check_positive("flops", flops)
    check_range(low, high)
    grid = candidates(form, low, high, _STEP)
    check_cost(cost, grid)
    n = _sizes(law, N, sizes)
    costs = np.asarray(cost(grid), float)
    tokens = flops / (MAC_FLOPS * n[None, :] * costs[:, None])
    columns = {"N": np.broadcast_to(n, tokens.shape), "D": tokens}
    columns |= {c: np.broadcast_to(grid[:, None], tokens.shape) for c in own}
    best = grid[np.argmin(least_losses(form, numbers, columns))]
    drawn = np.array([])
    if samples:
        count = len(next(iter(samples.values())))
        each = ({k: float(v[i]) for k, v in samples.items()} for i in range(count))
        drawn = np.array([grid[np.argmin(least_losses(form, p, columns))] for p in each])
    return optimum_of(float(best), drawn, grid, resolve_confidence(law, confidence_level))


def _sizes(law: Any, N: float | None, sizes: tuple[float, float] | None) -> np.ndarray:
    if N is not None:
        return np.array([check_positive("N", N)])
    if sizes is None and isinstance(law, Fit):
        least, most = law.within["N"]
        sizes = least / 10, most * 10
    least, most = (1e3, 1e13) if sizes is None else sizes
    check_positive("the least of sizes", least)
    check_positive("the largest of sizes", most)
    if not least < most:
        raise ValueError(f"sizes must be (least, largest); got {sizes}")
    return np.geomspace(least, most, _SIZES)


@functools.lru_cache(maxsize=64)
def _evaluator(law: Law) -> Any:
    return jax.jit(lambda p, columns: law.log_prediction(p, columns))


def least_losses(law: Law, params: Values, columns: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the least log loss at each of the bits, by a parabola through the best size and its
    neighbours.
    """
    with x64():
        numbers = {k: jnp.asarray(v, float) for k, v in params.items()}
        loss = np.asarray(_evaluator(law)(numbers, columns))
    loss = np.where(np.isfinite(loss), loss, np.inf)
    best = loss.min(axis=1)
    if loss.shape[1] < 3:
        return best
    i = np.clip(loss.argmin(axis=1), 1, loss.shape[1] - 2)
    rows = np.arange(len(loss))
    before, at, after = (loss[rows, i + step] for step in (-1, 0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        lower = at - (after - before) ** 2 / (8 * (after - 2 * at + before))
    is_inner = (at <= before) & (at <= after) & np.isfinite(lower)
    return np.where(is_inner, lower, best)


def union(optima: Sequence[Optimum]) -> Optimum:
    """Returns one precision for several laws that runs do not tell apart: the first's, and the union of
    intervals.

    Args:
        optima: of laws from the likeliest on, as `compare` ranks them.

    Raises:
        ValueError: no optima.

    >>> a, b = Optimum(6.0, 5.5, 6.4, True), Optimum(6.8, 6.1, 7.9, True)
    >>> print(union([a, b]))
    6.00 [5.50, 7.90]
    """
    if not optima:
        raise ValueError("optima must be one or more; got none")
    low, high = min(o.low for o in optima), max(o.high for o in optima)
    open_ones = [o.note for o in optima if not o.is_determined]
    return Optimum(optima[0].bits, low, high, not open_ones, "; ".join(dict.fromkeys(open_ones)))
