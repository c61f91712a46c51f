"""One trial: a model trained by an arm to several lengths, and the error of its gradient at each."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.gradient_precision.arms import Arm, Precision
from experiments.gradient_precision.measuring import Programs, gradient_error, programs
from experiments.harness import data, lengths
from experiments.harness.models import lm
from experiments.harness.reporting.statistics import mean_and_error
from experiments.harness.running import trials
from experiments.harness.training import train


@dataclasses.dataclass(frozen=True)
class Trial(lengths.Trial):
    """One trunk of constant rate with a cooled-down branch at each length.

    Attributes:
        size: of `lm.SIZES`.
        method, part, rounding, block, hadamard: of `arms.Arm`.
        forward, backward: bits; of a recipe, those of its operands.
        tokens_per_parameter: D/N of the branches, in rising order.
        draws: of the gradient's rounding at each length.
        scan: whether one program is for all blocks.
    """

    size: str
    method: str
    part: str
    rounding: str
    block: int
    hadamard: int
    forward: int
    backward: int
    tokens_per_parameter: tuple[int, ...]
    draws: int
    seed: int
    evaluation_windows: int
    data: str
    data_path: str
    data_fingerprint: str
    sequence: int
    batch: int
    peak_lr: float
    dtype: str
    scan: bool
    log_every: int
    checkpoint_every: int

    @property
    def shape(self) -> lm.LMConfig:
        """The model's, but for its vocabulary."""
        return lm.sized(self.size, dtype=self.dtype, scan=self.scan)

    @property
    def arm(self) -> Arm:
        return Arm(self.method, self.part, self.rounding, self.block, self.hadamard)

    @property
    def precision(self) -> Precision:
        return Precision.of(self.forward, self.backward)


def compile_key(trial: Trial) -> tuple:
    """Return a key that is equal for trials that run the same compiled programs."""
    return trial.size, trial.arm


def run_trial(trial: Trial, context: trials.Context) -> dict:
    """Trains, measures each length, and returns the record's results."""
    corpus = lengths.load(trial.data, trial.data_path, trial.data_fingerprint)
    shape = dataclasses.replace(trial.shape, vocab_size=corpus.vocab_size)
    own = programs(shape, trial.arm, trial.draws)
    trunk = lengths.make_trunk(
        trial,
        context,
        own.step,
        own.init(jax.random.key(trial.seed)),
        data.train_batches(corpus, trial.sequence, trial.batch, trial.seed),
        own.mesh,
        label=f"{trial.size} {trial.arm.name} {trial.forward}/{trial.backward}: ",
        saves_short_runs=False,
        data=(trial.precision,),
    )
    windows = data.evaluation_windows(corpus, "valid", trial.sequence, trial.evaluation_windows)

    def measured(params: Any, history: train.History) -> dict:
        return {"train_loss": history[-1][1], **_measure(trial, own, params, windows)}

    found = lengths.run(trial, context, corpus, trunk, measured)
    return found | {"unigram_entropy": unigram_entropy(windows)}


def _measure(trial: Trial, own: Programs, params: Any, windows: np.ndarray) -> dict:
    """The loss on held-out windows, and the error of the gradient on the first of them."""
    losses = np.asarray(own.evaluate(params, trial.precision, windows), np.float64)
    batch = jnp.asarray(windows[: trial.batch])
    sums = jax.device_get(own.gradient(params, trial.precision, batch))
    is_finite = all(math.isfinite(float(value)) for value in sums.values())
    return {
        "windows": len(windows),
        "loss": mean_and_error(losses),
        "gradient": gradient_error(sums, trial.draws) if is_finite else None,
        "traces": dict(own.traces),
    }


def unigram_entropy(windows: np.ndarray) -> float:
    """The entropy of tokens by how often each occurs, in nats: what a model of no context reaches.

    >>> round(unigram_entropy(np.array([[0, 1], [1, 0]])), 4)
    0.6931
    """
    counts = np.bincount(np.asarray(windows).ravel())
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
