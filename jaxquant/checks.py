"""Checks of arguments that are plain numbers, with one wording for all errors."""

import math
from typing import Any

import numpy as np


def check_whole(name: str, value: Any, low: int, high: int | None = None, unit: str = "") -> int:
    """Return value as an int.

    Args:
        name: of the argument, for the error.
        value: what was given; NumPy's integers count, booleans don't.
        low: the least value.
        high: the greatest, None for no bound.
        unit: what is counted, for the error.

    Raises:
        ValueError: not an integer, or out of bounds.

    >>> check_whole("interval", 0, 1, unit="steps")
    Traceback (most recent call last):
    ValueError: interval must be an integer number of steps of at least 1; got 0
    """
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):
        kind = f"an integer number of {unit}" if unit else "an integer"
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {kind} {bounds}; got {value!r}")
    return int(value)


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, unit: str = ""
) -> float:
    """Return value as a finite float within [low, high].

    Raises:
        ValueError: not a number, not finite, or out of bounds.

    >>> check_number("decay", 1.5, 0, 1)
    Traceback (most recent call last):
    ValueError: decay must be a number from 0 to 1; got 1.5
    """
    if not _is_finite(value) or not low <= value <= high:
        kind = f"a number of {unit}" if unit else "a number"
        if low == -math.inf and high == math.inf:
            bounds = "that is finite"
        elif high == math.inf:
            bounds = f"of at least {low:g}"
        else:
            bounds = f"from {low:g} to {high:g}"
        raise ValueError(f"{name} must be {kind} {bounds}; got {value!r}")
    return float(value)


def check_positive(name: str, value: Any, unit: str = "") -> float:
    """Return value as a finite float above 0.

    Raises:
        ValueError: not a number, not finite, or not above 0.

    >>> check_positive("flops", -1)
    Traceback (most recent call last):
    ValueError: flops must be a number above 0; got -1
    """
    if not _is_finite(value) or not value > 0:
        kind = f"a number of {unit}" if unit else "a number"
        raise ValueError(f"{name} must be {kind} above 0; got {value!r}")
    return float(value)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return is_number and not isinstance(value, np.complexfloating) and math.isfinite(value)
