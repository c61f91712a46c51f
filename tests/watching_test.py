"""Looking on at a run: its figures, its input's watchdog, and that nothing of it changes what is trained."""

import json
import logging
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Counter

from experiments.harness.running.checkpoints import Checkpoints
from experiments.harness.running.watchdog import Hung, Watched
from experiments.harness.training import metrics, sharding, throughput, train
from experiments.harness.training.divergence import DivergencePolicy
from experiments.train import Watching
from experiments.train.watching import Watch

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("library_promotion")


class Batches(Counter):
    """The batch at `slow` takes a second more."""

    def __init__(self, slow: int = -1):
        super().__init__()
        self.slow = slow

    def __next__(self):
        if self.at == self.slow:
            time.sleep(1)
        return super().__next__()


def spiking(params, batch):
    """Forty times as large at batch 21."""
    return jnp.mean((params["x"][None] - jnp.sin(batch)) ** 2) * jnp.where(
        batch[0, 0] == 21, 40.0, 1.0
    )


def run(folder, steps, watching=None, guard=train.STOP, batches=None):
    """A small run, looked at or not."""
    mesh, tx = sharding.make_mesh(), train.adamw()
    state = train.init_state(lambda: {"x": jnp.ones(3)}, tx, mesh)
    step = train.make_step(spiking, tx, mesh, skips=guard.action == "skip")
    schedule = train.stable(0.05, 10)
    batches = batches or Batches()
    meter = throughput.Throughput(6, 100, jax.devices())
    with Checkpoints(folder / "checkpoints") as checkpoints:
        fit = {"log_every": 5, "checkpoint_every": 10, "checkpoints": checkpoints, "guard": guard}
        if watching is None:
            return train.fit(step, state, batches, schedule, steps, mesh, **fit)
        with Watch(watching, folder, {"seed": 0}, batches, schedule, meter) as watch:

            def on_log(done: int, loss: float) -> None:
                watch.on_log(done, loss, checkpoints.seconds)

            found = train.fit(
                watch.step(step), state, watch.batches, schedule, steps, mesh, on_log=on_log, **fit
            )
            watch.on_end({"valid": 1.5})
            return found


