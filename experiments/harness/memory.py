"""A process that runs many trials for hours stays as large as one of them needs.

JAX keeps all that it has compiled, 100 to 250 MB a model and method of the studies here.  The GNU C library
keeps what was freed: in eight arenas a core, each with holes of its own, and their pages until a trim.
"""

import ctypes
import gc
import os
import time
from typing import Any

import jax

_ARENA_MAX = -8  # mallopt's M_ARENA_MAX

_NONE = object()
_last: Any = _NONE
_trimmed = float("-inf")


def make_room(kind: Any) -> None:
    """Gives back what no later trial uses: called before each.

    Args:
        kind: trials of equal kinds run the same compiled programs, which are dropped where
            another kind begins.
    """
    global _last
    if _last is _NONE:
        _limit_arenas()
    elif kind != _last:
        jax.clear_caches()
    _last = kind
    gc.collect()
    trim()


def trim(at_most_every: float = 0.0) -> None:
    """Gives the pages of what was freed back to the system, within a trial too, which may take an hour.

    Args:
        at_most_every: seconds within which a second call does nothing.
    """
    global _trimmed
    if time.monotonic() - _trimmed < at_most_every:
        return
    malloc_trim = _of_the_c_library("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)
    _trimmed = time.monotonic()


def _limit_arenas() -> None:
    """An arena a core.  It binds those not yet made, so it comes before the threads that make them."""
    mallopt = _of_the_c_library("mallopt")
    if mallopt is not None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        mallopt(_ARENA_MAX, cores or 1)


def _of_the_c_library(name: str) -> Any:
    """A function that the GNU C library has, or None where another is in its place."""
    return getattr(ctypes.CDLL(None), name, None)
