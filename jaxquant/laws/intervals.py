"""Intervals from bootstraps, as wide as few runs make them."""

import functools
import math
from statistics import NormalDist

import numpy as np
from jax.scipy import special

from jaxquant.laws.law import x64


def central(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    """The central interval of samples; NaN without any.

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    check_confidence(confidence)
    if not len(samples):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def check_confidence(confidence: float) -> None:
    """Raises a ValueError outside (0, 1)."""
    is_number = isinstance(confidence, float | int | np.number)
    if not is_number or not 0 < confidence < 1:
        raise ValueError(f"confidence is between 0 and 1; got {confidence!r}")


@functools.lru_cache
def expanded(confidence: float, units: int, runs: int, parameters: int) -> float:
    """The confidence to ask of bootstraps for an interval that holds what it should with `confidence`.

    Refits of resampled runs scatter less than fits of new runs would: by the freedom that the parameters
    take, and since the spread of few units is itself uncertain.  For a mean, Student's t sets that right, and
    tails moved as it moves them serve here:  z → t_{G−1} · √(G/(G−1) · (n−1)/(n−p)).

    Args:
        confidence: that is wanted.
        units: G, what was resampled: runs, or groups of them.
        runs: n.
        parameters: p.

    Raises:
        ValueError: a confidence outside (0, 1).

    Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 3.3 (expanded percentile
    intervals); the factor is that of cluster-robust errors (Cameron & Miller 2015, section III.D).

    >>> round(expanded(0.9, 150, 150, 11), 3)
    0.914
    """
    check_confidence(confidence)
    factor = units / (units - 1) * (runs - 1) / max(runs - parameters, 1)
    wide = student_quantile(0.5 + confidence / 2, units - 1) * math.sqrt(factor)
    # Never all of the samples: what lies beyond them is not known.
    return min(2 * NormalDist().cdf(wide) - 1, 1 - 1e-9)


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t at a probability from a half on.

    >>> round(student_quantile(0.95, 10), 3)
    1.812
    """
    low, high = 0.0, 1e6
    with x64():
        for _ in range(100):  # P(|T| > t) = I_{v/(v + t²)}(v/2, 1/2) falls with t
            middle = (low + high) / 2
            beyond = special.betainc(freedom / 2, 0.5, freedom / (freedom + middle**2)) / 2
            low, high = (middle, high) if float(beyond) > 1 - probability else (low, middle)
            if high - low < 1e-9:
                break
    return (low + high) / 2
