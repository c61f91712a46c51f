"""Strictness for every test (no rank or type promotion, CPU only), and one smoke run for all.

Most of the tests' time is the compiler's, so LLVM does not optimize here, which more than halves it.  Whoever
sets a level in XLA_FLAGS gets that one, as CI does for the long tests.
"""

import collections
import dataclasses
import gc
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The studies are not installed: processes that tests start find them here.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# Programs are compiled once and read from there the next time: a second run takes a third of the time.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# In front, so that a level of the caller's own, which comes later, counts.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
# Of every room, what says in a minute whether something is broken: `pytest -m quick`.
QUICK = [
    "architecture",
    "einsum",
    "engine",
    "files",
    "gates",
    "optim_checks",
    "optim_leaves",
    "packed",
    "pages",
    "qwix",
    "recipes",
    "renamed",
    "rules",
    "search",
    "specification",
    "stats",
]


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def as_users_compute(_strict):
    """JAX's own promotion of ranks and types, by which most models are written."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def library_promotion(_strict):
    """optax itself mixes integer step counts with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Counter:
    """Batches 0, 1, 2, …, with a position to checkpoint."""

    def __init__(self):
        self.at = 0

    def __next__(self):
        self.at += 1
        return np.full((2, 3), self.at - 1, np.float32)

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


def shared_folder(tmp_path_factory) -> Path:
    """The session's folder, the same for all of its workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Makes all cases but the first ones of tests marked `first` long, and marks the quick files' tests."""
    seen = collections.Counter()
    for item in items:
        marker = item.get_closest_marker("first")
        name = item.nodeid.split("[")[0]
        seen[name] += 1
        if marker is not None and seen[name] > marker.args[0]:
            item.add_marker(pytest.mark.long)
        if item.path.stem.removesuffix("_test") in QUICK and not item.get_closest_marker("long"):
            item.add_marker(pytest.mark.quick)


def pytest_collection_finish():
    """Takes what is imported out of the garbage collector's rounds, which are a twentieth of the time."""
    gc.collect()
    gc.freeze()


def deb(content: dict[str, bytes]) -> bytes:
    """An ar archive with a first member of odd size and the content as data.tar.xz."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as archive:
        for name, body in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    package = b"!<arch>\n"
    for name, body in (("debian-binary", b"2.0"), ("data.tar.xz", stream.getvalue())):
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode()
        package += body + b"\n" * (len(body) % 2)
    return package


def study_command(workdir, *flags: str, study: str = "ptq_overtraining") -> list[str]:
    return [
        sys.executable,
        "-m",
        f"experiments.{study}",
        "--preset=smoke",
        f"--workdir={workdir}",
        *flags,
    ]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run of a study's binary."""

    workdir: Path
    stdout: str
    stderr: str
    seconds: float


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Run:
    """The main study under --preset=smoke, undisturbed; whichever worker comes first runs it for all."""
    workdir = shared_folder(tmp_path_factory) / "smoke"
    finished = workdir.with_suffix(".json")
    try:
        workdir.mkdir()
    except FileExistsError:
        return _awaited(workdir, finished)
    start = time.monotonic()
    done = subprocess.run(
        study_command(workdir), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    found = done.returncode, done.stdout, done.stderr, time.monotonic() - start
    unfinished = workdir.with_suffix(".part")
    unfinished.write_text(json.dumps(found))
    unfinished.replace(finished)
    return _awaited(workdir, finished)


def _awaited(workdir: Path, finished: Path) -> Run:
    deadline = time.monotonic() + 660
    while not finished.exists():
        assert time.monotonic() < deadline, f"no worker has finished the run in {workdir}"
        time.sleep(0.2)
    status, stdout, stderr, seconds = json.loads(finished.read_text())
    assert status == 0, stderr[-3000:]
    return Run(workdir, stdout, stderr, seconds)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 700 kB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (needs Linux and root)")
    yield folder
    time.sleep(1)
    subprocess.run(["umount", "-l", str(folder)], check=True)
