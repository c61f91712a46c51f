"""Accept old names of arguments, attributes and functions for one release, with a warning."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns that a name has changed."""
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def accept_old_keywords(**renamed: str) -> Callable[[F], F]:
    """Makes a function accept keyword arguments by their old names too.

    Args:
        renamed: the new name of each old one.

    >>> @accept_old_keywords(gain="scale")
    ... def scaled(x, scale=1.0):
    ...     return x * scale
    >>> scaled(3.0, scale=2.0)
    6.0
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            for old, new in renamed.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise ValueError(f"{new} must be given once; got {old} and {new}")
                warn_renamed(old, new)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped  # pyright: ignore[reportReturnType]

    return decorate


def accept_old_fields(**renamed: str) -> Callable[[C], C]:
    """Makes a dataclass accept and show its fields by their old names too.

    Args:
        renamed: the new name of each old one.
    """

    def decorate(cls: C) -> C:
        cls.__init__ = accept_old_keywords(**renamed)(cls.__init__)
        for old, new in renamed.items():
            setattr(cls, old, _old_attribute(old, new))
        return cls

    return decorate


def _old_attribute(old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warn_renamed(old, new)
        return getattr(self, new)

    return property(read)
