"""Sizes and tokens: those of the least loss for a budget, and where more tokens stop helping."""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from jaxquant.checks import check_positive
from jaxquant.laws.constants import Published
from jaxquant.laws.fitting import Fit
from jaxquant.laws.forms import KUMAR_PTQ
from jaxquant.laws.law import Law, Values, x64
from jaxquant.laws.optimum import (
    FULL_BITS,
    LEAST_EFFICIENCY,
    MAC_FLOPS,
    bits_linear,
    check_cost,
    parts,
)

TRAINING_BITS = ("P_w", "P_a", "P_kv")
_POINTS, _REACH, _FINEST = 401, 4.0, 1e-5  # of a search for N: points, and decades to either side
_MOST_MOVES = 20
_MOST_LOG_TOKENS = math.log(1e60)


def optimal_sizes(
    law: Law | Fit | Published,
    params: Values | None = None,
    *,
    flops: Any,
    bits: Any = FULL_BITS,
    cost: Callable[[Any], Any] = bits_linear,
) -> tuple[Any, Any]:
    """Returns (N*, D*), the parameters and tokens with the least loss for a budget, C = 6 N D c(P).

    Where bits take away parameters, or the law reads none, they have a closed form; of any other law of N, D
    and bits they are searched for.

    Args:
        law, params: as of `optimal_precision`; with A, α, B, β.
        flops: C, in operations that cost as 16-bit ones.
        bits: P of training.
        cost: c(P).

    Raises:
        ValueError: a law of another form; a budget that is not positive.

    >>> from jaxquant.laws.constants import KUMAR_2024
    >>> n, d = optimal_sizes(KUMAR_2024, flops=1e20, bits=7.0)
    >>> f"{n:.2g} {d:.2g}"
    '1.7e+09 2.3e+10'
    """
    form, numbers, _ = parts(law, params)
    return best_sizes(form, numbers, flops, bits, cost)


def best_sizes(law: Law, p: Any, flops: Any, bits: Any, cost: Any) -> tuple[Any, Any]:
    """Returns (N*, D*) of checked parameters; see `optimal_sizes`."""
    missing = {"A", "alpha", "B", "beta"} - set(law.names)
    if missing:
        raise ValueError(f"{law.name} has no {', '.join(sorted(missing))}, so no N* and D*")
    for name, value in (("flops", flops), ("bits", bits)):
        for one in np.asarray(value, object).ravel():
            check_positive(name, one)
    absent = {"A", "alpha", "B", "beta"} - set(p)
    if absent:
        raise ValueError(f"params lack {', '.join(sorted(absent))}")
    check_cost(cost, bits)
    if law.check_bits is not None and "P_w" in law.columns:
        law.check_bits({"P_w": np.atleast_1d(np.asarray(bits, float))})
    with x64():
        f = 1.0 if law.efficiency is None else np.asarray(law.efficiency(p, bits), float)
    if not np.all(np.asarray(f) > LEAST_EFFICIENCY):
        raise ValueError(
            f"at {bits} bits the efficiency of {law.name} is next to nothing: it says nothing of them"
        )
    tokens = flops / (MAC_FLOPS * cost(bits))  # N · D
    ratio = p["alpha"] * p["A"] / (p["beta"] * p["B"]) * f ** -p["alpha"] * tokens ** p["beta"]
    n = ratio ** (1 / (p["alpha"] + p["beta"]))
    if law.efficiency is None and training_bits(law):
        n = _searched(law, p, tokens, bits, n)
    return n, tokens / n


def _searched(law: Law, p: Values, tokens: Any, bits: Any, near: Any) -> Any:
    """Returns N* of each N · D and bits, from a size that is near."""

    def of(both: Any, width: Any, first: Any) -> float:
        return least_size(lambda n: law.evaluate(p, run_columns(law, width, n, both / n)), first)

    found = np.vectorize(of, otypes=[float])(tokens, bits, near)
    return found if found.ndim else float(found)


def least_size(loss: Callable[[np.ndarray], np.ndarray], near: float) -> float:
    """Returns the size with the least loss, to a part in a hundred thousand, from one some decades away.

    Args:
        loss: from sizes to losses.
        near: where the search begins; it goes on as long as the least loss lies at an end of its reach.

    >>> round(least_size(lambda n: n + 1e12 / n, 1.0))
    1000000
    """
    middle, reach = math.log10(near), _REACH
    for _ in range(_MOST_MOVES):
        at = np.linspace(middle - reach, middle + reach, _POINTS)
        found = loss(10.0**at)
        best = int(np.argmin(np.where(np.isfinite(found), found, np.inf)))
        middle = float(at[best])
        if best not in (0, _POINTS - 1):
            reach /= 40
        if reach < _FINEST:
            break
    return 10.0**middle


def training_bits(law: Law) -> tuple[str, ...]:
    """Returns the columns of bits of training, where the law reads these, N and D alone; else none."""
    own = tuple(c for c in law.columns if c in TRAINING_BITS)
    return own if set(law.columns) == {"N", "D", *own} else ()


