import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import children
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import Counter
from flax import nnx

import jaxquant as jq
from experiments.harness import data
from experiments.harness.models import lm
from experiments.harness.running import trials
from experiments.harness.running.checkpoints import Checkpoints, Spacing
from experiments.harness.running.stopping import Preempted
from experiments.harness.training import sharding, train, wsd
from experiments.harness.training.divergence import DivergencePolicy

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("library_promotion")


def quadratic(params, batch):
    return jnp.mean((params["x"][None] - jnp.sin(batch)) ** 2)


@pytest.fixture
def toy():
    mesh, tx = sharding.make_mesh(), train.adamw()

    def start():
        return train.init_state(lambda: {"x": jnp.ones(3)}, tx, mesh)

    return start, train.make_step(quadratic, tx, mesh), mesh


def run(toy, steps, folder=None, **options):
    start, step, mesh = toy
    plan = train.cosine(0.05, 200, 10)
    if folder is None:
        return train.fit(step, start(), Counter(), plan, steps, mesh, **options)
    with Checkpoints(folder) as checkpoints:
        return train.fit(
            step, start(), Counter(), plan, steps, mesh, checkpoints=checkpoints, **options
        )


# ---- schedules


def test_schedules_at_their_landmarks():
    cosine = train.cosine(2.0, 100, 10, floor=0.1)
    np.testing.assert_allclose(
        [cosine(0), cosine(9), cosine(10), cosine(55), cosine(100)],
        [0.2, 2, 2, 1.1, 0.2],
        rtol=1e-6,
    )
    branch, trunk = train.cooldown(2.0, 10, 80, 100), train.stable(2.0, 10)
    np.testing.assert_allclose([branch(90), branch(100)], [1.0, 0.0], atol=1e-6)
    for step in range(80):
        assert float(branch(step)) == float(trunk(step))


def test_a_schedule_is_data_one_compilation_for_all(toy):
    start, _, mesh = toy
    counted = chex.assert_max_traces(n=1)(lambda params, batch: quadratic(params, batch))
    step = train.make_step(counted, train.adamw(), mesh)
    for plan in (train.cosine(0.1, 50, 5), train.stable(0.2, 3), train.cooldown(0.1, 5, 40, 50)):
        train.fit(step, start(), Counter(), plan, 5, mesh)


def test_the_optimizer_is_optax_adamw():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    gradients = jax.tree.map(lambda p: 0.1 * p, params)
    ours, reference = (
        train.adamw(clip=1e9),
        optax.adamw(0.01, 0.9, 0.95, weight_decay=0.1, mask={"w": True, "b": False}),
    )
    states, found, expected = [ours.init(params), reference.init(params)], params, params
    for _ in range(3):
        updates, states[0] = ours.update(
            gradients, states[0], found, learning_rate=jnp.float32(0.01)
        )
        found = optax.apply_updates(found, updates)
        updates, states[1] = reference.update(gradients, states[1], expected)
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)


# ---- the loop


def test_fit_stops_where_it_should_and_reports_each_interval(toy):
    seen = []
    state, history = run(toy, 47, log_every=10, on_log=lambda n, loss: seen.append(n))
    assert int(state.step) == 47
    assert [step for step, _ in history] == [10, 20, 30, 40, 47]
    assert seen == [10, 10, 10, 10, 7]


@pytest.mark.parametrize("stop", [1, 20, 33, 40])
def test_a_resumed_run_is_bit_identical(toy, tmp_path, stop):
    whole, history = run(toy, 60, log_every=5, checkpoint_every=10)
    run(toy, stop, tmp_path / "run", log_every=5, checkpoint_every=10)
    # What a kill leaves: the checkpoints up to the last multiple of checkpoint_every.
    for folder in (tmp_path / "run").iterdir():
        if folder.name.isdigit() and int(folder.name) % 10:
            folder.rename(tmp_path / f"gone-{folder.name}")
    resumed, resumed_history = run(toy, 60, tmp_path / "run", log_every=5, checkpoint_every=10)
    chex.assert_trees_all_equal(whole, resumed)
    assert history == resumed_history


class Counted(Checkpoints):
    """Checkpoints that say at which steps they were saved."""

    def __init__(self, folder, spacing):
        super().__init__(folder, spacing=spacing)
        self.steps = []

    def save(self, step, *arguments):
        self.steps.append(step)
        super().save(step, *arguments)


