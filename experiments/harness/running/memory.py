"""A process that runs many trials for hours stays as large as one of them needs.

JAX keeps all that it has compiled, 100 to 250 MB a model and method of the studies here, and the GNU C
library the pages of what was freed, most of all by the compiler, a quarter of the process.  That library
gives threads up to eight arenas a core, none of which lends another its free pages: the threads that write
the first hundred checkpoints fill 20 MB of them, and 13 MB where arenas are few.
"""

import ctypes
import gc
import os
import time
from typing import Any

import jax

_NONE = object()
_M_ARENA_MAX = -8  # of mallopt, in malloc.h
_last: Any = _NONE
_trimmed = float("-inf")


def clear_compiled(compile_key: Any) -> None:
    """Frees what no later trial uses; call it before each trial.

    Args:
        compile_key: trials of equal kinds run the same compiled programs, which are dropped where
            another compile_key begins.
    """
    global _last
    _have_few_arenas()
    if _last is not _NONE and compile_key != _last:
        jax.clear_caches()
    _last = compile_key
    gc.collect()
    trim()


def _have_few_arenas() -> None:
    """Limits new malloc arenas to one for each eight cores, and at least two."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # the GNU C library's alone
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, max(2, (os.cpu_count() or 1) // 8))


def trim(at_most_every: float = 0.0) -> None:
    """Returns freed pages to the system; also called within a trial, which may take an hour.

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
