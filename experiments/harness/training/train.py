"""The training loop: a loss function, an optax transformation, batches, a schedule; nothing else.

It knows nothing of quantization.  What varies between runs of one model (the schedule, bits) is data
of the compiled step, so a sweep compiles once per model.  Where arrays lie is `harness.sharding`'s to say.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from experiments.harness.running.checkpoints import Checkpoints, Restored
from experiments.harness.running.stopping import Preempted
from experiments.harness.training import sharding
from experiments.harness.training.divergence import Diverged, DivergencePolicy

Loss = Callable[..., jax.Array]  # (params, tokens, *data) -> scalar
Apply = Callable[[Any, Any, jax.Array], Any]  # (params, updates, step) -> params
History = list[tuple[int, float]]  # (step, mean loss since the entry before)

STOP = DivergencePolicy()
_NEVER = 2**30


# ---------------------------------------------------------------------------------------------------
# Schedules and the optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning-rate curve as data: linear warm-up, a plateau, and a linear or cosine decay.

    lr(t) = peak · min(1, (t + 1) / warmup) · (floor + (1 − floor) · decay(u)),
    u = clip((t − decay_start) / (decay_end − decay_start), 0, 1), decay(u) = 1 − u or ½(1 + cos πu).
    """

    peak: float
    warmup: int
    decay_start: int
    decay_end: int
    floor: float
    is_cosine: bool

    def __call__(self, step: Any) -> jax.Array:
        warm = jnp.minimum(1.0, (step + 1) / jnp.maximum(self.warmup, 1))
        u = (step - self.decay_start) / jnp.maximum(self.decay_end - self.decay_start, 1)
        u = jnp.clip(u, 0.0, 1.0)
        decay = jnp.where(self.is_cosine, 0.5 * (1 + jnp.cos(jnp.pi * u)), 1 - u)
        return self.peak * warm * (self.floor + (1 - self.floor) * decay)


def cosine(peak: float, steps: int, warmup: int, floor: float = 0.1) -> Schedule:
    """Returns warm-up, then a cosine to floor · peak at `steps`.

    >>> [round(float(cosine(1.0, 110, 10, 0.0)(t)), 3) for t in (0, 9, 60, 110)]
    [0.1, 1.0, 0.5, 0.0]
    """
    return Schedule(peak, warmup, warmup, steps, floor, True)


def stable(peak: float, warmup: int) -> Schedule:
    """Returns warm-up, then constant for as long as wanted: the trunk that WSD branches leave."""
    return Schedule(peak, warmup, _NEVER, _NEVER + 1, 0.0, False)


def cooldown(peak: float, warmup: int, start: int, steps: int) -> Schedule:
    """Returns `stable` until `start`, then linear to zero at `steps`: a warm-up-stable-decay (WSD) run.

    Source: Hu et al. 2024, arXiv 2404.06395; Hägele et al. 2024, arXiv 2405.18392.
    """
    return Schedule(peak, warmup, start, steps, 0.0, False)


def scale_by_schedule_argument() -> optax.GradientTransformationExtraArgs:
    """Scales updates by −learning_rate, which comes with each update: schedules never recompile."""

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, learning_rate: Any, **extra: Any):
        del params, extra
        return jax.tree.map(lambda u: (-learning_rate * u).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


@functools.lru_cache
def adamw(
    b1: float = 0.9,
    b2: float = 0.95,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    moments: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with clipping by global norm; weight decay on matrices only; the schedule comes as data.

    `moments` stands for Adam's own where it is given, as with its state in few bits.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        moments or optax.scale_by_adam(b1, b2),
        optax.add_decayed_weights(weight_decay, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        scale_by_schedule_argument(),
    )


# LSQ's steps learn more slowly than the weights: they are small, and Adam's updates are not.
_STEP_RATE = 0.1


@functools.lru_cache
def adamw_and_steps() -> optax.GradientTransformationExtraArgs:
    """Returns `adamw`, but learned step sizes do not decay and move at a tenth of the weights' rate.

    A step size is a parameter with "step" in its path.
    """

    def is_step(path: Any) -> bool:
        return "step" in jax.tree_util.keystr(path)

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda k, x: x.ndim > 1 and not is_step(k), params)

    def steps(params):
        return jax.tree_util.tree_map_with_path(lambda k, x: is_step(k), params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.9, 0.95),
        optax.add_decayed_weights(0.1, decayed),
        optax.masked(optax.scale(_STEP_RATE), steps),
        scale_by_schedule_argument(),
    )