def events(folder) -> list[tuple[int, str, float]]:
    """(step, name, value) of all event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += length + 16
    return found


# ---- the run


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "guard",
    [train.STOP, DivergencePolicy("roll_back", spike=20.0), DivergencePolicy("skip", spike=20.0)],
)
def test_a_run_that_is_looked_at_trains_the_same(tmp_path, guard):
    alone, history = run(tmp_path / "alone", 40, guard=guard)
    watching = Watching(("tensorboard",), (7, 8), 60.0)
    watched, watched_history = run(tmp_path / "watched", 40, watching, guard)
    chex.assert_trees_all_equal(alone, watched)
    assert history == watched_history
    logged = {step: x for step, name, x in events(tmp_path / "watched") if name == "loss/train"}
    assert [*logged] == [step for step, _ in history]
    np.testing.assert_allclose([*logged.values()], [x for _, x in history], rtol=1e-6)


def test_what_it_took_is_written(tmp_path):
    run(tmp_path, 40, Watching(("tensorboard",), (7, 8)))
    taken = json.loads((tmp_path / "performance.json").read_text())
    assert taken["bytes"]["parameters"] == {"all": 12, "device": 12}
    assert taken["bytes"]["optimizer_state"]["all"] >= 24  # both moments, and counts
    assert 0 < taken["medians"]["seconds_per_step"] < 1
    assert "mfu" not in taken["medians"]  # no peak is known of a CPU
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    found = events(tmp_path)
    assert (40, "loss/valid", 1.5) in found
    rates = {step: x for step, name, x in found if name == "learning_rate"}
    assert rates[5] == pytest.approx(0.05 * 5 / 10)
    assert rates[40] == pytest.approx(0.05)


def test_a_run_that_goes_on_has_its_own_steps(tmp_path):
    run(tmp_path, 20, Watching(("tensorboard",)))
    run(tmp_path, 40, Watching(("tensorboard",)))
    steps = [step for step, name, _ in events(tmp_path) if name == "loss/train"]
    assert sorted(steps) == [5, 10, 15, 20, 25, 30, 35, 40]


def test_a_profile_of_steps_behind_it_is_missed_aloud(tmp_path, caplog):
    run(tmp_path, 20)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, 40, Watching(profile=(7, 8)))
    assert "no profile was taken: step 7 was behind" in caplog.text
    assert not (tmp_path / "profile").exists()
    (tmp_path / "profile" / "plugins").mkdir(parents=True)
    (tmp_path / "profile" / "plugins" / "a.xplane.pb").touch()
    caplog.clear()
    run(tmp_path, 40, Watching(profile=(7, 8)))  # it was taken before
    assert "no profile" not in caplog.text


@pytest.mark.parametrize(
    ("watching", "words"),
    [
        (Watching(("tensorbord",)), "--metrics is a list of tensorboard, wandb"),
        (Watching(profile=(0, 4)), "--profile is FIRST:LAST"),
        (Watching(profile=(8, 4)), "--profile is FIRST:LAST"),
        (Watching(profile=(4, 41)), "1 to 40; got 4:41"),
        (Watching(input_timeout=-1.0), "--input_timeout is a number of seconds"),
        (Watching(input_timeout=float("nan")), "--input_timeout is a number of seconds"),
        (Watching(input_timeout=1e300), "from 0 to 1e[+]09; got 1e[+]300"),
    ],
)
def test_what_cannot_be_looked_at_is_named(watching, words):
    with pytest.raises(ValueError, match=words):
        watching.check(40)


# ---- figures


def test_a_lap_leaves_checkpoints_out(monkeypatch):
    now = iter([0.0, 10.0, 10.0, 14.0, 14.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    device = types.SimpleNamespace(device_kind="TPU v5 lite")
    meter = throughput.Throughput(tokens=1000, flops=197 * 10**11, devices=[device, device])
    assert meter.interval(5, 0.0, 0.0) == {}  # what it compiled in
    assert meter.interval(5, 5.0, 1.0) == {
        "seconds_per_step": 1.0,
        "tokens_per_second": 1000.0,
        "input_wait": 0.2,
        "mfu": 0.05,  # a tenth of one chip's peak each second, on two
    }


def test_the_peak_of_a_device_is_its_share_of_the_chips():
    of = lambda *kinds: throughput.peak([types.SimpleNamespace(device_kind=k) for k in kinds])  # noqa: E731
    assert of("TPU7x", "TPU7x") == 2307e12
    assert of("TPU v5 lite", "cpu") is None


class Service(types.ModuleType):
    """Stands for wandb."""

    class Error(Exception):
        pass

    def __init__(self, refuses=False):
        super().__init__("wandb")
        self.refuses, self.opened, self.logged, self.ended = refuses, [], [], 0

    def init(self, **options):
        if self.refuses:
            raise self.Error("api_key not configured")
        self.opened.append(options)
        return types.SimpleNamespace(
            define_metric=lambda *a, **k: None, log=self.logged.append, finish=self._finish
        )

    def _finish(self):
        self.ended += 1


def test_weights_and_biases_knows_a_run_by_its_folder(tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setattr(metrics, "check", lambda names: None)
    monkeypatch.setitem(sys.modules, "wandb", service)
    run(tmp_path, 20, Watching(("wandb",)))
    run(tmp_path, 40, Watching(("wandb",)))
    first, second = service.opened
    assert first["id"] == second["id"]
    assert first["config"] == {"seed": 0}
    assert [x["step"] for x in service.logged if "loss/train" in x] == [*range(5, 41, 5)]
    assert service.ended == 2


def test_a_service_that_lets_nobody_in_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "check", lambda names: None)
    monkeypatch.setitem(sys.modules, "wandb", Service(refuses=True))
    with pytest.raises(ValueError, match=r"api_key not configured.*WANDB_MODE=offline"):
        run(tmp_path, 20, Watching(("wandb",)))


# ---- the watchdog


def test_a_batch_that_comes_too_late_ends_the_run(tmp_path):
    with pytest.raises(Hung, match=r"within 0\.3 s \(it is in __next__, watching_test\.py line"):
        run(tmp_path, 40, Watching(input_timeout=0.3), batches=Batches(slow=13))
    found, history = run(tmp_path, 40)
    expected, expected_history = run(tmp_path / "undisturbed", 40)
    chex.assert_trees_all_equal(found, expected)
    assert history == expected_history


def test_the_watchdog_gives_what_it_gets():
    batches = Watched(iter([1, 2]), 5.0)
    assert [*batches] == [1, 2]
    slow = Watched(Batches(slow=1), 5.0)
    for _ in range(3):
        next(slow)
    assert 0.9 < slow.seconds < 2
    slow.set_state({"at": 7})
    assert next(slow)[0, 0] == 7
    assert slow.get_state() == {"at": 8}


@pytest.mark.long
def test_a_process_whose_input_hangs_ends_and_may_be_started_again():
    """Threads of a pool, as Grain has, would be waited for at the end of the process."""
    program = """
import concurrent.futures, threading
from experiments.harness.running import cli
from experiments.harness.running import watchdog
from experiments.train import Config

class Hanging:
    def __next__(self):
        pool = concurrent.futures.ThreadPoolExecutor()
        return pool.submit(threading.Event().wait).result()

cli.main(lambda config: next(watchdog.Watched(Hanging(), 0.2)), {"smoke": Config()}, "smoke")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 75
    assert done.stderr.startswith("error: the input pipeline gave no batch within 0.2 s")
