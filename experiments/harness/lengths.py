"""Studies of language models that are trained to several lengths: the trial, its grid and its run.

A trial is one trunk of constant rate with a cooled-down branch at each length (WSD), or one cosine.  A study
adds the model, the step, and what it measures at each length.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from experiments.harness import data
from experiments.harness.models import lm
from experiments.harness.running import cli, machine, trials
from experiments.harness.training import train, wsd
from jaxquant import checks

COOLDOWN = 0.1  # the share of a WSD run in which the learning rate falls
FEWEST_STEPS = 10
_LENGTH_TOLERANCE = 0.05  # how far whole batches may take D/N from its label
_TOKENS_TOGETHER = 8192  # evaluated at once: bounds the logits' memory at any vocabulary


class Trial:
    """What such trials have in common; a study's own is a dataclass that has these fields.

    Attributes:
        size: of `lm.SIZES`.
        tokens_per_parameter: D/N of the branches, in rising order.
        has_trunk: whether the lengths are branches of a trunk; else there is one length, of a cosine.
    """

    size: str
    tokens_per_parameter: tuple[int, ...]
    seed: int
    data: str
    data_path: str
    data_fingerprint: str
    sequence: int
    batch: int
    peak_lr: float
    log_every: int
    checkpoint_every: int

    @property
    def has_trunk(self) -> bool:
        return True

    def steps(self, tokens_per_parameter: int) -> int:
        """Training steps that come nearest to D = tokens_per_parameter · N tokens."""
        tokens = tokens_per_parameter * lm.SIZES[self.size].non_embedding_parameters
        return max(FEWEST_STEPS, round(tokens / (self.batch * self.sequence)))

    def cooldown_start(self, tokens_per_parameter: int) -> int:
        """Where a branch leaves the trunk."""
        steps = self.steps(tokens_per_parameter)
        return steps - max(1, round(COOLDOWN * steps))


def step_cost(trial: Trial) -> float:
    """Weights × tokens of a training step."""
    return lm.SIZES[trial.size].step_cost * trial.batch * trial.sequence


def cost(trial: Trial) -> float:
    """Weights × tokens of a trial: what its progress adds up to."""
    ends = [trial.steps(d) for d in trial.tokens_per_parameter]
    starts = [trial.cooldown_start(d) for d in trial.tokens_per_parameter]
    steps = starts[-1] + sum(end - start for end, start in zip(ends, starts, strict=True))
    return steps * step_cost(trial)


# ---------------------------------------------------------------------------------------------------
# The grid


def shared_fields(config: Any, trial: type) -> dict[str, Any]:
    """What a config and its trials have in common, by name."""
    names = {field.name for field in dataclasses.fields(trial)}
    return {name: value for name, value in vars(config).items() if name in names}


def lengths_by_size(config: Any) -> dict[str, tuple[int, ...]]:
    """The lengths D/N of each size."""
    limits = config.max_tokens_per_parameter or [config.tokens_per_parameter[-1]] * len(
        config.sizes
    )
    return {
        size: tuple(d for d in config.tokens_per_parameter if d <= most)
        for size, most in zip(config.sizes, limits, strict=True)
    }


def rates_by_size(config: Any) -> dict[str, tuple[float, ...]]:
    """The highest learning rates of each size: `peak_lrs`, or its own of `size_lrs`, or `peak_lr`."""
    if config.size_lrs:
        own = map(_rates, config.size_lrs)
        return dict(zip(config.sizes, own, strict=True))
    return dict.fromkeys(config.sizes, config.peak_lrs or (config.peak_lr,))


def _rates(own: float | tuple[float, ...]) -> tuple[float, ...]:
    """A size's entry of `size_lrs`."""
    return tuple(own) if isinstance(own, tuple | list) else (own,)


def check(config: Any) -> None:
    """Raises a ValueError unless sizes, lengths and the numbers that all such studies have are usable."""
    cli.check_each_once(config, "sizes", "tokens_per_parameter")
    cli.check_positive(config, "seeds", "evaluation_windows", "sequence", "batch", "peak_lr")
    cli.check_positive(config, "log_every", "checkpoint_every")
    cli.check_whole(config, "tokens_per_parameter", "max_tokens_per_parameter")
    _check_rates(config)
    lengths, limits = config.tokens_per_parameter, config.max_tokens_per_parameter
    if list(lengths) != sorted(lengths):
        raise ValueError(f"config.tokens_per_parameter is in rising order; got {lengths}")
    if limits and len(limits) != len(config.sizes):
        raise ValueError(
            f"config.max_tokens_per_parameter needs one number for each of config.sizes; got {limits}"
        )
    if any(most < lengths[0] for most in limits):
        raise ValueError(
            f"config.max_tokens_per_parameter {limits} leaves some size without any length"
        )


