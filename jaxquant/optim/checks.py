"""Whether a state, parameters and updates belong together; what is wrong is said before a trace is made."""

from typing import Any

import jax
import numpy as np
import optax

from jaxquant.optim.leaves import path_of
from jaxquant.optim.named import bare
from jaxquant.optim.plans import Plan
from jaxquant.optim.state import QuantizedState, unquantized
from jaxquant.optim.traced_update import TracedUpdate


def trace_update(
    tx: Any, state: Any, updates: Any, params: Any, extra: dict[str, Any]
) -> TracedUpdate:
    """The wrapped transformation's update of a state, taken apart.

    Raises:
        ValueError: no quantized state; updates or parameters that it is not of; an exact leaf of another
            shape or kind than it had.
    """
    check_state(state)
    check_parameters(state.plan, updates, "updates")
    if params is not None:
        check_parameters(state.plan, params, "params")
    tx = optax.with_extra_args_support(transformation(tx))
    return TracedUpdate(tx, state.plan, updates, params, unquantized(state), extra)


def transformation(tx: Any) -> Any:
    """The transformation that an `optax.MultiSteps` stands for; all else as it is."""
    return tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx


def check_state(state: Any) -> None:
    """Raises a ValueError unless it is the state of a `quantize_state`."""
    if not isinstance(state, QuantizedState):
        raise ValueError(
            f"the state must be that of a quantize_state; got {type(state).__name__}"
            " (jq.optim.from_optax quantizes a plain one)"
        )


def check_parameters(plan: Plan, tree: Any, name: str) -> None:
    """Raises a ValueError where the parameters that have coded state are not in their place in a tree."""
    flat = jax.tree.leaves_with_path(tree)
    for leaf in plan.leaves:
        keys, found = flat[leaf.parameter] if leaf.parameter < len(flat) else ((), ())
        there = path_of(keys) if leaf.parameter < len(flat) else "nothing"
        if bare(there) != bare(leaf.path):
            raise ValueError(
                f"{name} must be those of the state, which has {leaf.path!r} in place "
                f"{leaf.parameter}, where {name} have {there!r}"
            )
        if np.shape(found) != leaf.shape:
            raise ValueError(
                f"{name} must be those of the state, in which {leaf.path!r} has the shape {leaf.shape}; "
                f"got {np.shape(found)}"
            )


def check_plain(plan: Plan, plain: Any) -> None:
    """Raises a ValueError where a plain state's leaves are not named as those that the plan codes."""
    flat = jax.tree.leaves_with_path(plain)
    for leaf in plan.leaves:
        wanted = "/".join(part for part in (leaf.slot, leaf.path) if part)
        found = path_of(flat[leaf.index][0]) if leaf.index < len(flat) else "nothing"
        if bare(found) != bare(wanted):
            raise ValueError(
                f"the plain state must be of the same transformation and parameters as this one: "
                f"leaf {leaf.index} is {wanted!r} here; got {found!r}"
            )