def spaced(toy, folder, spacing, steps=60, stop=None):
    start, step, mesh = toy
    with Counted(folder, spacing) as checkpoints, contextlib.suppress(Preempted):
        plan = train.cosine(0.05, 200, 10)
        train.fit(
            step, start(), Counter(), plan, steps, mesh, log_every=5, checkpoint_every=20,
            checkpoints=checkpoints, preemption_requested=lambda at: at == stop,
        )  # fmt: skip
    return checkpoints.steps


@pytest.mark.parametrize(
    ("seconds", "saves_ends", "stop", "steps"),
    [
        (1e9, False, None, []),
        (1e9, True, None, [60]),
        (1e9, False, 33, [33]),
        (0.0, False, None, [20, 40, 60]),
        (0.0, False, 33, [20, 33]),
    ],
)
def test_saves_are_so_many_seconds_apart_and_a_stop_saves_at_once(
    toy, tmp_path, seconds, saves_ends, stop, steps
):
    assert spaced(toy, tmp_path / "run", Spacing(seconds, saves_ends), stop=stop) == steps
    whole, history = run(toy, 60, log_every=5)
    resumed, resumed_history = run(toy, 60, tmp_path / "run", log_every=5)
    chex.assert_trees_all_equal(whole, resumed)
    assert history == resumed_history


def test_what_a_run_worked_since_its_last_save_is_remembered_while_it_is_closed(toy, tmp_path):
    spacing = Spacing(1000.0)
    assert spaced(toy, tmp_path / "run", spacing, steps=20) == []
    assert 0 < spacing.worked < 1000
    spacing.worked += 1000  # as though it had been at work so long
    assert spaced(toy, tmp_path / "run", spacing) == [20]
    assert spacing.worked < 1000


def grown(toy, context):
    """Two branches of a trunk, as a study's trial has them: (history, parameters) of each."""
    start, step, mesh = toy
    options = {"log_every": 10, "checkpoint_every": 10, "on_log": context.progress}
    stops = {30: 24, 60: 48}
    trunk = wsd.Trunk(
        step, start(), Counter(), mesh, context.checkpoints, list(stops.values()), options
    )

    def point(end):
        trunk.grow(train.stable(0.05, 3), stops[end])
        plan = train.cooldown(0.05, 3, stops[end], end)
        state, history = trunk.branch(plan, end, f"branch-{end}")
        return {"history": [[*x] for x in history], "x": state.params["x"].tolist()}

    return [context.cached(str(end), functools.partial(point, end)) for end in stops]


