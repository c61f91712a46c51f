"""Several processes of one run: joining them, and what only the first does.

JAX's own runtime joins them.  What it meets on the way (a process that is missing, or that counts them
otherwise) it answers with an abort or by waiting for minutes; so processes that are given an address
shake hands first, and say in a line what is wrong.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

AUTOMATIC = "auto"
SECONDS = 20.0  # for all to be there
_RUNTIME = 10  # times as long for JAX's runtime to come up, once they are


def join(
    coordinator: str,
    count: int | None = None,
    index: int | None = None,
    seconds: float = SECONDS,
) -> None:
    """Makes this process one of several of a run, before any other use of JAX.

    Args:
        coordinator: "auto" where the environment says who is who (TPU VMs, SLURM, Open MPI, GKE), or the
            address of the first process, as ``10.0.0.2:8476``.
        count: of processes; with an address.
        index: of this one, from 0; with an address.
        seconds: that the others may take to be there.

    Raises:
        ValueError: an address, count or index that no run could have, or that another process has otherwise.
        RuntimeError: the others were not there in time, or this environment names none.
    """
    if not 0 < seconds < 3600:
        raise ValueError(f"--join_timeout is a number of seconds, up to 3600; got {seconds}")
    if coordinator == AUTOMATIC:
        if count is not None or index is not None:
            raise ValueError("--processes and --process go with --coordinator=HOST:PORT, not auto")
        _initialize("this environment", seconds)
        return
    host, port = _address(coordinator)
    if count is None or count < 1:
        raise ValueError(f"--coordinator goes with --processes, a number from 1 on; got {count}")
    if index is None or not 0 <= index < count:
        raise ValueError(f"--process is a number from 0 to {count - 1}; got {index}")
    if index == 0:
        _receive(port, count, seconds)
    else:
        _report(host, port, count, index, seconds)
    address = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
    _initialize(coordinator, seconds, **address)


def _address(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:([\w.\-]+)|\[([\da-f:]+)\]):(\d{1,5})", text)
    if found is None or not 0 < int(found[3]) < 2**16:
        raise ValueError(
            f"--coordinator is 'auto' or the first process's HOST:PORT, as 10.0.0.2:8476; got {text!r}"
        )
    return found[1] or found[2], int(found[3])


def _receive(port: int, count: int, seconds: float) -> None:
    """Receives all reports in the first process, and answers whether the settings agree."""
    deadline, others, numbers = time.monotonic() + seconds, [], set[int]()
    problem = ""
    with contextlib.ExitStack() as open_, _listening(port) as server:
        while len(numbers) < count - 1 and not problem:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                other = open_.enter_context(server.accept()[0])
                other.settimeout(1)
                index, their_count = map(int, other.recv(64).split())
            except ValueError:
                continue  # whatever else looks at an open port
            except TimeoutError:
                missing = min({*range(1, count)} - numbers)
                problem = f"process {missing} of {count} did not come within {seconds:g} s"
                break
            if their_count != count:
                problem = (
                    f"--processes is {count} for process 0 and {their_count} for process {index}"
                )
            elif index in numbers:
                problem = f"two processes have --process={index}"
            others.append(other)
            numbers.add(index)
        for other in others:
            with contextlib.suppress(OSError):
                other.sendall((problem or "ok").encode())
    if problem:
        raise RuntimeError(problem)


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"--coordinator's port {port} cannot be opened here: {error.strerror}"
        ) from None


def _report(host: str, port: int, count: int, index: int, seconds: float) -> None:
    """Reports from another process to the first, and receives whether all settings agree."""
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(0.01, left)) as first:
                first.sendall(f"{index} {count}".encode())
                first.settimeout(seconds + 5)
                answer = first.recv(200).decode()
            break
        except OSError as error:
            if left <= 0:
                raise RuntimeError(
                    f"process 0 did not answer at {host}:{port} within {seconds:g} s: {error}"
                ) from None
            time.sleep(0.2)
    if answer != "ok":
        raise RuntimeError(answer or f"process 0 at {host}:{port} went away")


def _initialize(where: str, seconds: float, **arguments: object) -> None:
    late = threading.Timer(_RUNTIME * seconds, _give_up, [where, _RUNTIME * seconds])
    late.daemon = True
    late.start()
    jax.config.update("jax_enable_preemption_service", True)  # `harness.stopping` asks it
    try:
        jax.distributed.initialize(initialization_timeout=int(2 * _RUNTIME * seconds), **arguments)  # pyright: ignore[reportArgumentType]
        jax.devices()  # the processes tell each other of theirs
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        advice = (
            "" if arguments else "; elsewhere say --coordinator=HOST:PORT --processes=N --process=I"
        )
        raise RuntimeError(
            f"the run's processes did not come together by {where}: {reason}{advice}"
        ) from None
    finally:
        late.cancel()


def _give_up(where: str, seconds: float) -> None:
    """Ends the process: what waits within JAX cannot be interrupted."""
    text = f"error: the run's processes did not come together by {where} within {seconds:g} s"
    print(text, file=sys.stderr, flush=True)
    os._exit(1)


def is_first() -> bool:
    """Returns whether this process writes what one alone must write."""
    return jax.process_index() == 0


def agree(what: str, value: str) -> None:
    """Checks that all processes have the same text.

    Raises:
        ValueError: they do not.
    """
    if jax.process_count() == 1:
        return
    every = multihost_utils.process_allgather(np.uint32(zlib.crc32(value.encode())))
    others = [i for i, x in enumerate(np.asarray(every)) if x != every[0]]
    if others:
        raise ValueError(
            f"{what} differs between process 0 and process {others[0]}; give all the same"
        )


def any_of(condition: bool) -> bool:
    """Returns whether it holds in any of the processes."""
    if jax.process_count() == 1:
        return condition
    return bool(np.any(multihost_utils.process_allgather(np.int32(condition))))


def wait_for_all(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