def _check_rates(config: Any) -> None:
    cli.check_each_once(config, "peak_lrs", may_be_empty=True)
    for name in ("peak_lrs", "size_lrs"):
        for rate in itertools.chain(*map(_rates, getattr(config, name))):
            checks.check_positive(f"each of config.{name}", rate)
    for own in map(_rates, config.size_lrs):
        if not own or len(set(own)) != len(own):
            raise ValueError(
                f"config.size_lrs has at least one rate of each size, each once; got {own}"
            )
    if config.peak_lrs and config.size_lrs:
        raise ValueError(
            f"config.peak_lrs are for all sizes, config.size_lrs for one each: give one of them; got "
            f"{config.peak_lrs} and {config.size_lrs}"
        )
    if config.size_lrs and len(config.size_lrs) != len(config.sizes):
        raise ValueError(
            f"config.size_lrs needs one number, or numbers, for each of config.sizes {config.sizes}; got "
            f"{config.size_lrs}"
        )


def check_lengths(trial: Trial) -> None:
    """Raises a ValueError where whole batches cannot come near a length: its label would be untrue."""
    n = lm.SIZES[trial.size].non_embedding_parameters
    for d in trial.tokens_per_parameter:
        actual = trial.steps(d) * trial.batch * trial.sequence / n
        if abs(actual / d - 1) > _LENGTH_TOLERANCE:
            raise ValueError(
                f"config.tokens_per_parameter {d} at N = {trial.size} would come out as {actual:.1f} in "
                f"batches of {trial.batch} × {trial.sequence} tokens (at least {FEWEST_STEPS} steps); "
                "choose longer runs or smaller batches"
            )


# ---------------------------------------------------------------------------------------------------
# The run


@functools.lru_cache(maxsize=2)
def load(source: str, path: str, fingerprint: str, shift_path: str = "") -> data.Corpus:
    """A trial's data, which must still be what it was when the trial was made."""
    return data.unchanged(data.load(source, path, shift_path), fingerprint, path or source)


def make_trunk(
    trial: Trial,
    context: trials.Context,
    step: Callable,
    state: train.TrainState,
    batches: Any,
    mesh: Mesh,
    *,
    label: str = "",
    saves_short_runs: bool = True,
    data: tuple = (),
) -> wsd.Trunk:
    """A trial's trunk, of no steps.

    Args:
        trial: what to train.
        context: where its branches are saved, and who is told how it goes.
        step: of `train.make_step`.
        state: of the model, of no steps.
        batches: at their beginning.
        mesh: of the state.
        label: what progress is told before the loss.
        saves_short_runs: False where a run below `checkpoint_every` steps is sooner done again than saved.
        data: further arguments of the loss.
    """

    def on_log(steps: int, loss: float) -> None:
        context.progress(steps * step_cost(trial), f"{label}loss {loss:.3f}")

    is_saved = saves_short_runs or (
        trial.steps(trial.tokens_per_parameter[-1]) > trial.checkpoint_every
    )
    return wsd.Trunk(
        step,
        state,
        batches,
        mesh,
        context.checkpoints if is_saved else lambda name: contextlib.nullcontext(),
        [trial.cooldown_start(d) for d in trial.tokens_per_parameter],
        {
            "log_every": trial.log_every,
            "checkpoint_every": trial.checkpoint_every,
            "on_log": on_log,
            "data": data,
        },
    )


def run(
    trial: Trial,
    context: trials.Context,
    corpus: data.Corpus,
    trunk: wsd.Trunk,
    measure: Callable[[Any, train.History], dict],
) -> dict:
    """Trains to each length, measures there, and returns the record's results.

    Args:
        trial: what to train.
        context: what remembers the lengths that are done.
        corpus: of `load`.
        trunk: of `make_trunk`.
        measure: from parameters and the history that led to them to what is recorded of a length.
    """
    head = {"versions": machine.versions(), "entropy_rate": corpus.entropy_rate}

    def point(tokens_per_parameter: int) -> dict:
        end, history = _train_to(trial, trunk, tokens_per_parameter)
        tokens = trial.steps(tokens_per_parameter) * trial.batch * trial.sequence
        return {
            "tokens_per_parameter": tokens_per_parameter,
            "tokens": tokens,
            "epochs": corpus.epochs(tokens),
            **measure(end.params, history),
        }

    try:
        points = [
            context.cached(f"after-{d}", functools.partial(point, d))
            for d in trial.tokens_per_parameter
        ]
    except train.Diverged as error:
        return head | {"status": "diverged", "step": error.step, "points": []}
    return head | {"status": "done", "points": points}


def _train_to(
    trial: Trial, trunk: wsd.Trunk, tokens_per_parameter: int
) -> tuple[train.TrainState, train.History]:
    """Trains to a length; the trunk stays where the branch left it."""
    steps = trial.steps(tokens_per_parameter)
    if trial.has_trunk:
        warmup = max(1, trial.steps(trial.tokens_per_parameter[0]) // 10)
        start = trial.cooldown_start(tokens_per_parameter)
        trunk.grow(train.stable(trial.peak_lr, warmup), start)
        plan = train.cooldown(trial.peak_lr, warmup, start, steps)
    else:
        plan = train.cosine(trial.peak_lr, steps, max(1, steps // 10))
    return trunk.branch(plan, steps, f"branch-{tokens_per_parameter}")


def each_window(loss: Callable[[jax.Array], jax.Array], tokens_WxT1: jax.Array) -> jax.Array:
    """A loss of each window, of a bounded number of tokens at once."""
    together = max(1, _TOKENS_TOGETHER // tokens_WxT1.shape[1])
    return jax.lax.map(loss, tokens_WxT1, batch_size=together)
