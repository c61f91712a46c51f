"""Interleaved timing, and ratios of times within a round."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

LEVEL = 0.9  # of every interval


def interleaved_timing(
    runs: Mapping[str, Callable[[], None]],
    rounds: int,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Times several functions in turn, and returns the seconds of each in each round.

    Each round runs each function once.  The order is rotated by one from round to round, so that none keeps
    its position.

    Args:
        runs: functions by name; each returns when the device has finished.
        rounds: how many.
        on_round: called after each.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
        on_round()
    return seconds


def median_interval(
    values: Sequence[float], level: float = LEVEL
) -> tuple[float | None, float | None]:
    """Returns an interval of the median that supposes nothing of the distribution (the sign test's).

    [x₍ₖ₎, x₍ₙ₊₁₋ₖ₎] of the ordered values, with the largest k for which P(Binomial(n, ½) < k) is at most
    (1 − level) / 2: of independent values it holds the median with at least the probability `level`.
    (None, None) where there are too few values for any k: below 5 at 90 %.

    Source: Conover 1999, Practical Nonparametric Statistics, 3rd edition, section 3.2.

    >>> median_interval([5.0, 1.0, 4.0, 2.0, 3.0])
    (1.0, 5.0)
    """
    n, k, tail = len(values), 0, 0.5 ** len(values)
    while k < n and tail <= (1 - level) / 2:
        k += 1
        tail += math.comb(n, k) / 2**n
    if k == 0:
        return None, None
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


def paired_ratio(seconds: Sequence[float], reference: Sequence[float]) -> dict:
    """Returns median and interval of the ratio within each round.

    >>> paired_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])
    {'median': 2.0, 'low': None, 'high': None}
    """
    ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
    low, high = median_interval(ratios)
    return {"median": statistics.median(ratios), "low": low, "high": high}
