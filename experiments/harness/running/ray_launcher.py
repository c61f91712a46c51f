"""A study's trials on a Ray cluster: one task each, tried again where its machine was lost.

The store lies where all machines see it.  Ray is imported when it is asked for.
"""

import dataclasses
import importlib.util
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.harness.running.record_store import RecordStore

LOCAL = "local"
_SECONDS = 10  # for a cluster to answer


@dataclasses.dataclass(frozen=True)
class Ray:
    """A Ray cluster, and what a trial takes of it.

    Attributes:
        address: of one that runs, as Ray has it, or "local" for one on this machine alone.
        resources: of a trial, by Ray's names.
        retries: of a trial whose machine or process was lost.
    """

    address: str = "auto"
    resources: tuple[tuple[str, float], ...] = (("num_cpus", 1.0),)
    retries: int = 3


def parse_resources(text: str) -> tuple[tuple[str, float], ...]:
    """Returns Ray's resources from text.

    Raises:
        ValueError: anything but names with numbers.

    >>> parse_resources("num_cpus=8,TPU=4")
    (('num_cpus', 8.0), ('TPU', 4.0))
    """
    found = []
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            found.append((name.strip(), float(number)))
        except ValueError:
            name = ""
        if not name or found[-1][1] < 0:
            raise ValueError(f"--ray_resources is as num_cpus=8,TPU=4; got {text!r}")
    return tuple(found)


def run(
    pending: Sequence[Any],
    run_one: Callable[[Any, Path], None],
    store: RecordStore,
    cluster: Ray,
    finished: Callable[[Any], None],
) -> list[tuple[Any, str, str]]:
    """Runs trials on a cluster.

    Args:
        pending: the trials.
        run_one: from (trial, its scratch folder); runs a trial and writes its record.
        store: where records lie.
        cluster: where they run.
        finished: called with each trial when it is.

    Returns:
        (trial, reason, trace) of each that failed.

    Raises:
        ValueError: Ray is not installed, or no cluster is there.
    """
    ray = _connect(cluster.address)
    try:
        known = {name: n for name, n in cluster.resources if name in ("num_cpus", "num_gpus")}
        others = {name: n for name, n in cluster.resources if name not in known}
        task = ray.remote(_run_locked).options(
            max_retries=cluster.retries, resources=others, **({"num_cpus": 1} | known)
        )
        waiting = {task.remote(run_one, trial, store): trial for trial in pending}
        failures = []
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            trial = waiting.pop(done[0])
            try:
                ray.get(done[0])
                finished(trial)
            except ray.exceptions.RayTaskError as error:
                failures.append((trial, f"{type(error.cause).__name__}: {error.cause}", str(error)))
            except ray.exceptions.RayError as error:  # lost more often than it may be tried again
                failures.append((trial, " ".join(str(error).split()), ""))
        return failures
    finally:
        ray.shutdown()


def _run_locked(run_one: Callable[[Any, Path], None], trial: Any, store: RecordStore) -> None:
    """Runs a trial on a machine of the cluster, under its lock."""
    with store.lock(trial) as scratch:
        run_one(trial, scratch)


def _connect(address: str) -> Any:
    """Returns Ray, with a connection to a cluster."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--launcher=ray needs Ray: pip install -e '.[ray]'")
    ray = importlib.import_module("ray")

    host, _, port = address.rpartition(":")
    if port.isdecimal():  # Ray would ask for minutes
        try:
            socket.create_connection((host, int(port)), timeout=_SECONDS).close()
        except OSError as error:
            raise ValueError(f"no Ray cluster answers at {address!r}: {error.strerror}") from None
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    try:
        if address == LOCAL:
            ray.init(**quiet)
        else:
            quiet.pop("include_dashboard")
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"no Ray cluster answers at {address!r}: {reason}") from None
    return ray
