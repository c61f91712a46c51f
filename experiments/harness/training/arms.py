"""The arms: one AdamW each, which differ in how its two moments are held and in nothing else."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.harness.peers import optimizers
from experiments.harness.training import coarse, train
from jaxquant.optim import (
    LayerStatistics,
    QuantizedState,
    UpdateSensitivity,
    adaptive,
    fixed,
    in_float32,
    quantize_state,
    split,
    stochastic_apply,
    uniform,
)
from jaxquant.optim import state_bytes as jaxquant_state_bytes

EXACT = "fp32"
B1, B2, EPS = 0.9, 0.95, 1e-8
_PEERS = {
    "torchao-4bit": optimizers.torchao(4),
    "torchao-8bit": optimizers.torchao(8),
    "bitsandbytes-8bit": optimizers.bitsandbytes(),
}
_BITS = r"(\d+(?:\.\d+)?)"
_ONCE = 0.1  # the share of a run in which the widths of `felt-once` move
_LASTING = UpdateSensitivity(persistence=True)
_RANKED = LayerStatistics(factors=("dispersion", "kurtosis"), within_slots=True)
# Arms with a budget: (bits, interval, steps of the run) to a policy.
_BUDGETS: dict[str, Callable[[float, int, int], Any]] = {
    "even": lambda bits, interval, steps: uniform(bits),
    # Momentum has so many bits more than the second moment.
    "split1": lambda bits, interval, steps: split(bits, 1),
    "split2": lambda bits, interval, steps: split(bits, 2),
    "split3": lambda bits, interval, steps: split(bits, 3),
    # Embedding and head have a bit more than the matrices.
    "role": lambda bits, interval, steps: split(bits, 1, roles={"embedding": 1, "head": 1}),
    "felt": lambda bits, interval, steps: adaptive(bits, interval, UpdateSensitivity()),
    "felt-loss": lambda bits, interval, steps: adaptive(bits, interval, UpdateSensitivity("loss")),
    "felt-once": lambda bits, interval, steps: adaptive(
        bits, interval, UpdateSensitivity(), until=max(1, round(_ONCE * steps))
    ),
    "felt-lasting": lambda bits, interval, steps: adaptive(bits, interval, _LASTING),
    "statistics": lambda bits, interval, steps: adaptive(bits, interval, LayerStatistics()),
    "ranked": lambda bits, interval, steps: adaptive(bits, interval, _RANKED),
    # Its widths are decided once, by scores that are set before the first step.
    "hindsight": lambda bits, interval, steps: adaptive(bits, _NEVER, GivenScores(), 0.0),
}
STATIC = ("even", "split1", "split2", "split3", "role")
HINDSIGHT = "hindsight"
_NEVER = 10**9
_COARSE = rf"({'|'.join(coarse.SCALES)}|linear):({'|'.join(coarse.ALLOCATIONS)})"


@dataclasses.dataclass(frozen=True)
class GivenScores:
    """A score that is whatever the policy's memory holds: the scores of all pages, set from outside."""

    max_bit_change: int = 8

    def init(self, plan: Any) -> Any:
        return UpdateSensitivity().init(plan)[0]

    def __call__(self, traced: Any, state: Any, memory: Any, seed: int) -> tuple[Any, Any, Any]:
        del traced, state, seed
        return memory, memory, jnp.bool_(True)


def scores_of(state: QuantizedState) -> list[list[Any]]:
    """The scores that a sensitivity has averaged, by group and slot."""
    return state.memory[1][0]


def with_scores(state: QuantizedState, scores: Any) -> QuantizedState:
    """A first state of `GivenScores` with these scores."""
    like = jax.tree.map(lambda x, y: jnp.asarray(y, x.dtype), state.memory[1], scores)
    return state._replace(memory=(state.memory[0], like))


def first_pass(arm: str) -> str:
    """The arm whose scores the hindsight of a budget takes.

    >>> first_pass("hindsight-2.6")
    'felt-2.6'
    """
    return arm.replace(HINDSIGHT, "felt")


# What the weights are held in, as in "bf16:even-5.0": bfloat16 without a copy in float32, whose updates are
# rounded stochastically or to nearest.
STOCHASTIC, NEAREST = "bf16", "bf16-nearest"


def weights_of(arm: str) -> tuple[str, str]:
    """Returns what holds an arm's weights, "" for float32, and the arm of its state.

    >>> weights_of("bf16:even-5.0"), weights_of("row:even-3.0")
    (('bf16', 'even-5.0'), ('', 'row:even-3.0'))
    """
    kind, _, state = arm.partition(":")
    return (kind, state) if kind in (STOCHASTIC, NEAREST) else ("", arm)


