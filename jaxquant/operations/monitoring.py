"""Monitor quantizers during training: SQNR, saturation, underflow and largest values, as data.

`jaxquant.functions.monitor` and `jaxquant.nnx.monitor` give the statistics of one step, for the operands of
each product and both of its gradients; `history` compares largest values with those of steps before, and
`rows` makes them JSON.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping as jt
import numpy as np

from jaxquant.checks import check_whole
from jaxquant.numerics.measuring import BINS, LOWEST, Sums
from jaxquant.operations.tapped import Four

__all__ = ["EDGES", "Against", "Four", "Monitored", "Statistics", "history", "of_sums", "rows"]

# Lower ends of the histogram's bins, as powers of two; the first and last have what lies beyond them too.
EDGES = tuple(range(LOWEST, LOWEST + BINS))
ROLES = Four._fields


class Statistics(NamedTuple):
    """Statistics of quantizing one tensor x, in the coordinates in which it is quantized; all float32.

    Attributes:
        sqnr: signal-to-quantization-noise ratio, 10 · log10(Σ x² / Σ (x − q(x))²) decibels; ∞ where nothing
            is lost, NaN of a tensor that stays in float, of zeros, and where x or q(x) is not finite.
        saturated: the share of elements beyond the largest value that the grid has at their scale; NaN of a
            tensor that stays in float.
        underflow: the share of those that are not zero which become zero; likewise.
        nonfinite: the share that is NaN or infinite.
        amax: the largest finite |x|.
        histogram: how many that are not zero have floor(log2 |x|) from each of `EDGES`.

    What did not run, as a branch that is not taken, has NaN throughout, and no counts.  Of a product that
    runs several times outside of the model's own scans, as in one over micro-batches, shares are those of all
    runs, noise over signal is their mean, and amax is NaN, since sums do not tell it.
    """

    sqnr: jt.Float[jax.Array, "*turns"]
    saturated: jt.Float[jax.Array, "*turns"]
    underflow: jt.Float[jax.Array, "*turns"]
    nonfinite: jt.Float[jax.Array, "*turns"]
    amax: jt.Float[jax.Array, "*turns"]
    histogram: jt.Float[jax.Array, "*turns bins"]


# By product: lhs is its activations, rhs its weight, dlhs and drhs the incoming gradient as the products that
# give ∂lhs and ∂rhs quantize it.  Arrays have an axis for each scan around the product.
Monitored = dict[str, Four]


def of_sums(sums: Sums, each: int = 0) -> Statistics:
    """Returns statistics of what a tap's derivative holds.

    Args:
        sums: with axes for turns in front.
        each: how many of these, the last ones, are of matrices that are taken together.
    """
    axes = tuple(range(sums.uses.ndim - each, sums.uses.ndim))
    mean = lambda x: jnp.sum(x, axes) / uses  # noqa: E731
    uses, count, nonzero = (jnp.sum(x, axes) for x in (sums.uses, sums.total, sums.nonzero))
    has_one = jnp.all(sums.uses == 1, axes)
    return Statistics(
        -10 * jnp.log10(mean(sums.noise)),
        jnp.sum(sums.clipped, axes) / count,
        # Nothing but zeros: none becomes zero, and a tensor in float stays NaN.
        jnp.sum(sums.underflow, axes) / jnp.where(count > 0, jnp.maximum(nonzero, 1), 0),
        jnp.sum(sums.nonfinite, axes) / count,
        jnp.where(has_one, jnp.max(sums.amax, axes), jnp.nan),
        jnp.sum(sums.histogram, axes),
    )


class Against(NamedTuple):
    """A largest value over those of records before; NaN of the first."""

    of_largest: jt.Float[jax.Array, "*turns"]
    of_median: jt.Float[jax.Array, "*turns"]


def history(length: int = 16) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns largest values against their own history, as a pair (init, update) of pure functions.

    ratio_t = amax_t / max(amax_{t−1}, …, amax_{t−length}), and the same of their median.  A scale that is
    taken from the history, as delayed scaling does, clips where the first is above 1.

    Args:
        length: how many records are kept.

    Returns:
        ``init(statistics) -> state`` and ``update(state, statistics) -> (state, ratios)``, where ratios are
        by product `Four`s of `Against`s.

    Raises:
        ValueError: a length that is no whole number above 0.

    Source: Micikevicius et al. 2022, arXiv 2209.05433, section 4.

    >>> def seen(amax):
    ...     own = Statistics(*[jnp.float32(amax)] * 5, jnp.zeros(64))
    ...     return {"up": Four(own, own, own, own)}
    >>> init, update = history(3)
    >>> state = init(seen(0.0))
    >>> for amax in (1.0, 2.0, 4.0, 8.0):
    ...     state, ratios = update(state, seen(amax))
    >>> ratios["up"].lhs
    Against(of_largest=Array(2., dtype=float32), of_median=Array(4., dtype=float32))
    """
    check_whole("length of a history", length, 1)

    def init(statistics: Monitored) -> Any:
        blank = lambda s: jnp.full((length, *s.amax.shape), jnp.nan, jnp.float32)  # noqa: E731
        return jax.tree.map(blank, statistics, is_leaf=_is_one)

    def update(state: Any, statistics: Monitored) -> tuple[Any, Any]:
        def against(s: Statistics, kept: jax.Array) -> Against:
            return Against(s.amax / jnp.nanmax(kept, axis=0), s.amax / jnp.nanmedian(kept, axis=0))

        ratios = jax.tree.map(against, statistics, state, is_leaf=_is_one)
        add = lambda s, kept: jnp.concatenate([kept[1:], s.amax[None]])  # noqa: E731
        return jax.tree.map(add, statistics, state, is_leaf=_is_one), ratios

    return init, update


def _is_one(x: Any) -> bool:
    return isinstance(x, Statistics)


def rows(statistics: Monitored) -> list[dict[str, Any]]:
    """Returns statistics as JSON can hold them: a row for each product, turn and role, on the host.

    What is NaN is None, and so is an SQNR without noise, whose ``exact`` is True.  A row has ``product``,
    ``turn`` (its place in the scans around it; empty where there are none), ``role`` (lhs, rhs, dlhs or
    drhs), ``exact``, the fields of `Statistics`, and the histogram as pairs [exponent, count] of what is not
    empty.  What did not run has no row.

    Args:
        statistics: of one step.
    """
    found = []
    for product, four in jax.device_get(dict(statistics)).items():
        for role, own in zip(ROLES, four, strict=True):
            for turn in np.ndindex(np.shape(own.amax)):
                one = Statistics._make(np.asarray(x)[turn] for x in own)
                if not np.isnan(one.nonfinite):
                    found.append(_row(product, list(turn), role, one))
    return found


def _row(product: str, turn: list[int], role: str, one: Statistics) -> dict[str, Any]:
    scalars = {name: float(x) for name, x in one._asdict().items() if name != "histogram"}
    places = zip(EDGES, one.histogram, strict=True)
    return {
        "product": product,
        "turn": turn,
        "role": role,
        "exact": math.isinf(scalars["sqnr"]),
        **{name: x if math.isfinite(x) else None for name, x in scalars.items()},
        "histogram": [[exponent, int(count)] for exponent, count in places if count],
    }
