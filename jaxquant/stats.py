"""Confidence levels, critical values and percentile intervals, for reports of quality and for laws."""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from scipy import special

_Named = TypeVar("_Named", bound=Callable[..., Any])


def check_confidence_level(level: Any) -> None:
    """Raises a ValueError for what is no confidence level.

    >>> check_confidence_level(90)
    Traceback (most recent call last):
    ValueError: confidence_level is between 0 and 1, such as 0.9; got 90
    """
    if not isinstance(level, int | float | np.number) or not 0 < level < 1:
        raise ValueError(f"confidence_level is between 0 and 1, such as 0.9; got {level!r}")


def critical(confidence_level: float, degrees: float = math.inf) -> float:
    """Returns half the width, in standard errors, of a two-sided interval: Student's, or the normal's.

    Args:
        confidence_level: between 0 and 1.
        degrees: of freedom, rounded down; under 1 the interval is infinite.

    >>> round(critical(0.9), 4), round(critical(0.9, 4), 4)
    (1.6449, 2.1318)
    """
    tail = (1 - confidence_level) / 2
    if degrees < 1:
        return math.inf
    if math.isinf(degrees):
        return -float(special.ndtri(tail))
    return -float(special.stdtrit(int(degrees), tail))


def percentile_interval(samples: np.ndarray, confidence_level: float) -> tuple[float, float]:
    """Returns the central interval of samples; NaN without any.

    Raises:
        ValueError: a level outside (0, 1).

    >>> percentile_interval(np.arange(101.0), 0.5)
    (25.0, 75.0)
    """
    check_confidence_level(confidence_level)
    if not len(samples):
        return math.nan, math.nan
    tail = (1 - confidence_level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)


def renamed(old: str, new: str) -> Callable[[_Named], _Named]:
    """Makes a function's keyword, or a dataclass's field, accept its old name, with a warning.

    Raises:
        ValueError: from what it decorates, where both names are given.

    >>> @renamed("level", "confidence_level")
    ... def width(*, confidence_level):
    ...     return critical(confidence_level)
    >>> width(level=0.9, confidence_level=0.9)
    Traceback (most recent call last):
    ValueError: level is confidence_level now; give one of them
    """

    def warn() -> None:
        said = f"{old} is now {new}; the old name goes with the next release"
        warnings.warn(said, DeprecationWarning, stacklevel=3)

    def function_of(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **keywords: Any) -> Any:
            if old in keywords:
                if new in keywords:
                    raise ValueError(f"{old} is {new} now; give one of them")
                warn()
                keywords[new] = keywords.pop(old)
            return function(*args, **keywords)

        return wrapped

    def read(self: Any) -> Any:
        warn()
        return getattr(self, new)

    def decorate(named: Any) -> Any:
        if not isinstance(named, type):
            return function_of(named)
        named.__init__ = function_of(named.__init__)
        setattr(named, old, property(read, doc=f"The old name of `{new}`."))
        return named

    return decorate


def renamed_names(namespace: dict[str, Any], new_names: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a module's `__getattr__`, which accepts old names with a warning.

    Args:
        namespace: the module's globals.
        new_names: the new name of each old one.
    """
    module = namespace["__name__"]

    def get(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} is now {new_names[name]}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return namespace[new_names[name]]

    return get
