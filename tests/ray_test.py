"""Sweeps on a Ray cluster of two nodes, one of which is lost on the way."""

import dataclasses
import importlib.util
import os
import sys
import threading
import time
from typing import Any

import pytest

from experiments.harness.running import files, packed, ray_launcher, record_store, trials

pytestmark = pytest.mark.exhaustive
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'"
)


_LONG = 2.0  # seconds: longer than a node takes to die


@dataclasses.dataclass(frozen=True)
class Trial:
    number: int
    seconds: float = 1.0


def run_trial(trial: Trial, context: trials.Context) -> dict:
    """Notes in the store's folder that it began, and on which node."""
    begun = context.scratch.parent.parent / "begun"
    begun.mkdir(exist_ok=True)
    (begun / f"{trial.number}-{time.time_ns()}").write_text(_node())
    if trial.number < 0:
        raise ArithmeticError("it cannot be done")
    time.sleep(trial.seconds)
    return {"status": "done", "result": trial.number**2}


def _node() -> str:
    """Of the cluster, where there is one."""
    ray: Any = sys.modules.get("ray")
    return ray.get_runtime_context().get_node_id() if ray and ray.is_initialized() else ""


def just_begun(store, node: str) -> bool:
    """Whether a trial began on a node within the last half second, and is not finished."""
    for path in (store.workdir / "begun").glob("*"):
        number, at = map(int, path.name.split("-"))
        is_new = time.time_ns() - at < 0.5e9
        if is_new and path.read_text() == node and store.read(Trial(number, _LONG)) is None:
            return True
    return False


def compile_key(trial: Trial) -> None:
    """One for all."""


def sweep(store, grid, address):
    cluster = ray_launcher.Ray(address, (("num_cpus", 1.0),), retries=3)
    launch = trials.Launch(ray=cluster)
    return trials.run(
        grid, run_trial, store, cost=lambda t: 1.0, compile_key=compile_key, launch=launch
    )


@needs_ray
@pytest.mark.long
def test_a_sweep_outlives_a_node(tmp_path):
    from ray.cluster_utils import Cluster

    # Workers import this module.
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        other = cluster.add_node(num_cpus=2)
    store = record_store.RecordStore(tmp_path / "w", "squares")
    grid = [Trial(n, _LONG) for n in range(24)]
    records_in, node = tmp_path / "w" / "trials", other.node_id
    try:

        def lose() -> None:
            while len([*records_in.glob("*.json")]) < 6 or not just_begun(store, node):
                time.sleep(0.05)
            cluster.remove_node(other, allow_graceful=False)

        losing = threading.Thread(target=lose)
        losing.start()
        records = sweep(store, grid, cluster.address)
        losing.join()
    finally:
        cluster.shutdown()
    assert [r["result"] for r in records] == [n**2 for n in range(24)]
    # What a process of the lost node was writing may lie beside them, under a name that nothing reads.
    names = [path.name for path in records_in.iterdir() if not path.name.endswith(".tmp")]
    assert len(names) == 24
    begun = [p.name.split("-")[0] for p in (tmp_path / "w" / "begun").iterdir()]
    assert len(begun) > 24, "the node was lost with nothing under way"


@needs_ray
@pytest.mark.long
def test_failures_are_named_and_no_cluster_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    store = record_store.RecordStore(tmp_path / "w", "squares")
    with pytest.raises(RuntimeError, match=r"1 trial\(s\) failed.*number=-1(?s:.*)cannot be done"):
        sweep(store, [Trial(2, 0.0), Trial(-1)], "local")
    assert store.read(Trial(2, 0.0))["result"] == 4
    with pytest.raises(ValueError, match=r"no Ray cluster answers at .127\.0\.0\.1:1."):
        sweep(store, [Trial(3)], "127.0.0.1:1")
    with pytest.raises(ValueError, match="no Ray cluster answers at 'auto'"):
        sweep(store, [Trial(3)], "auto")


@pytest.mark.parametrize("text", ["", "num_cpus", "TPU=x", "=3", "num_cpus=-1"])
def test_resources_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="as num_cpus=8,TPU=4"):
        ray_launcher.parse_resources(text)


def test_records_may_lie_on_shared_storage(monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    memory = importlib.import_module("fsspec.implementations.memory")

    class Bucket(memory.MemoryFileSystem):
        protocol = ("gs", "gcs")
        store: dict = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012

    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, Bucket, clobber=True)
    store = record_store.RecordStore("gs://bucket/squares", "squares")
    assert store.read(Trial(3)) is None
    with store.lock(Trial(3)) as scratch:
        assert scratch.is_dir()
        store.write(Trial(3), {"status": "done", "result": 9}, 1.0)
    assert not scratch.exists()
    assert record_store.RecordStore("gs://bucket/squares", "squares").read(Trial(3))["result"] == 9
    row = packed.Row(files.read_json(store.path(Trial(3))), 1.0)
    store.path(Trial(3)).unlink()
    assert store.read(Trial(3)) is None
    packed.write("gs://bucket/squares", [row])
    assert store.read(Trial(3))["result"] == 9
    assert files.read_json(store.path(Trial(4))) is None
    with pytest.raises(ValueError, match="holds the study 'squares', not 'cubes'"):
        record_store.RecordStore("gs://bucket/squares", "cubes")
