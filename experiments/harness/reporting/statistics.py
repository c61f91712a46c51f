"""Means with standard errors, Student's t intervals and tests, and corrections for many comparisons."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.9
Bounds = tuple[float, float | None, float | None]


def mean_and_error(values: np.ndarray) -> dict[str, float | None]:
    """The mean with its standard error; None where a broken model gives no number, or one value no error.

    >>> mean_and_error(np.array([1.0, 3.0]))
    {'mean': 2.0, 'se': 1.0}
    """
    if not np.isfinite(values).all():
        return {"mean": None, "se": None}
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(values.mean()), "se": error}


def t_half_width(error: float, freedom: float, confidence: float = CONFIDENCE) -> float:
    """Half of Student's t interval, t · error.

    Args:
        error: the standard error.
        freedom: degrees of freedom.
        confidence: two-sided.

    >>> round(t_half_width(1.0, 2), 3)
    2.92
    """
    return float(stats.t.ppf((1 + confidence) / 2, freedom)) * error


def t_interval(values: Iterable[float], confidence: float = CONFIDENCE) -> Bounds:
    """(mean, low, high) of Student's t interval of the mean; no ends of a single value.

    >>> t_interval([1.0])
    (1.0, None, None)
    """
    given = np.asarray(list(values), float)
    mean = float(given.mean())
    if len(given) < 2:
        return mean, None, None
    half = t_half_width(float(given.std(ddof=1)) / len(given) ** 0.5, len(given) - 1, confidence)
    return mean, mean - half, mean + half


def t_p_value(values: Iterable[float]) -> float | None:
    """The two-sided p-value of a mean of zero, Student's; None of a single value.

    >>> round(t_p_value([1.0, 2.0, 3.0]), 3)
    0.074
    """
    given = np.asarray(list(values), float)
    if len(given) < 2:
        return None
    if not given.std():
        return 0.0 if given.any() else 1.0
    error = float(given.std(ddof=1)) / len(given) ** 0.5
    return t_test(float(given.mean()), error, len(given) - 1)


def t_test(difference: float, error: float, freedom: float) -> float:
    """The two-sided p-value of a difference from its null, Student's.

    Args:
        difference: estimate − null.
        error: its standard error; 0 where the estimate is exact.
        freedom: degrees of freedom of the error.

    >>> round(t_test(2.92, 1.0, 2), 3)
    0.1
    """
    if not error:
        return 0.0 if difference else 1.0
    return 2 * float(stats.t.sf(abs(difference) / error, freedom))


def is_discovery(q: float | None) -> bool:
    """Whether a q-value rejects at the level of the intervals; None does not."""
    return q is not None and q < 1 - CONFIDENCE


def corrected(p_values: Sequence[float | None]) -> list[float | None]:
    """Benjamini and Hochberg's q-values: rejecting all below 0.1 errs in a tenth of the rejections at most.

    Tests without a p-value keep None and do not count.

    Source: Benjamini and Hochberg 1995, "Controlling the False Discovery Rate".

    >>> corrected([0.01, None, 0.04, 0.5])
    [0.03, None, 0.06, 0.5]
    """
    known = [p for p in p_values if p is not None]
    if not known:
        return list(p_values)
    found = iter(stats.false_discovery_control(known).tolist())
    return [None if p is None else next(found) for p in p_values]
