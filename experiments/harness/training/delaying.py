"""Delayed ranges among a train state's parameters, which no optimizer updates.

A loss's derivative by them is what was largest in the step (`jaxquant.operations.delaying`).
"""

from typing import Any

import jax
import optax

from experiments.harness.training.train import Apply
from jaxquant.operations.delaying import Scales, next_scales


def _is_scales(x: Any) -> bool:
    return isinstance(x, Scales)


def _weights(tree: Any) -> Any:
    """Returns a tree without its scales."""
    return jax.tree.map(lambda x: None if _is_scales(x) else x, tree, is_leaf=_is_scales)


def _chosen(scales: Any, others: Any) -> Any:
    """Returns the scales of one tree, and all else of another, which has None in their places."""
    either = lambda own, other: own if _is_scales(own) else other  # noqa: E731
    return jax.tree.map(either, scales, others, is_leaf=lambda x: x is None or _is_scales(x))


def weights_alone(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation of the weights' gradients; those of scales are passed on."""
    tx = optax.with_extra_args_support(tx)

    def init(params):
        return tx.init(_weights(params))

    def update(updates, state, params=None, **extra: Any):
        own = None if params is None else _weights(params)
        found, state = tx.update(_weights(updates), state, own, **extra)
        return _chosen(updates, found), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def carrying_scales(apply: Apply) -> Apply:
    """Returns an `apply` that adds the weights' updates, and gives scales those of the next step."""

    def applied(params: Any, updates: Any, step: jax.Array) -> Any:
        new = apply(_weights(params), _weights(updates), step)
        return _chosen(next_scales(params, updates), new)

    return applied