# ---------------------------------------------------------------------------------------------------
# State and its layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The content of a checkpoint, besides the data's position."""

    step: jax.Array
    params: Any
    opt_state: Any


def init_state(
    make_params: Callable[[], Any], tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns a fresh state, made in place on the mesh: no device ever holds more than its share.

    The numbers do not depend on the mesh.
    """
    return make_init(make_params, tx, mesh)()


def fresh(make_params: Callable[[], Any], tx: optax.GradientTransformation) -> TrainState:
    """Returns a state of no steps."""
    params = make_params()
    return TrainState(jnp.int32(0), params, tx.init(params))


def make_init(
    make_params: Callable[..., Any], tx: optax.GradientTransformation, mesh: Mesh
) -> Callable[..., TrainState]:
    """Returns a compiled `init_state`, (*data) -> state: one compilation serves all seeds that are data."""

    def init(*data):
        state = fresh(lambda: make_params(*data), tx)
        return jax.lax.with_sharding_constraint(state, sharding.of_state(mesh, state))

    return jax.jit(init)


# ---------------------------------------------------------------------------------------------------
# Step and loop


def next_token_loss(graphdef: nnx.GraphDef, mesh: Mesh | None = None) -> Loss:
    """Returns the loss: mean cross-entropy, in nats, of tokens 1 … T; activations are sharded."""
    by_rows = functools.partial(sharding.rows, mesh=mesh)

    def loss(params, tokens_BxT1: jax.Array) -> jax.Array:
        return next_token_loss_of(nnx.merge(graphdef, params), tokens_BxT1, by_rows)

    return loss


def next_token_loss_of(model: Any, tokens_BxT1: jax.Array, by_rows: Callable) -> jax.Array:
    """Returns the same of a model itself.

    Args:
        model: from (tokens, by_rows) to logits.
        tokens_BxT1: one more than the model is given.
        by_rows: where activations lie.
    """
    logits = model(tokens_BxT1[:, :-1], by_rows)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT1[:, 1:]).mean()


def to_nearest(params: Any, updates: Any, step: jax.Array) -> Any:
    """Adds updates as optax does, rounded to nearest where parameters have fewer bits than the sum."""
    del step
    return optax.apply_updates(params, updates)


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    skips: bool = False,
    apply: Apply = to_nearest,
) -> Callable:
    """Returns a compiled (state, tokens, schedule, data, limit) -> (state, loss), which donates the state.

    Args:
        loss: (params, tokens, *data) to a scalar; `data` is traced, so that bits, say, may vary.
        tx: any optax transformation; its update is given `learning_rate` as an extra argument.
        mesh: of `sharding.make_mesh`.
        skips: whether a step whose loss or gradient is not finite, or whose loss is above `limit`, changes
            nothing but its number; its loss is then NaN.
        apply: adds the updates, given the number of the step.
    """
    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, tokens, schedule: Schedule, data: tuple = (), limit: Any = jnp.inf):
        with sharding.use_mesh(mesh):
            value, gradients = jax.value_and_grad(loss)(state.params, tokens, *data)
        # Each device sums its own part of a gradient and no more.
        gradients = jax.lax.with_sharding_constraint(gradients, sharding.of_state(mesh, gradients))
        updates, opt_state = tx.update(
            gradients, state.opt_state, state.params, learning_rate=schedule(state.step)
        )
        params = apply(state.params, updates, state.step)
        new = TrainState(state.step + 1, params, opt_state)
        if skips:
            good = (value <= limit) & jnp.isfinite(optax.tree.norm(gradients))
            old = dataclasses.replace(state, step=new.step)
            new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
            value = jnp.where(good, value, jnp.nan)
        return jax.lax.with_sharding_constraint(new, sharding.of_state(mesh, new)), value

    return jax.jit(step, donate_argnums=0)


def copy_state(state: TrainState) -> TrainState:
    """Returns a copy that outlives the donation of the original."""
    return jax.tree.map(jnp.copy, state)


def saving_interval(checkpoint_every: int, log_every: int) -> int:
    """Steps between checkpoints: a multiple of those between entries of the history.

    >>> saving_interval(50, 20)
    60
    """
    return -(-checkpoint_every // log_every) * log_every


def fit(
    step: Callable,
    state: TrainState,
    batches: Any,
    schedule: Schedule,
    steps: int,
    mesh: Mesh,
    *,
    history: History | None = None,
    checkpoints: Checkpoints | None = None,
    log_every: int = 20,
    log_at: Collection[int] = (),
    checkpoint_every: int = 500,
    on_log: Callable[[int, float], None] = lambda steps, loss: None,
    data: tuple = (),
    guard: DivergencePolicy = STOP,
    preemption_requested: Callable[[int], bool] = lambda step: False,
) -> tuple[TrainState, History]:
    """Trains to step `steps`, going on from the newest usable checkpoint.

    Args:
        step: from `make_step`.
        state: where to start where there is no checkpoint; donated.
        batches: an iterator with `get_state` and `set_state`, at the state's position.
        schedule: of the learning rate.
        steps: the step to stop at; a run that is there already returns at once.
        mesh: of the state.
        history: entries so far.
        checkpoints: where to save; None saves nothing.
        log_every: steps between entries of the history and looks at the loss.
        log_at: further steps that have an entry, as `steps` has: where the run may have ended before.
        checkpoint_every: steps between checkpoints, rounded up to a multiple of `log_every`; at least so many
            where `checkpoints` are spaced in time.
        on_log: called with (steps done since the last call, mean loss) for progress.
        data: further arguments of the loss.
        guard: what to do about spikes and losses that are not finite; "skip" needs a step with `skips`.
        preemption_requested: called with each step; True saves and ends the run (see `stopping`).

    Returns:
        The state at `steps` and the history, (step, mean loss since the entry before).

    Raises:
        Diverged: a loss that is not finite, or a spike, which the guard could not get by.
        Preempted: it was told to stop, and has saved.
    """
    history, losses = list(history or []), list[Any]()
    start = int(state.step)
    restored = checkpoints.restore(state, batches, steps) if checkpoints else None
    if restored is not None and int(restored.state.step) > start:
        state, history, losses = restored
        on_log(int(state.step) - start, history[-1][1] if history else math.nan)
    checkpoint_every = saving_interval(checkpoint_every, log_every)
    schedule = jax.tree.map(jnp.asarray, schedule)
    at = logged = saved = int(state.step)
    rollbacks = 0
    while at < steps:
        batch = sharding.place(mesh, next(batches))
        state, loss = step(state, batch, schedule, data, guard.limit(history))
        losses.append(loss)
        at += 1
        if at % log_every == 0 or at == steps or at in log_at:
            try:
                mean = _mean_loss(losses, at, guard, history)
            except Diverged as error:
                rollbacks += 1
                back = _roll_back(guard, rollbacks, checkpoints, state, batches, at)
                if back is None:
                    raise Diverged(
                        error.step, error.loss, _rollback_message(guard, rollbacks)
                    ) from None
                state, history, losses = back
                at = int(state.step)
                on_log(at - logged, history[-1][1] if history else math.nan)
                logged = at
                continue
            on_log(at - logged, mean)
            history.append((at, mean))
            losses, logged = [], at
        stops = preemption_requested(at) and at < steps
        if checkpoints is not None and (
            stops or (logged == at and checkpoints.is_due(at, saved, checkpoint_every, at == steps))
        ):
            checkpoints.save(at, state, batches, history, jax.device_get(losses))
            saved, rollbacks = at, 0
        if stops:
            raise Preempted(at)
    return state, history


def _mean_loss(losses: Sequence[Any], at: int, guard: DivergencePolicy, history: History) -> float:
    """Returns the mean over the steps that were not skipped.

    Raises:
        Diverged: there is none, or it is a spike.
    """
    values = np.array(jax.device_get(losses), np.float64)
    finite = np.isfinite(values)
    if not (finite.any() if guard.action == "skip" else finite.all()):
        first = int(np.argmin(finite))
        raise Diverged(at - len(values) + first + 1, float(values[first]))
    mean = float(values[finite].mean())
    if mean > guard.limit(history):
        raise Diverged(at, mean)
    return mean


def _roll_back(
    guard: DivergencePolicy,
    rollbacks: int,
    checkpoints: Checkpoints | None,
    state: TrainState,
    batches: Any,
    at: int,
) -> Restored | None:
    """Returns the checkpoint to continue from with the data that follows, or None."""
    if guard.action != "roll_back" or checkpoints is None or rollbacks > guard.most:
        return None
    return checkpoints.roll_back(state, batches, at - guard.steps)


def _rollback_message(guard: DivergencePolicy, rollbacks: int) -> str:
    """Returns why rolling back did not help, as text."""
    if guard.action != "roll_back":
        return ""
    if rollbacks > guard.most:
        return f", after going back {guard.most} times"
    return ", with no checkpoint to go back to"
