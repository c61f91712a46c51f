"""Means with standard errors and Student's t intervals, of runs and of what they are evaluated on."""

from collections.abc import Iterable

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
