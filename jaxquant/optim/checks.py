"""Check that a state, parameters and updates belong together, before anything is traced."""

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
    tx: Any, state: Any, updates: Any, params: Any, extra: dict[str, Any], onto: str = "update"
) -> TracedUpdate:
    """Traces the wrapped transformation's update of a state.

    Raises:
        ValueError: if the state is not quantized, if updates or parameters do not match it, or if an
            unquantized leaf has another shape or kind than before.
    """
    check_state(state)
    check_parameters(state.plan, updates, "updates")
    if params is not None:
        check_parameters(state.plan, params, "params")
    tx = optax.with_extra_args_support(transformation(tx))
    return TracedUpdate(tx, state.plan, updates, params, unquantized(state), extra, onto)


def transformation(tx: Any) -> Any:
    """Returns the transformation of an `optax.MultiSteps`; returns other arguments unchanged."""
    return tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx


def check_state(state: Any) -> None:
    """Raises a ValueError unless the argument is the state of a `quantize_state`."""
    if not isinstance(state, QuantizedState):
        raise ValueError(
            f"the state must be that of a quantize_state; got {type(state).__name__}"
            " (jq.optim.from_optax quantizes a plain one)"
        )


def check_parameters(plan: Plan, tree: Any, name: str) -> None:
    """Raises a ValueError unless a tree has the parameters with coded state in their places."""
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
    """Raises a ValueError unless the leaves of a plain state have the names of those that the plan codes."""
    flat = jax.tree.leaves_with_path(plain)
    for leaf in plan.leaves:
        wanted = "/".join(part for part in (leaf.slot, leaf.path) if part)
        found = path_of(flat[leaf.index][0]) if leaf.index < len(flat) else "nothing"
        if bare(found) != bare(wanted):
            raise ValueError(
                f"the plain state must be of the same transformation and parameters as this one: "
                f"leaf {leaf.index} is {wanted!r} here; got {found!r}"
            )
