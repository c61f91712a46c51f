"""The precision that a budget is best spent at, and what follows from it.

Of L = A (N f(P))^−α + B D^−β + E under a budget C = 6 N D c(P), only N f(P) counts: at any D it is largest
where c(P) / f(P) is least.  So P* = argmin c(P)/f(P) depends on neither A, B, α, β, E nor C.  With P* known,

    N^(α+β) = (α A / (β B)) f^−α (C / 6c)^β,    D = C / (6 N c).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.checks import check_positive
from jaxquant.laws.constants import Published
from jaxquant.laws.fitting import Fit, values_of
from jaxquant.laws.law import Law, Values, x64
from jaxquant.stats import percentile_interval, renamed

FULL_BITS = 16
MAC_FLOPS = 6  # training, forward and backward, for each parameter and token
LEAST_EFFICIENCY = 0.01  # below which a law says nothing of a precision
_MOST_BITS = 64
_STEP = 0.01  # bits between points of the search
_AT_BOUNDARY = 0.05  # the share of bootstraps at an end of the range beyond which it counts as open

# What is printed, and what follows from the law that the same paper fits (Kumar et al. 2024, arXiv
# 2411.04330); the last is of runs instead.
ERRATA = (
    (
        "optimal precision",
        "f(P) = (1 − exp(−P/γ))³, the biases left out for clarity: with Table 2's γ, P* = 3.47",
        "f(P) = Π_x (1 − exp(−P/γ_x + n_x)): with Table 2's γ and n, P* = 7.00, as the text says",
    ),
    (
        "what P* depends on",
        "equations 6/17, 7 and 28 give optima that differ from each other",
        "P* = argmin P/f(P) under C = (6/16) N D P, whatever A, B, α, β, E and C are",
    ),
    (
        "critical data size",
        "equation 12: D_crit without β in the numerator and without the table's b",
        "D_crit = (β B N^γ_N e^(P_post/γ_post − b) / (γ_D C_T))^(1/(γ_D + β))",
    ),
    (
        "what training in few bits costs",
        "parameters: N_eff = N f(P), so that the gap to full precision shrinks as N grows and does not "
        "depend on D, and P* is one for every budget",
        "not supported by this project's runs of small models with integer grids "
        "(experiments/results/training_precision/full): their gap grows with D and hardly falls with N, as "
        "in GROWING_ERROR and GROWING_ONE, so that P* grows with compute; its runs in floating point are "
        "too few to tell",
    ),
)


def bits_linear(bits: Any) -> Any:
    """Returns c(P) = P/16, in proportion to the bits.  Source: Kumar et al. 2024, section 4.

    >>> bits_linear(4)
    0.25
    """
    return bits / FULL_BITS


def throughput(relative: Mapping[int, float]) -> Callable[[Any], Any]:
    """Returns c(P) = 1/speed of the narrowest format that holds P bits: what hardware has, as measured.

    Args:
        relative: from the bits of a format to its speed beside the 16-bit one's, 16 among them.

    Raises:
        ValueError: no 16 bits, or a speed that is no positive number.

    >>> cost = throughput({16: 1.0, 8: 1.9, 4: 3.5})
    >>> cost(np.array([3.0, 5.0, 9.0])).round(2)
    array([0.29, 0.53, 1.  ])
    """
    if not isinstance(relative, Mapping) or FULL_BITS not in relative:
        raise ValueError(
            f"throughput takes a speed for each of some bits, {FULL_BITS} among them; got {relative!r}"
        )
    for bits, speed in relative.items():
        check_positive("a format's bits", bits)
        check_positive(f"the speed of {bits} bits", speed)
    widths = np.array(sorted(relative), float)
    costs = np.array([1 / relative[w] for w in sorted(relative)])

    def cost(bits: Any) -> Any:
        return costs[np.minimum(np.searchsorted(widths, bits), len(widths) - 1)]

    return cost


def step_cost(
    forward: Any, backward: Any = FULL_BITS, cost: Callable[[Any], Any] = bits_linear
) -> Any:
    """Returns (c(P_f) + 2 c(P_b)) / 3, of a step of training beside one in 16 bits.

    A step multiplies as much in each of three products: forward, and for the gradients of inputs and weights.

    Args:
        forward: P_f, bits of the forward product's operands.
        backward: P_b, bits of both gradient products' operands.
        cost: c(P), of one product.

    Raises:
        ValueError: bits that are no numbers above 0; a cost that is no function.

    >>> step_cost(4), step_cost(4, 4)
    (0.75, 0.25)
    """
    check_function(cost)
    forward, backward = check_bits("forward", forward), check_bits("backward", backward)
    return (cost(forward) + 2 * cost(backward)) / 3


def check_bits(name: str, bits: Any) -> Any:
    """Returns one width as it is, and several as an array.

    Args:
        name: of the argument, for the error.
        bits: a number above 0, or an array or a list of them.

    Raises:
        ValueError: anything else.

    >>> check_bits("forward", "8")
    Traceback (most recent call last):
    ValueError: forward must be a number above 0, or an array of such; got '8'
    """
    try:
        found = np.asarray(bits)
    except ValueError:  # lists of several lengths
        found = np.asarray(None)
    if found.dtype.kind not in "iuf" or not (np.isfinite(found) & (found > 0)).all():
        raise ValueError(f"{name} must be a number above 0, or an array of such; got {bits!r}")
    return found if isinstance(bits, Sequence) else bits


def check_function(cost: Any) -> None:
    """Raises a ValueError unless a cost can be called."""
    if not callable(cost):
        raise ValueError(
            "cost is a function from bits to numbers, such as bits_linear or what chip_cost gives; "
            f"got {cost!r}"
        )


@dataclasses.dataclass(frozen=True)
class Optimum:
    """A precision and how well it is known.

    Attributes:
        bits: P*.
        low, high: its interval over bootstraps; NaN where there are none.
        is_determined: False where P*, an end of its interval, or too many bootstraps lie at an end of the
            range searched.
        note: why not.
    """

    bits: float
    low: float
    high: float
    is_determined: bool
    note: str = ""

    def __str__(self) -> str:
        if not self.is_determined:
            return f"not determined ({self.note})"
        of = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.bits:.2f}{of}"


@renamed("confidence", "confidence_level")
def optimal_precision(
    law: Law | Fit | Published,
    params: Values | None = None,
    *,
    cost: Callable[[Any], Any] = bits_linear,
    low: float = 1.0,
    high: float = float(FULL_BITS),
    confidence_level: float | None = None,
) -> Optimum:
    """Returns P* = argmin c(P) / f(P), all tensors alike; with an interval where a fit has bootstraps.

    Args:
        law: a form, with `params`; or a fit, or published constants, which bring theirs.
        params: a number for each of the law's parameters.
        cost: c(P), of a product beside a 16-bit one.
        low, high: the bits between which it is sought.
        confidence_level: of the interval; the fit's where not given.

    Raises:
        ValueError: a law without an efficiency; parameters missing; an empty range.

    Source: Kumar et al. 2024, arXiv 2411.04330, section 4; see `ERRATA`.

    >>> from jaxquant.laws.constants import KUMAR_2024
    >>> print(optimal_precision(KUMAR_2024))
    7.00
    """
    form, numbers, samples = parts(law, params)
    if form.efficiency is None:
        raise ValueError(
            f"{form.name} has no efficiency f(P) that multiplies N alone, so no P* for every budget"
        )
    check_range(low, high)
    grid = candidates(form, low, high)
    check_cost(cost, grid)
    best = _argmin(form, numbers, grid, cost)
    drawn = np.array([])
    if samples:
        drawn = _argmin(form, {k: v[:, None] for k, v in samples.items()}, grid, cost)
    return optimum_of(float(best), drawn, grid, resolve_confidence(law, confidence_level))


def check_range(low: Any, high: Any) -> None:
    """Raises a ValueError unless low and high are bits in rising order."""
    for bits in (low, high):
        check_positive("low and high", bits)
    if not low < high <= _MOST_BITS:
        raise ValueError(
            f"low and high are bits, 0 < low < high ≤ {_MOST_BITS}; got {low} and {high}"
        )


def check_cost(cost: Any, bits: Any) -> None:
    """Raises a ValueError unless c(P) is a positive number at each of these bits."""
    check_function(cost)
    try:
        found = np.asarray(cost(np.asarray(bits, float)), float)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"cost is a function from bits to numbers; {_named(cost)} says {error}"
        ) from None
    if not (np.isfinite(found) & (found > 0)).all():
        raise ValueError(
            f"cost is positive and finite at all bits; got {found.min()} to {found.max()}"
        )


def _named(cost: Any) -> str:
    """Returns what to call a function in an error: partial functions by what they are of."""
    inner = getattr(cost, "func", cost)
    return getattr(inner, "__name__", None) or str(inner)


def resolve_confidence(law: Any, confidence_level: float | None) -> float:
    """Returns the share of bootstraps that an interval takes in."""
    if isinstance(law, Fit):
        return law.expanded(confidence_level)
    return 0.9 if confidence_level is None else confidence_level


def parts(law: Any, params: Values | None) -> tuple[Law, dict[str, float], Any]:
    """Returns (form, numbers, bootstraps)."""
    if isinstance(law, Fit):
        return law.law, dict(law.params), law.samples
    if isinstance(law, Published):
        return law.law, dict(law.params), {}
    if not isinstance(law, Law):
        raise ValueError(f"law is one of jaxquant.laws, a fit or published constants; got {law!r}")
    return law, values_of(law, {} if params is None else params), {}


def candidates(law: Law, low: float, high: float, step: float = _STEP) -> np.ndarray:
    """Returns the bits that a search tries: even steps, or the widths that a law knows."""
    if law.widths is None:
        return np.linspace(low, high, round((high - low) / step) + 1)
    widths = np.array([*law.widths, FULL_BITS], float)
    found = widths[(widths >= low) & (widths <= high)]
    if len(found) < 2:
        raise ValueError(f"{law.name} knows {law.widths} bits, of which {found} lie in the range")
    return found


def _argmin(law: Law, params: Any, grid: np.ndarray, cost: Any) -> np.ndarray:
    assert law.efficiency is not None
    with x64():
        efficiency = np.asarray(law.efficiency(params, grid), float)
    with np.errstate(divide="ignore"):  # an efficiency of nothing costs without end
        return grid[np.argmin(np.asarray(cost(grid)) / efficiency, axis=-1)]


def optimum_of(best: float, drawn: np.ndarray, grid: np.ndarray, asked: float) -> Optimum:
    """Returns the best of a grid with its interval over bootstraps, open where these run to the grid's
    ends.
    """
    low, high = percentile_interval(drawn, asked)
    # As of a fit's parameters: it holds the estimate.
    low, high = float(np.minimum(low, best)), float(np.maximum(high, best))
    for end, value in (("low", grid[0]), ("high", grid[-1])):
        share = float(np.mean(drawn == value)) if len(drawn) else float(best == value)
        if best == value or share > _AT_BOUNDARY or value in (low, high):
            many = f", as in {share:.0%} of the bootstraps" if len(drawn) else ""
            note = f"it runs to the {end} end of the range, {value:g} bits{many}"
            return Optimum(best, low, high, False, note)
    return Optimum(best, low, high, True)


def efficiency_from_losses(
    losses: Mapping[int, float], reference: float, *, A: float, alpha: float, N: float
) -> dict[int, float]:
    """Returns eff(P) of models of one size: A (N eff)^−α − A N^−α = L(P) − L(reference).

    Args:
        losses: from bits to the loss, nats per token.
        reference: the loss in full precision.
        A, alpha: of the law.
        N: parameters without embeddings.

    Raises:
        ValueError: a loss so far below the reference that no efficiency gives it.

    Source: Panferov et al. 2025 (QuEST), arXiv 2502.05003.

    >>> from jaxquant.laws import constants as c
    >>> law = {"A": c.QUEST_2025_A, "alpha": c.QUEST_2025_ALPHA, "N": c.QUEST_2025_N}
    >>> found = efficiency_from_losses(c.QUEST_2025_LOSSES["quest"], c.QUEST_2025_BF16, **law)
    >>> max(found, key=lambda bits: found[bits] / bits)
    5
    """
    for name, value in {"reference": reference, "A": A, "alpha": alpha, "N": N}.items():
        check_positive(name, value)
    term = A * N**-alpha
    found = {}
    for bits, loss in losses.items():
        check_positive(f"the loss at {bits} bits", loss)
        share = 1 + (loss - reference) / term
        if not share > 0:
            raise ValueError(f"a loss of {loss} at {bits} bits is below what the law can have")
        found[bits] = share ** (-1 / alpha)
    return found