@pytest.mark.first(2)
@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("cut_at", [1, 4, 6, 8])  # in the trunk, the first branch, both again
def test_a_trial_cut_off_between_saves_ends_in_the_same_record(toy, tmp_path, cut_at, seconds):
    calls = []

    def context(name):
        def progress(steps, loss):
            calls.append(name)
            if name == "cut" and len(calls) == cut_at:
                raise KeyboardInterrupt

        (tmp_path / name).mkdir(exist_ok=True)
        return trials.Context(tmp_path / name, progress, seconds_between_saves=seconds)

    with pytest.raises(KeyboardInterrupt):
        grown(toy, context("cut"))
    assert grown(toy, context("cut")) == grown(toy, context("whole"))
    assert any((tmp_path / "whole" / "trunk").glob("[0-9]*")) == (seconds == 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
def test_a_full_disk_is_named_and_costs_what_came_after_the_last_checkpoint(toy, tiny_disk):
    whole, history = run(toy, 60, log_every=5, checkpoint_every=10)
    run(toy, 20, tiny_disk / "run", log_every=5, checkpoint_every=10)
    free = shutil.disk_usage(tiny_disk).free
    (tiny_disk / "ballast").write_bytes(b"x" * (free - 16_384))
    with pytest.raises(OSError, match="No space left on device") as caught:
        run(toy, 60, tiny_disk / "run", log_every=5, checkpoint_every=10)
    assert caught.value.errno == errno.ENOSPC
    (tiny_disk / "ballast").unlink()
    with Checkpoints(tiny_disk / "run") as checkpoints:
        assert int(checkpoints.restore(toy[0](), Counter(), 60).state.step) == 20
    resumed, resumed_history = run(toy, 60, tiny_disk / "run", log_every=5, checkpoint_every=10)
    chex.assert_trees_all_equal(whole, resumed)
    assert history == resumed_history


def test_divergence_ends_clearly(toy):
    start, _, mesh = toy
    step = train.make_step(lambda p, b: jnp.mean(p["x"][None] / (b - 6.0)), train.adamw(), mesh)
    with pytest.raises(train.Diverged, match="by step 7") as caught:
        train.fit(step, start(), Counter(), train.stable(0.1, 1), 20, mesh, log_every=10)
    assert caught.value.step == 7


def spiky(params, batch):
    """The toy's loss, not finite at batch 6 and eighty times as large at batch 29."""
    at = batch[0, 0]
    return quadratic(params, batch) * jnp.where(at == 29, 80.0, 1.0) / jnp.where(at == 6, 0.0, 1.0)


def guarded(toy, folder=None, action="stop", stop=None, **options):
    start, _, mesh = toy
    guard = DivergencePolicy(action, spike=10.0, **options)
    step = train.make_step(spiky, train.adamw(), mesh, skips=action == "skip")
    batches = Counter()
    with Checkpoints(folder, every=5) if folder else contextlib.nullcontext() as checkpoints:
        state, history = train.fit(
            step, start(), batches, train.stable(0.01, 1), 40, mesh, log_every=5, checkpoint_every=5,
            checkpoints=checkpoints, guard=guard, preemption_requested=lambda at: at == stop,
        )  # fmt: skip
    return state, history, batches.at


def test_a_guard_skips_the_updates_of_bad_steps(toy):
    state, history, at = guarded(toy, action="skip")
    assert (int(state.step), at, len(history)) == (40, 40, 8)
    assert np.isfinite([loss for _, loss in history]).all()
    assert jnp.isfinite(state.params["x"]).all()
    with pytest.raises(train.Diverged, match="by step 7"):
        guarded(toy)


@pytest.mark.long
@pytest.mark.exhaustive
def test_a_guard_rolls_back_and_goes_on_with_the_data_that_follows(toy, tmp_path):
    state, history, at = guarded(toy, tmp_path / "run", action="roll_back")
    # From 10 back to 5, whose data is 10 ahead; from 25 (data 30) back to 20.
    assert (int(state.step), at) == (40, 50)
    assert [step for step, _ in history] == [5, 10, 15, 20, 25, 30, 35, 40]
    with pytest.raises(train.Diverged, match="with no checkpoint to go back to"):
        guarded(toy, tmp_path / "other", action="roll_back", steps=10)  # there is none so early
    for stop in (3, 12, 23, 27):
        folder = tmp_path / f"stopped-{stop}"
        with pytest.raises(Preempted, match=f"saved at step {stop}"):
            guarded(toy, folder, action="roll_back", stop=stop)
        again, same, _ = guarded(toy, folder, action="roll_back")
        chex.assert_trees_all_equal(again, state)
        assert same == history


@pytest.mark.parametrize(
    "bad", [{"action": "wait"}, {"spike": 0.5}, {"steps": 0}, {"most": 0}, {"spike": math.nan}]
)
def test_guards_that_there_are_not_are_refused(bad):
    with pytest.raises(ValueError, match="the divergence policy"):
        DivergencePolicy(**bad)


def test_a_training_step_with_traced_bits_is_traced_once():
    config = lm.sized("3k")
    graphdef, mesh = (
        nnx.graphdef(nnx.eval_shape(lambda: lm.LM(config, nnx.Rngs(0)))),
        sharding.make_mesh(),
    )

    @chex.assert_max_traces(n=1)
    def loss(params, tokens, bits):
        int_bits = jq.Quantizer(jq.Int(bits), "channel")
        model = nnx.merge(graphdef, params)
        dot_general = jq.DotGeneral(jq.Operands(int_bits, int_bits))
        model = jq.nnx.quantize(model, {"blocks/.*": dot_general})
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    step = train.make_step(loss, train.adamw(), mesh)
    corpus, losses = data.load("generated"), []
    for bits in range(2, 10):
        state = train.init_state(
            lambda: nnx.state(lm.LM(config, nnx.Rngs(0)), nnx.Param), train.adamw(), mesh
        )
        batches = data.train_batches(corpus, 16, 4, seed=0)
        extra = (jnp.float32(bits),)
        _, history = train.fit(step, state, batches, train.stable(1e-2, 1), 4, mesh, data=extra)
        losses.append(history[-1][1])
    assert len(set(losses)) == 8


# ---- layouts


@pytest.mark.parametrize(
    ("sizes", "message"), [((3, 1), "1 device"), ((0, -1), "mesh"), ((-1, -1), "mesh")]
)
def test_a_mesh_that_does_not_fit_is_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def train_binary(workdir, devices, steps=50, **config):
    flags = [f"--config.{k}={v}" for k, v in config.items()]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    return children.run([sys.executable, "-m", "experiments.train", "--preset=smoke", f"--workdir={workdir}",
         f"--config.steps={steps}", "--config.log_every=1", "--config.checkpoint_every=25", *flags],
        cwd=ROOT, env=environment, timeout=300,
    )  # fmt: skip


def losses(workdir) -> np.ndarray:
    return np.array([entry["loss"] for entry in json.loads((workdir / "metrics.json").read_text())])


@pytest.mark.exhaustive
@pytest.mark.long
def test_eight_devices_follow_one_and_checkpoints_change_layout(tmp_path):
    layouts = {"one": (1, 1, 1), "fsdp": (1, 8, 1), "both": (2, 4, 1), "all": (2, 2, 2)}
    for name, sizes in layouts.items():
        mesh = dict(zip(("mesh_data", "mesh_fsdp", "mesh_tensor"), sizes, strict=True))
        done = train_binary(tmp_path / name, math.prod(sizes), **mesh)
        assert done.returncode == 0, done.stderr[-2000:]
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "one"), rtol=2e-4)
    assert losses(tmp_path / "one").size == 50
    assert losses(tmp_path / "one")[-1] < losses(tmp_path / "one")[0]

    # The fsdp = 8 run lost its end; data × fsdp = 2 × 4 goes on from its checkpoint at step 25.
    os.rename(tmp_path / "fsdp" / "checkpoints" / "50", tmp_path / "lost")
    done = train_binary(tmp_path / "fsdp", 8, mesh_data=2, mesh_fsdp=4)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(losses(tmp_path / "fsdp"), losses(tmp_path / "one"), rtol=2e-4)
    assert "50%" in done.stderr