def weights_dtype(arm: str) -> Any:
    """Returns the type of an arm's weights."""
    return jnp.bfloat16 if weights_of(arm)[0] else jnp.float32


def apply_of(arm: str) -> train.Apply:
    """Returns what adds an arm's updates to its weights."""
    return stochastic_apply if weights_of(arm)[0] == STOCHASTIC else train.to_nearest


KNOWN = (
    f"{EXACT}, fixed-B or fixed-B-B, {', '.join(_PEERS)}, {', '.join(f'{k}-B' for k in _BUDGETS)}, or "
    f"simulated with other scales S:A-B, S of {', '.join(coarse.SCALES)}, linear and A of "
    f"{', '.join(coarse.ALLOCATIONS)}"
)


def budget_of(arm: str) -> tuple[str, float] | None:
    """Returns an arm's allocation and its budget in bits; None for an arm without a budget.

    >>> budget_of("felt-loss-4.5"), budget_of("fixed-8"), budget_of("row:even-3.0")
    (('felt-loss', 4.5), None, ('row:even', 3.0))
    """
    for kind in (*_BUDGETS, _COARSE):
        if match := re.fullmatch(f"(?P<kind>{kind})-(?P<bits>{_BITS})", arm):
            return match["kind"], float(match["bits"])
    return None


def fixed_bits(arm: str) -> int | None:
    """Returns the bits of both moments of an arm where they are one and stay.

    >>> fixed_bits("fixed-8"), fixed_bits("fixed-5-4"), fixed_bits("felt-5.0")
    (8, None, None)
    """
    match = re.fullmatch(r"fixed-(\d)", arm)
    return int(match[1]) if match else None


def moments(arm: str, interval: int, steps: int = 0, **layout: Any) -> Any:
    """Returns the transformation that has the arm's state: Adam's, without decay, rate or clipping.

    Args:
        arm: its name.
        interval: steps between decisions of adaptive arms.
        steps: of the whole run; `felt-once` needs them.
        layout: of state in pages, `quantize_state`'s shards, mesh and axis.

    Raises:
        ValueError: an unknown name.
    """
    adam = optax.scale_by_adam(B1, B2, EPS)
    if arm == EXACT:
        return adam
    if arm in _PEERS:
        return optimizers.scale_by_coded_adam(_PEERS[arm], B1, B2, EPS)
    if match := re.fullmatch(r"fixed-(\d)(?:-(\d))?", arm):
        second = int(match[2]) if match[2] else None
        return quantize_state(adam, fixed(int(match[1]), second), **layout)
    if found := budget_of(arm):
        kind, bits = found
        if kind == "felt-once" and steps < 1:
            raise ValueError(f"{arm!r} needs the steps of the run; got {steps!r}")
        if ":" in kind:
            return coarse.scale_by_coarse_adam(_coarse(arm, interval), B1, B2, EPS)
        return quantize_state(adam, _BUDGETS[kind](bits, interval, steps), **layout)
    raise ValueError(f"a state is one of {KNOWN}, with B bits; got {arm!r}")


def _coarse(arm: str, interval: int) -> coarse.Coarse:
    """How a simulated arm holds its moments; `linear` is a tensor's scale and uniform levels of momentum."""
    kind, bits = budget_of(arm) or ("", 0.0)
    scale, allocation = kind.split(":")
    is_linear = scale == "linear"
    return coarse.Coarse("tensor" if is_linear else scale, allocation, bits, interval, is_linear)


def state_bytes(arm: str, opt_state: Any) -> int:
    """Bytes of the moments' state: of all its arrays; derived for arms that are simulated."""
    own = state_of(opt_state)
    if isinstance(own, coarse.CoarseState):
        return round(coarse.derived_bytes(_coarse(weights_of(arm)[1], 1), own.mu, own.bits))
    return jaxquant_state_bytes(own)


def optimizer(arm: str, interval: int, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with the arm's state, in float32 whatever holds the weights."""
    weights, state = weights_of(arm)
    tx = train.adamw(B1, B2, moments=moments(state, interval, steps))
    return in_float32(tx) if weights else tx


def state_of(opt_state: Any) -> Any:
    """Returns the moments' state within `optimizer`'s."""
    return opt_state[1]


def is_quantized(opt_state: Any) -> bool:
    return isinstance(state_of(opt_state), QuantizedState)
