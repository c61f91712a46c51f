"""Train steps by recipe, the optimizer's step, and short training runs."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmark import optimizers
from experiments.benchmark.lm import NnxLM, Shape
from experiments.device_check.products import read
from experiments.device_check.recording import Asker, race
from experiments.device_check.settings import Config
from experiments.harness import data
from experiments.harness.training import hlo, kernels, sharding, throughput, train
from experiments.train import program as runs

_LOG_EVERY = 5
_NO_LIMIT = float("inf")  # of the loss


@dataclasses.dataclass
class Step:
    """A compiled step of `experiments.train`, which a run takes one step further.

    Attributes:
        run: its settings.
        mesh: of the first device.
        schedule: of the learning rate.
        state: before the next step.
        compiled: the step.
        flops: that the model needs.
        seconds: of compiling.
    """

    run: runs.Config
    mesh: Any
    schedule: train.Schedule
    state: train.TrainState
    compiled: Any
    flops: int
    seconds: float
    _tokens: jax.Array

    def __call__(self) -> None:
        found = self.compiled(self.state, self._tokens, self.schedule, (), _NO_LIMIT)
        self.state, _ = jax.block_until_ready(found)

    def read(self) -> dict[str, Any]:
        """Returns what the compiled step says."""
        found = read(self.compiled) | {"compile_seconds": self.seconds}
        if jax.devices()[0].platform == "gpu":
            launched = kernels.kernels(hlo.parse(self.compiled.as_text()))
            found["kernels"] = sum(x.times for x in launched)
        return found

    def race(self, base: "Step", rounds: int) -> dict[str, Any]:
        """Returns the time as a ratio to another step's, and the rates."""
        found = race(self, base, "bf16", rounds)
        seconds, most = min(found["seconds_each"]), throughput.peak(jax.devices()[:1])
        share = {} if most is None else {"mfu": self.flops / seconds / most}
        tokens = self.run.batch * self.run.sequence
        return found | {"tokens_per_second": tokens / seconds, **share}


def make_step(config: Config, recipe: str, state: str = "fp32") -> Step:
    """Returns a step on tokens at random, in bfloat16.

    Args:
        config: of the check.
        recipe: of the blocks' linears; "" for none.
        state: of the optimizer, as `experiments.train` names them.
    """
    same = {x: getattr(config, x) for x in ("size", "vocab_size", "sequence", "batch", "steps")}
    options = {"recipe": recipe, "state": state, "dtype": "bfloat16", "scan": True}
    run = runs.Config(**same, **options, peak_lr=1e-3)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    program = runs.make_program(run, mesh, config.vocab_size)
    first = train.init_state(lambda: program.init(0), program.tx, mesh)
    shape = config.batch, config.sequence + 1
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
    schedule = jax.tree.map(jnp.asarray, runs.make_schedule(run))
    step: Any = train.make_step(program.loss, program.tx, mesh)
    start = time.perf_counter()
    compiled = step.lower(first, tokens, schedule, (), _NO_LIMIT).compile()
    flops = program.model.step_flops(config.batch, config.sequence)
    seconds = time.perf_counter() - start
    return Step(run, mesh, schedule, first, compiled, flops, seconds, tokens)


def ask_steps(config: Config, asker: Asker) -> None:
    """Asks for one train step, in bfloat16 and by recipe."""
    make = functools.cache(functools.partial(make_step, config))

    def ask(recipe: str) -> None:
        name = recipe or "bf16"
        asker(f"{name} step: operands", "compiled", lambda: make(recipe).read())
        asker(f"{name} step: time", "measured", lambda: make(recipe).race(make(""), config.rounds))

    for recipe in ("", *config.recipes):
        ask(recipe)


def ask_optimizer(config: Config, asker: Asker) -> None:
    """Asks for an update of a model's parameters, as ratios to optax's AdamW in float32."""
    shape = Shape(config.layers, config.hidden, config.hidden // 16)
    params = nnx.to_pure_dict(nnx.state(NnxLM(shape, nnx.Rngs(0)), nnx.Param))
    made = optimizers.jax_optimizers()
    make = functools.cache(lambda name: optimizers.alone(name, made[name], params))

    def answer(name: str) -> Callable[[], dict[str, Any]]:
        def found() -> dict[str, Any]:
            own, base = make(name), make(optimizers.EXACT)
            sizes = {"elements": own.elements, "bytes_per_element": own.nbytes / own.elements}
            return race(own, base, "optax", config.rounds) | sizes

        return found

    for name in list(made)[: config.optimizers]:
        asker(name, "measured", answer(name))


def ask_training(config: Config, asker: Asker, recipe: str, state: str) -> None:
    """Asks for a short run, alone in its process: its loss, its rate, and what it holds in memory."""

    def found() -> dict[str, Any]:
        corpus = data.load("sotu")
        step = make_step(config, recipe, state)
        nbytes = throughput.array_bytes(step.state)["all"]
        batches = data.train_batches(corpus, config.sequence, config.batch, 0)
        tokens = config.batch * config.sequence
        meter = throughput.Throughput(tokens, step.flops, list(step.mesh.devices.flat))

        def on_log(steps: int, loss: float) -> None:
            meter.interval(steps, 0.0, 0.0)

        meter.start()
        fitted = step.compiled, step.state, batches, step.schedule, config.steps, step.mesh
        _, history = train.fit(*fitted, log_every=_LOG_EVERY, on_log=on_log)
        memory = jax.devices()[0].memory_stats() or {}
        held = {"state_bytes": nbytes, "peak_bytes": memory.get("peak_bytes_in_use")}
        return {"losses": [history[0][1], history[-1][1]], **meter.medians(), **held}

    asker(f"{config.steps} steps, {recipe or 'bf16'}, state in {state}", "measured", found)
