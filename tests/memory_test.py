"""What a process gives back to the system, counted by the system and the C library themselves."""

import ctypes
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from experiments.harness import memory

C = ctypes.CDLL(None)
pytestmark = [
    pytest.mark.exhaustive,  # looks at our harness, not at versions of others
    pytest.mark.skipif(
        not (hasattr(C, "malloc_trim") and os.path.exists("/proc/self/statm")),
        reason="counts by the GNU C library and Linux",
    ),
]

# Threads that all allocate while all are alive, and how many arenas serve them.
_ARENAS = """
import ctypes, os, sys, threading
from experiments.harness import memory

C = ctypes.CDLL(None)
C.malloc.restype, C.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
C.fopen.restype, C.fclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
C.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]

def arenas():
    path = sys.argv[2].encode()
    file = C.fopen(path, b"w")
    C.malloc_info(0, file)
    C.fclose(file)
    return open(path).read().count("<heap nr=")

def allocate():
    C.malloc(10_000)
    allocated.wait()
    allocated.wait()

if sys.argv[1] == "limited":
    memory.make_room("a kind")
before = arenas()
allocated = threading.Barrier(41)
threads = [threading.Thread(target=allocate) for _ in range(40)]
for thread in threads:
    thread.start()
allocated.wait()
print(arenas() - before, len(os.sched_getaffinity(0)))
allocated.wait()
"""


def _new_arenas(how: str, folder) -> tuple[int, int]:
    run = subprocess.run(
        [sys.executable, "-c", _ARENAS, how, str(folder / "info.xml")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    made, cores = map(int, run.stdout.split())
    return made, cores


def test_threads_share_an_arena_a_core(tmp_path):
    limited, cores = _new_arenas("limited", tmp_path)
    free, _ = _new_arenas("free", tmp_path)
    assert limited <= cores
    assert free >= min(8 * cores, 40) // 2 > limited


def _resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def _freed():
    """100 MB freed below a block that is not, so that the C library keeps them."""
    C.malloc.restype, C.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    C.free.argtypes = [ctypes.c_void_p]
    size = 50_000  # below what the C library maps, and unmaps, by itself
    blocks = [C.malloc(size) for _ in range(2000)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:
        C.free(block)
    yield
    C.free(blocks[-1])


@pytest.mark.usefixtures("_freed")
def test_what_was_freed_goes_back_to_the_system():
    before = _resident()
    memory.trim()
    assert before - _resident() > 80e6


@pytest.mark.usefixtures("_freed")
def test_a_trim_soon_after_another_does_nothing(monkeypatch):
    memory.trim()
    called = []
    monkeypatch.setattr(memory, "_of_the_c_library", lambda name: called.append)
    memory.trim(at_most_every=60.0)
    assert not called
    memory.trim()
    assert called == [0]
