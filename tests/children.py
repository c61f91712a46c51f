"""Run the binaries' commands in processes of their own that cost a tenth of a second each, not three.

A server process imports the libraries once and is forked for each command, before JAX has a backend.  The
smoke run, benchmark_test, processes_test and kills start `python -m` itself.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

_PRELOADED = [
    "jaxquant",
    "scipy.optimize",
    "scipy.stats",
    "grain",
    "experiments.harness.study",
    "experiments.harness.reporting.report",
    "experiments.harness.training.train",
]


def run(
    command: list[str], *, cwd: Path, timeout: float, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run [sys.executable, "-m", module, *flags] as subprocess.run would, with its output captured."""
    python, option, module, *flags = command
    assert (python, option) == (sys.executable, "-m")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = context.Process(
            target=_child, args=(module, flags, str(cwd), env, str(out), str(err))
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(
            command, process.exitcode or 0, out.read_text(), err.read_text()
        )


def _child(module: str, flags: list[str], cwd: str, env: dict | None, out: str, err: str) -> None:
    os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, stream.fileno())
    sys.argv = [module, *flags]
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    with contextlib.suppress(ValueError):
        sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
