"""Intervals from bootstraps, as wide as few runs make them."""

import functools
import math

from scipy import special

from jaxquant.stats import check_confidence_level, critical


@functools.lru_cache
def expanded(confidence_level: float, units: int, runs: int, parameters: int) -> float:
    """Returns the bootstrap level at which an interval holds what it should with `confidence_level`.

    Refits of resampled runs scatter less than fits of new runs would: by the freedom that the parameters
    take, and since the spread of few units is itself uncertain.  For a mean, Student's t sets that right, and
    tails moved as it moves them serve here:  z → t_{G−1} · √(G/(G−1) · (n−1)/(n−p)).

    Args:
        confidence_level: that is wanted.
        units: G, what was resampled: runs, or groups of them.
        runs: n.
        parameters: p.

    Raises:
        ValueError: a level outside (0, 1).

    Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 3.3 (expanded percentile
    intervals); the factor is that of cluster-robust errors (Cameron & Miller 2015, section III.D).

    >>> round(expanded(0.9, 150, 150, 11), 3)
    0.914
    """
    check_confidence_level(confidence_level)
    factor = units / (units - 1) * (runs - 1) / max(runs - parameters, 1)
    wide = critical(confidence_level, units - 1) * math.sqrt(factor)
    # Never all of the samples: what lies beyond them is not known.
    return min(float(special.erf(wide / math.sqrt(2))), 1 - 1e-9)