def run_columns(law: Law, bits: float, n: Any, d: Any) -> dict[str, np.ndarray]:
    """Returns a law's columns of some sizes and tokens, all its bits alike."""
    n, d = np.atleast_1d(np.asarray(n, float)), np.atleast_1d(np.asarray(d, float))
    own = {"N": n, "D": d}
    return {c: own[c] if c in own else np.full_like(n, bits) for c in law.columns}


def critical_tokens(loss: Values, added: Values, *, N: Any, P_post: Any) -> Any:
    """Returns D_crit, the tokens beyond which more training makes the quantized model worse.

    D_crit = (β B N^γ_N e^(P_post/γ_post) / (γ_D C_T))^(1/(γ_D + β)), where ∂/∂D of B D^−β and of δ cancel.

    Args:
        loss: with B and beta.
        added: the parameters of `KUMAR_PTQ`.
        N: parameters without embeddings.
        P_post: bits that weights are served at.

    Raises:
        ValueError: numbers that are not positive, or parameters that are missing.

    Source: Kumar et al. 2024, arXiv 2411.04330, section 3; see `ERRATA`.

    >>> from jaxquant.laws.constants import KUMAR_2024, KUMAR_2024_PTQ
    >>> f"{critical_tokens(KUMAR_2024.params, KUMAR_2024_PTQ.params, N=1e9, P_post=4):.1e}"
    '9.6e+10'
    """
    for name, value in (("N", N), ("P_post", P_post)):
        for one in np.asarray(value, object).ravel():
            check_positive(name, one)
    absent = {"B", "beta"} - set(loss) | {"gamma_N", "gamma_D", "gamma_post", "C_T"} - set(added)
    if absent:
        raise ValueError(
            f"the loss has B and beta, and added is KUMAR_PTQ's; missing: {sorted(absent)}"
        )
    top = loss["beta"] * loss["B"] * N ** added["gamma_N"] * np.exp(P_post / added["gamma_post"])
    below = added["gamma_D"] * added["C_T"]
    return (top / below) ** (1 / (added["gamma_D"] + loss["beta"]))


def turning_tokens(
    law: Law,
    params: Values,
    added: Values | None = None,
    *,
    N: float,
    bits: float,
    P_post: float | None = None,
) -> float:
    """Returns the tokens beyond which more training raises the loss as served; NaN where it never does.

    It is where ∂/∂D of L(N, D, P) + δ(N, D, P_post) is zero: `critical_tokens`, for any law.  A penalty that
    grows with D has such a point without any serving in fewer bits.

    Args:
        law, params: of the loss.
        added: the parameters of `KUMAR_PTQ`; None where it is served as trained.
        N: parameters without embeddings.
        bits: P of training.
        P_post: bits that weights are served at.
    """

    with x64():
        args = [jnp.asarray(x, float) for x in (N, bits, bits if P_post is None else P_post)]
        slope = _slope(law, added is not None)
        rises = lambda log_d: float(slope(log_d, dict(params), dict(added or {}), *args))  # noqa: E731
        # Each term is a power of D, whose slope in log D rises with D: the sum's changes sign once at most.
        if not rises(0.0) < 0 < rises(_MOST_LOG_TOKENS):
            return math.nan
        return math.exp(float(cast(Any, optimize.brentq(rises, 0.0, _MOST_LOG_TOKENS))))


@functools.lru_cache(maxsize=64)
def _slope(law: Law, is_served: bool) -> Any:
    """Returns the slope of the loss as served in log D: of (log D, both laws' parameters, N, P, P_post)."""

    def total(log_d: Any, params: Any, added: Any, n: Any, bits: Any, post: Any) -> Any:
        own = {"N": n, "D": jnp.exp(log_d)}
        found = jnp.exp(law.log_prediction(params, {c: own.get(c, bits) for c in law.columns}))
        if not is_served:
            return found
        return found + jnp.exp(KUMAR_PTQ.log_prediction(added, own | {"P_post": post}))

    return jax.jit(jax.grad(total))


QAT_CONSTANT = 6.7297  # Apple 2025, arXiv 2509.22935


def qat_share(*, N: Any, D: Any, bits: Any) -> Any:
    """Returns the share of training that is best spent on quantization-aware training: f* = exp(−a / ln S).

    S = D / (N bits/8) are tokens for each byte of weights; there is none for S ≤ 1.

    Args:
        N: parameters.
        D: tokens of all training.
        bits: that weights are served at.

    Raises:
        ValueError: numbers that are not positive.

    Source: Apple 2025, arXiv 2509.22935, a = 6.7297.

    >>> round(float(qat_share(N=1e9, D=1e11, bits=4)), 3)
    0.281
    """
    for name, value in (("N", N), ("D", D), ("bits", bits)):
        for one in np.asarray(value, object).ravel():
            check_positive(name, one)
    tokens_per_byte = np.maximum(D / (N * bits / 8), 1 + 1e-12)
    return np.exp(-QAT_CONSTANT / np.log(tokens_per_byte))
