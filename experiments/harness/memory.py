"""A process that runs many trials holds the programs of one kind of them."""

import ctypes
import gc
from typing import Any

import jax

_NONE = object()
_last: Any = _NONE


def make_room(kind: Any) -> None:
    """Gives back what no later trial uses: called before each.

    JAX keeps all that it compiled, 100 to 250 MB a model and method of the studies here.  Where a trial of
    another kind than the last begins, it is dropped (`jax.clear_caches`).  And the C library keeps what was
    freed, most of all by the compiler, a quarter of the process: its pages go back to the system.

    Args:
        kind: trials of equal kinds run the same compiled programs.
    """
    global _last
    if _last is not _NONE and kind != _last:
        jax.clear_caches()
    _last = kind
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library's alone
    if trim is not None:
        trim(0)
