"""One trial: a model trained at one precision to several lengths, and served at several widths."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data, lengths
from experiments.harness.models import lm
from experiments.harness.reporting.statistics import mean_and_error
from experiments.harness.running import trials
from experiments.harness.training import sharding, train
from experiments.training_precision.numerics import Numerics, Precision


@dataclasses.dataclass(frozen=True)
class Trial(lengths.Trial):
    """One trunk of constant rate with a cooled-down branch at each length.

    Attributes:
        size: of `models.SIZES`.
        method: of `numerics.METHODS`.
        weights, activations, cache: bits of training.
        serving: bits at which the trained weights are served.
        tokens_per_parameter: D/N of the branches, in rising order.
    """

    size: str
    method: str
    weights: int
    activations: int
    cache: int
    serving: tuple[int, ...]
    tokens_per_parameter: tuple[int, ...]
    seed: int
    evaluation_windows: int
    data: str
    data_path: str
    data_fingerprint: str
    sequence: int
    batch: int
    peak_lr: float
    dtype: str
    log_every: int
    checkpoint_every: int

    @property
    def precision(self) -> Precision:
        return Precision.of(self.weights, self.activations, self.cache)


def compile_key(trial: Trial) -> tuple:
    """Return a key that is equal for trials that run the same compiled programs."""
    return trial.size, trial.method


@dataclasses.dataclass(frozen=True)
class Programs:
    """What is compiled once for a size and a method, whatever the bits and the seed.

    Attributes:
        init: (key, precision, tokens) -> state.
        step: of `train.make_step`.
        evaluate: (params, precision, serving bits, tokens) -> mean loss of each window.
        mesh: of the state.
    """

    init: Any
    step: Any
    evaluate: Any
    mesh: jax.sharding.Mesh


@functools.lru_cache
def programs(size: str, method: str, dtype: str, vocab_size: int) -> Programs:
    """The programs of a size and a method."""
    numerics = Numerics(lm.sized(size, dtype=dtype, vocab_size=vocab_size), method)
    mesh = sharding.make_mesh()

    @jax.jit
    def evaluate(params, precision: Precision, serving: jax.Array, tokens_WxT1: jax.Array):
        # Activations share a scale within a window, so that windows do not depend on each other.
        def mean_loss(tokens_T1: jax.Array) -> jax.Array:
            return numerics.losses(params, tokens_T1[None], precision, serving).mean()

        return lengths.each_window(mean_loss, tokens_WxT1)

    return Programs(
        init=train.make_init(numerics.init, train.adamw_and_steps(), mesh),
        step=train.make_step(numerics.loss, train.adamw_and_steps(), mesh),
        evaluate=evaluate,
        mesh=mesh,
    )


def run_trial(trial: Trial, context: trials.Context) -> dict:
    """Trains, measures each length, and returns the record's results."""
    corpus = lengths.load(trial.data, trial.data_path, trial.data_fingerprint)
    own = programs(trial.size, trial.method, trial.dtype, corpus.vocab_size)
    batches = data.train_batches(corpus, trial.sequence, trial.batch, trial.seed)
    position = batches.get_state()
    first = jnp.asarray(next(batches))
    batches.set_state(position)
    bits = f"{trial.weights}/{trial.activations}/{trial.cache}"
    trunk = lengths.make_trunk(
        trial,
        context,
        own.step,
        own.init(jax.random.key(trial.seed), trial.precision, first),
        batches,
        own.mesh,
        label=f"{trial.size} {trial.method} {bits}: ",
        saves_short_runs=False,
        data=(trial.precision,),
    )

    def measured(params: Any, history: train.History) -> dict:
        return {"train_loss": history[-1][1], **_measure(trial, own, params, corpus)}

    return lengths.run(trial, context, corpus, trunk, measured)


def _measure(trial: Trial, own: Programs, params: Any, corpus: data.Corpus) -> dict:
    """The loss on held-out windows, and what serving the weights at other widths adds to it."""
    windows = data.evaluation_windows(corpus, "valid", trial.sequence, trial.evaluation_windows)

    def losses(bits: int) -> np.ndarray:
        found = own.evaluate(params, trial.precision, jnp.float32(bits), windows)
        return np.asarray(found, np.float64)

    reference = losses(trial.weights)
    served = [{"bits": b} | mean_and_error(losses(b) - reference) for b in trial.serving]
    return {"windows": len(windows), "loss": mean_and_error(reference), "served": served}
