"""What a process gives back to the system, counted by the system itself."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from experiments.harness.running import memory

C = ctypes.CDLL(None)
pytestmark = [
    pytest.mark.exhaustive,  # looks at our harness, not at versions of others
    pytest.mark.skipif(
        not (hasattr(C, "malloc_trim") and os.path.exists("/proc/self/statm")),
        reason="the GNU C library on Linux",
    ),
]


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


def test_a_trim_soon_after_another_does_nothing(monkeypatch):
    memory.trim()
    called = []
    monkeypatch.setattr(
        memory.ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=called.append)
    )
    memory.trim(at_most_every=60.0)
    assert not called
    memory.trim()
    assert called == [0]


def test_arenas_stay_few():
    """In a process of its own: threads that allocate have arenas of theirs, up to the limit."""
    script = """
import os, sys, threading
os.cpu_count = lambda: 2
from experiments.harness.running import memory
if sys.argv[1] == "few":
    memory.clear_compiled("a kind")
hold = threading.Barrier(13)
def allocate():
    kept = [bytes(2000) for _ in range(100)]
    hold.wait()
    hold.wait()
threads = [threading.Thread(target=allocate) for _ in range(12)]
[thread.start() for thread in threads]
hold.wait()
# An arena of a thread begins where 64 MB do.
maps = [line.split()[0].split("-") for line in open("/proc/self/maps")]
print(sum(int(low, 16) % 2**26 == 0 for low, high in maps))
hold.wait()
"""
    counts = {
        name: int(
            subprocess.run(
                [sys.executable, "-c", script, name], capture_output=True, text=True, check=True
            ).stdout
        )
        for name in ("few", "many")
    }
    assert counts["few"] < counts["many"] / 2
