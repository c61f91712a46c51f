"""A process that runs many trials for hours stays as large as one of them needs.

JAX keeps all that it has compiled, 100 to 250 MB a model and method of the studies here, and the GNU C
library the pages of what was freed, most of all by the compiler, a quarter of the process.
"""

import ctypes
import gc
import time
from typing import Any

import jax

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
    if _last is not _NONE and kind != _last:
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
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library's alone
    if malloc_trim is not None:
        malloc_trim(0)
    _trimmed = time.monotonic()
