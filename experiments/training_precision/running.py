"""One trial: a model trained at one precision to several lengths, and served at several widths."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from experiments.harness import data
from experiments.harness.models import lm
from experiments.harness.running import trials
from experiments.harness.training import sharding, train, wsd
from experiments.training_precision.numerics import Numerics, Precision

COOLDOWN = 0.1  # the share of a run in which the learning rate falls
FEWEST_STEPS = 10
_TOKENS_TOGETHER = 8192  # evaluated at once: bounds the logits' memory at any vocabulary


@dataclasses.dataclass(frozen=True)
class Trial:
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

    def steps(self, tokens_per_parameter: int) -> int:
        """Training steps that come nearest to D = tokens_per_parameter · N tokens."""
        tokens = tokens_per_parameter * lm.SIZES[self.size].non_embedding_parameters
        return max(FEWEST_STEPS, round(tokens / (self.batch * self.sequence)))

    def cooldown_start(self, tokens_per_parameter: int) -> int:
        """Where a branch leaves the trunk."""
        steps = self.steps(tokens_per_parameter)
        return steps - max(1, round(COOLDOWN * steps))

    @property
    def precision(self) -> Precision:
        return Precision.of(self.weights, self.activations, self.cache)


def step_cost(trial: Trial) -> float:
    """Weights × tokens of a training step."""
    return lm.SIZES[trial.size].step_cost * trial.batch * trial.sequence


def cost(trial: Trial) -> float:
    """Weights × tokens of a trial: what its progress adds up to."""
    ends = [trial.steps(d) for d in trial.tokens_per_parameter]
    starts = [trial.cooldown_start(d) for d in trial.tokens_per_parameter]
    steps = starts[-1] + sum(end - start for end, start in zip(ends, starts, strict=True))
    return steps * step_cost(trial)


def compile_key(trial: Trial) -> tuple:
    """Return a key that is equal for trials that run the same compiled programs."""
    return trial.size, trial.method


@functools.lru_cache(maxsize=2)
def corpus_of(source: str, path: str, fingerprint: str) -> data.Corpus:
    """A trial's data, which must still be what it was when the trial was made."""
    corpus = data.load(source, path)
    if corpus.fingerprint != fingerprint:
        raise RuntimeError(f"the data at {path or source!r} changed while the study was running")
    return corpus


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
        together = max(1, _TOKENS_TOGETHER // tokens_WxT1.shape[1])

        # Activations share a scale within a window, so that windows do not depend on each other.
        def mean_loss(tokens_T1: jax.Array) -> jax.Array:
            return numerics.losses(params, tokens_T1[None], precision, serving).mean()

        return jax.lax.map(mean_loss, tokens_WxT1, batch_size=together)

    return Programs(
        init=train.make_init(numerics.init, train.adamw_and_steps(), mesh),
        step=train.make_step(numerics.loss, train.adamw_and_steps(), mesh),
        evaluate=evaluate,
        mesh=mesh,
    )


def run_trial(trial: Trial, context: trials.Context) -> dict:
    """Trains, measures each length, and returns the record's results."""
    corpus = corpus_of(trial.data, trial.data_path, trial.data_fingerprint)
    head = {"versions": _versions(), "entropy_rate": corpus.entropy_rate}
    training = _Run(trial, context, corpus)
    try:
        points = [
            context.cached(f"after-{d}", functools.partial(training.point, d))
            for d in trial.tokens_per_parameter
        ]
    except train.Diverged as error:
        return head | {"status": "diverged", "step": error.step, "points": []}
    return head | {"status": "done", "points": points}


def _versions() -> dict[str, str]:
    return {
        "jaxquant": jq.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


class _Run:
    """A trial under way: the model's state, the data's position, and where they are saved."""

    def __init__(self, trial: Trial, context: trials.Context, corpus: data.Corpus):
        self.trial, self.context, self.corpus = trial, context, corpus
        self._programs = programs(trial.size, trial.method, trial.dtype, corpus.vocab_size)
        batches = data.train_batches(corpus, trial.sequence, trial.batch, trial.seed)
        position = batches.get_state()
        first = jnp.asarray(next(batches))
        batches.set_state(position)
        self._trunk = wsd.Trunk(
            self._programs.step,
            self._programs.init(jax.random.key(trial.seed), trial.precision, first),
            batches,
            self._programs.mesh,
            self._checkpoints,
            [trial.cooldown_start(d) for d in trial.tokens_per_parameter],
            {
                "log_every": trial.log_every,
                "checkpoint_every": trial.checkpoint_every,
                "on_log": self._say,
                "data": (trial.precision,),
            },
        )

    def _say(self, steps: int, loss: float) -> None:
        trial = self.trial
        bits = f"{trial.weights}/{trial.activations}/{trial.cache}"
        note = f"{trial.size} {trial.method} {bits}: loss {loss:.3f}"
        self.context.progress(steps * step_cost(trial), note)

    def _checkpoints(self, folder: str):
        """A run that is short is sooner done again than saved."""
        if self.trial.steps(self.trial.tokens_per_parameter[-1]) <= self.trial.checkpoint_every:
            return contextlib.nullcontext()
        return self.context.checkpoints(folder)

    def point(self, tokens_per_parameter: int) -> dict:
        """Trains to a length and measures there; the trunk stays where the branch left it."""
        trial, steps = self.trial, self.trial.steps(tokens_per_parameter)
        warmup = max(1, trial.steps(trial.tokens_per_parameter[0]) // 10)
        start = trial.cooldown_start(tokens_per_parameter)
        self._trunk.grow(train.stable(trial.peak_lr, warmup), start)
        plan = train.cooldown(trial.peak_lr, warmup, start, steps)
        end, curve = self._trunk.branch(plan, steps, f"branch-{tokens_per_parameter}")
        tokens = steps * trial.batch * trial.sequence
        return {
            "tokens_per_parameter": tokens_per_parameter,
            "tokens": tokens,
            "epochs": self.corpus.epochs(tokens),
            "train_loss": curve[-1][1],
            **self._measure(end.params),
        }

    def _measure(self, params) -> dict:
        """The loss on held-out windows, and what serving the weights at other widths adds to it."""
        trial = self.trial
        windows = data.evaluation_windows(
            self.corpus, "valid", trial.sequence, trial.evaluation_windows
        )

        def losses(bits: int) -> np.ndarray:
            found = self._programs.evaluate(params, trial.precision, jnp.float32(bits), windows)
            return np.asarray(found, np.float64)

        reference = losses(trial.weights)
        served = [{"bits": b} | mean_and_error(losses(b) - reference) for b in trial.serving]
        return {"windows": len(windows), "loss": mean_and_error(reference), "served": served}


def mean_and_error(values: np.ndarray) -> dict:
    """The mean with its standard error over windows; None where a broken model gives no number."""
    if not np.isfinite(values).all():
        return {"mean": None, "se": None}
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(values.mean()), "se": error}
