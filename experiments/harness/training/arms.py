"""The arms: one AdamW each, which differ in how its two moments are held and in nothing else."""

import re
from collections.abc import Callable
from typing import Any

import optax

from experiments.harness.peers import optimizers
from experiments.harness.training import train
from jaxquant.optim import (
    LayerStatistics,
    QuantizedState,
    UpdateSensitivity,
    adaptive,
    fixed,
    quantize_state,
    uniform,
)

EXACT = "fp32"
B1, B2, EPS = 0.9, 0.95, 1e-8
_PEERS = {
    "torchao-4bit": optimizers.torchao(4),
    "torchao-8bit": optimizers.torchao(8),
    "bitsandbytes-8bit": optimizers.bitsandbytes(),
}
_BITS = r"(\d+(?:\.\d+)?)"
_BUDGETS: dict[str, Callable[[float, int], Any]] = {
    "even": lambda bits, interval: uniform(bits),
    "felt": lambda bits, interval: adaptive(bits, interval, UpdateSensitivity()),
    "felt-loss": lambda bits, interval: adaptive(bits, interval, UpdateSensitivity("loss")),
    "statistics": lambda bits, interval: adaptive(bits, interval, LayerStatistics()),
}
KNOWN = (
    f"{EXACT}, fixed-B or fixed-B-B, {', '.join(_PEERS)}, {', '.join(f'{k}-B' for k in _BUDGETS)}"
)


def budget_of(arm: str) -> tuple[str, float] | None:
    """Returns an arm's allocation and its budget in bits; None for an arm without a budget.

    >>> budget_of("felt-loss-4.5"), budget_of("fixed-8")
    (('felt-loss', 4.5), None)
    """
    for kind in _BUDGETS:
        if match := re.fullmatch(f"{kind}-{_BITS}", arm):
            return kind, float(match[1])
    return None


def fixed_bits(arm: str) -> int | None:
    """Returns the bits of both moments of an arm where they are one and stay.

    >>> fixed_bits("fixed-8"), fixed_bits("fixed-5-4"), fixed_bits("felt-5.0")
    (8, None, None)
    """
    match = re.fullmatch(r"fixed-(\d)", arm)
    return int(match[1]) if match else None


def moments(arm: str, interval: int, **layout: Any) -> Any:
    """Returns the transformation that has the arm's state: Adam's, without decay, rate or clipping.

    Args:
        arm: its name.
        interval: steps between decisions of adaptive arms.
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
        return quantize_state(adam, _BUDGETS[kind](bits, interval), **layout)
    raise ValueError(f"a state is one of {KNOWN}, with B bits; got {arm!r}")


def optimizer(arm: str, interval: int) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with the arm's state."""
    return train.adamw(B1, B2, moments=moments(arm, interval))


def state_of(opt_state: Any) -> Any:
    """Returns the moments' state within `optimizer`'s."""
    return opt_state[1]


def is_quantized(opt_state: Any) -> bool:
    return isinstance(state_of(opt_state), QuantizedState)