@pytest.mark.exhaustive
@pytest.mark.long
def test_a_quantized_run_with_its_state_in_pages_is_the_same_on_every_layout(tmp_path):
    quantized = {"recipe": "int8_train", "state": "fixed-5", "state_shards": "(4, 2)", "scan": True}
    for name, sizes in {"one": (1, 1, 1), "fsdp": (2, 4, 1), "tensor": (1, 4, 2)}.items():
        mesh = dict(zip(("mesh_data", "mesh_fsdp", "mesh_tensor"), sizes, strict=True))
        done = train_binary(tmp_path / name, math.prod(sizes), steps=30, **mesh, **quantized)
        assert done.returncode == 0, done.stderr[-2000:]
    one, others = losses(tmp_path / "one"), [losses(tmp_path / n) for n in ("fsdp", "tensor")]
    for other in others:
        np.testing.assert_allclose(other, one, rtol=2e-3)


@pytest.mark.exhaustive
@pytest.mark.long
def test_parameters_in_bfloat16_go_on_bit_for_bit_and_learn(tmp_path):
    pages = {"state": "fixed-5"}
    half = pages | {"params_dtype": "bfloat16"}
    for name, own in {"float32": pages, "whole": half, "parts": half}.items():
        assert train_binary(tmp_path / name, 1, **own).returncode == 0
    (tmp_path / "parts" / "result.json").unlink()
    last = max((tmp_path / "parts" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    os.rename(last, tmp_path / "lost")
    done = train_binary(tmp_path / "parts", 1, **half)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_array_equal(losses(tmp_path / "parts"), losses(tmp_path / "whole"))
    found, wanted = (losses(tmp_path / name)[-5:].mean() for name in ("whole", "float32"))
    assert abs(found - wanted) < 0.05
    assert not np.array_equal(losses(tmp_path / "whole"), losses(tmp_path / "float32"))
    done = train_binary(tmp_path / "whole", 1, **pages)
    assert done.returncode == 2
    assert "params_dtype 'bfloat16' there, 'float32' here" in done.stderr


# A vision transformer, quantized, its moments in pages: sys.argv has the mesh's sizes.
VISION = """
import json, sys
import jax
from flax import nnx
import jaxquant as jq
from experiments.harness.data import images
from experiments.harness.training import sharding, train
from experiments.harness.models import vision
from experiments.harness.training import arms

mesh = sharding.make_mesh(*map(int, sys.argv[1:]))
config = vision.sized("tiny", layers=2, heads=4, image=8, patch=2)
make = lambda: jq.nnx.quantize(vision.ViT(config, nnx.Rngs(0)), {"blocks/.*": "w8a8"})
graphdef = nnx.graphdef(nnx.eval_shape(make))
moments = arms.moments("fixed-5", 100, **sharding.of_pages(mesh, (4, 2)))
tx = train.adamw(moments=moments)
state = train.init_state(lambda: nnx.state(make(), nnx.Param), tx, mesh)
step = train.make_step(vision.classification_loss(graphdef, mesh), tx, mesh)
batches = images.train_batches(images.load("digits"), 32, 0)
_, history = train.fit(
    step, state, batches, train.cosine(2e-3, 20, 2), 20, mesh, log_every=1
)
print(json.dumps([loss for _, loss in history]))
"""


@pytest.mark.exhaustive
@pytest.mark.long
def test_a_vision_transformer_is_the_same_on_every_layout():
    found = []
    for sizes in [(1, 1, 1), (2, 2, 2)]:
        count = f"--xla_force_host_platform_device_count={math.prod(sizes)}"
        done = subprocess.run(
            [sys.executable, "-c", VISION, *map(str, sizes)], cwd=ROOT, text=True, timeout=300,
            env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}"}, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(np.array(json.loads(done.stdout)))
    one, other = found
    np.testing.assert_allclose(other[0], one[0], rtol=1e-6)
    # A sum's last bit turns a rounding here and there, and that grows.
    np.testing.assert_allclose(other, one, rtol=2e-3)
    assert one[-5:].mean() < 0.95 * one[:5].mean()


@pytest.mark.first(1)
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": "w9a9"}, "widths are 2 to 8, or 16"),
        ({"state": "fixed-9"}, "bits must be an integer from 2 to 8"),
        ({"state_shards": "(4,)"}, "for each of fsdp and tensor"),
        ({"params_dtype": "float16"}, "params_dtype is 'float32' or 'bfloat16'; got 'float16'"),
        ({"mesh_tensor": 2}, "does not cover 1 device(s) exactly"),
        ({"mesh_tensor": 0}, "config.mesh_tensor must be a number above 0"),
        ({"vocab_size": 2**40}, "config.vocab_size is a number from 0 to 1048576"),
        ({"batch": 10**9}, "at most 2147483647 tokens a step; got 1000000000 x 64"),
    ],
)
def test_what_no_run_could_use_is_named(tmp_path, change, words):
    done = train_binary(tmp_path, 1, **change)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.first(1)
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--profile=12", "--profile is FIRST:LAST, steps from 1 on, as 10:12; got '12'"),
        ("--metrics=tensorbored", "--metrics is a list of tensorboard, wandb"),
    ],
)
def test_flags_of_what_cannot_be_looked_at_are_named(tmp_path, flag, words):
    command = [sys.executable, "-m", "experiments.train", "--preset=smoke", f"--workdir={tmp_path}"]
    done = children.run([*command, flag], cwd=ROOT, timeout=100)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.long
def test_a_model_that_is_scanned_computes_as_one_that_is_not():
    listed = lm.sized("3k")
    stacked = dataclasses.replace(listed, scan=True, remat=True)
    one, other = (lm.LM(config, nnx.Rngs(0)) for config in (listed, stacked))
    blocks = nnx.state(other.blocks)
    for i, block in enumerate(one.blocks):
        nnx.update(block, jax.tree.map(lambda x, i=i: x[i], blocks))
    for name in ("embed", "norm", "head"):
        nnx.update(getattr(one, name), nnx.state(getattr(other, name)))
    tokens = jnp.arange(24).reshape(2, 12)
    np.testing.assert_allclose(one(tokens), other(tokens), rtol=1e-5, atol=1e-5)
