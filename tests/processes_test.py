"""Several real processes of one run, over loopback: the same numbers as one, and errors in a line."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT

from experiments.harness.running import files, processes

pytestmark = pytest.mark.exhaustive
QUANTIZED = {"recipe": "int8_train", "state": "fixed-5", "state_shards": "(8, 1)", "scan": True}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def command(workdir, *flags: str, **config) -> list[str]:
    fields = {"steps": 3, "log_every": 1, "checkpoint_every": 1} | config
    own = [f"--config.{k}={v}" for k, v in fields.items()]
    return [
        *(sys.executable, "-m", "experiments.train", "--preset=smoke", f"--workdir={workdir}"),
        *(*own, *flags),
    ]


def start(arguments: list[str], devices: int) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def pair(workdir, counts=(2, 2), devices: int = 4, **config) -> list[subprocess.Popen]:
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    numbers = ([f"--processes={n}", f"--process={i}"] for i, n in enumerate(counts))
    return [start(command(workdir, coordinator, *own, **config), devices) for own in numbers]


def ended(started: list[subprocess.Popen], seconds: float = 200) -> list[tuple[int, str]]:
    """(exit status, what it said) of each."""
    found = []
    for process in started:
        _, said = process.communicate(timeout=seconds)
        found.append((process.returncode, said))
    return found


def parameters(workdir, step: int) -> dict[str, np.ndarray]:
    """Of a checkpoint, whoever wrote it."""
    folder = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        found = checkpointer.restore(folder, restore_args=as_numpy)["params"]
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(found)}


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "devices"), [("int8_train", 1), ("w8a8", 4)])
def test_two_processes_follow_one_with_as_many_devices(tmp_path, recipe, devices):
    """Bit for bit where two devices add up floats: a + b is b + a.

    Eight devices' floats are added up in another order by processes than within one: seven digits are the
    same.  With `int8_train` its stochastic rounding, which is keyed by what is rounded, would then draw anew.
    """
    config = QUANTIZED | {"recipe": recipe, "steps": 6}
    one = start(command(tmp_path / "one", **config), 2 * devices)
    ends = ended([one]) + ended(pair(tmp_path / "two", devices=devices, **config))
    assert [code for code, _ in ends] == [0, 0, 0], ends
    for step in (5, 6):
        found, expected = (parameters(tmp_path / name, step) for name in ("two", "one"))
        for path, value in expected.items():
            if devices == 1:
                np.testing.assert_array_equal(found[path], value, err_msg=f"{path} at {step}")
            np.testing.assert_allclose(found[path], value, atol=1e-5, err_msg=f"{path} at {step}")


@pytest.mark.long
def test_processes_that_do_not_fit_together_say_so_in_a_line(tmp_path):
    begin = time.monotonic()
    numbers = ("--processes=2", "--process=1"), ("--processes=2", "--process=0")
    alone = [
        start(command(tmp_path, f"--coordinator=127.0.0.1:{free_port()}", *own), 1)
        for own in numbers
    ]
    said = ended(alone + pair(tmp_path, counts=(2, 3)))
    # Each gives up within 20 s; four of them start on two cores.
    assert time.monotonic() - begin < 60
    words = ("process 0 did not answer", "process 1 of 2 did not come", "--processes is 2")
    for (code, text), expected in zip(said, (*words, words[-1]), strict=True):
        assert code == 1
        assert expected in text
        assert len([x for x in text.splitlines() if x.strip()]) == 1, text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("10.0.0.2", 2, 0), "the first process's HOST:PORT, as 10.0.0.2:8476; got '10.0.0.2'"),
        (("host:99999", 2, 0), "HOST:PORT"),
        (("host:1", None, 0), "a number from 1 on; got None"),
        (("host:1", 2, 2), "a number from 0 to 1; got 2"),
        (("host:1", 2, None), "a number from 0 to 1; got None"),
        (("auto", 2, 0), "go with --coordinator=HOST:PORT"),
    ],
)
def test_bad_flags_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        processes.join(*arguments)


@pytest.mark.long
def test_sigterm_saves_and_the_same_command_ends_in_the_same_bytes(tmp_path):
    config = {"steps": 400, "log_every": 100, "checkpoint_every": 200}
    assert ended([start(command(tmp_path / "whole", **config), 1)])[0][0] == 0
    told = start(command(tmp_path / "told", **config), 1)
    while not (tmp_path / "told" / "checkpoints").exists():
        time.sleep(0.05)
    told.send_signal(signal.SIGTERM)
    ((code, text),) = ended([told])
    assert code == 75, text
    assert "stopped by SIGTERM; saved at step" in text
    assert ended([start(command(tmp_path / "told", **config), 1)])[0][0] == 0
    for name in ("metrics.json", "result.json"):
        assert (tmp_path / "told" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.long
def test_the_second_process_of_a_workdir_refuses(tmp_path):
    with files.alone(tmp_path):
        ((code, text),) = ended([start(command(tmp_path), 1)])
    assert code == 2
    assert f"workdir '{tmp_path}' is in use by process {os.getpid()}" in text
