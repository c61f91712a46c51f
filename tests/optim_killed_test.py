"""Training with quantized state is killed again and again, and ends in the same bits."""

import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

pytestmark = [pytest.mark.long, pytest.mark.exhaustive]

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
import jaxquant as jq
from experiments.harness.training import sharding, train
from experiments.harness.running.checkpoints import Checkpoints

class Batches:
    at = 0
    def __iter__(self): return self
    def __next__(self):
        self.at += 1
        return np.random.default_rng(self.at).normal(size=(8, 64)).astype(np.float32)
    def get_state(self): return {"at": self.at}
    def set_state(self, state): self.at = state["at"]

adam = jq.optim.quantize_state(optax.scale_by_adam(), jq.optim.adaptive(5.0, interval=3))
tx = optax.chain(adam, train.scale_by_schedule_argument())
mesh = sharding.make_mesh()
loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - x) ** 2)
rng = np.random.default_rng(0)
params = {k: jnp.asarray(rng.normal(size=s) * 0.1, jnp.float32)
          for k, s in {"a": (64, 300), "b": (300, 64)}.items()}
state = train.init_state(lambda: params, tx, mesh)
with Checkpoints(sys.argv[1] + "/run") as checkpoints:
    state, _ = train.fit(
        train.make_step(loss, tx, mesh), state, Batches(), train.stable(1e-2, 1), 40, mesh,
        checkpoints=checkpoints, log_every=1, checkpoint_every=2,
        on_log=lambda n, loss: print("step", flush=True),
    )
leaves = [np.asarray(x) for x in jax.tree.leaves(state)]
np.savez(sys.argv[1] + "/end.npz", *leaves)
"""


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def end(folder):
    with np.load(folder / "end.npz") as found:
        return [found[name] for name in found.files]


def test_killed_at_random_steps_it_ends_in_the_same_bits(tmp_path):
    undisturbed, killed, rng, kills = tmp_path / "a", tmp_path / "b", random.Random(), 0
    undisturbed.mkdir(), killed.mkdir()
    assert start(undisturbed).wait(300) == 0
    while kills < 6:
        process = start(killed)
        assert process.stdout is not None
        # A few steps on, and then at any moment within one: in the midst of a save, for instance.
        for _ in range(rng.randint(1, 6)):
            if not process.stdout.readline():
                break
        time.sleep(rng.uniform(0, 0.05))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3, "the run was over before it could be killed"
    assert start(killed).wait(300) == 0
    found = end(killed)
    assert any(x.dtype == np.uint8 and x.any() for x in found)  # codes, and not zeros
    for one, other in zip(end(undisturbed), found, strict=True):
        np.testing.assert_array_equal(one, other)
