"""Measure what rounding does to a state in one step: stalls, zeros, bias, and the preconditioner's error."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxquant.numerics.sharding import call_with_auto_axes
from jaxquant.optim.checks import trace_update
from jaxquant.optim.state import QuantizedState, decoded, with_leaf


class Diagnosis(NamedTuple):
    """The diagnosis of one coded leaf.  x is the value before the step, x' after it, and Q the decoded x'.

    Attributes:
        stalled: share of the elements with x' ≠ x for which (Q − x)(x' − x) < 0.1 (x' − x)²: less than a
            tenth of the step is kept.
        zero: share of the elements with x' ≠ 0 whose Q is 0.
        radial_bias: ⟨Q − x', x'⟩ / ‖x'‖², the relative change of the state's length.
        relative_error: ‖Q − x'‖ / ‖x'‖.
        preconditioner_error: quantiles 0, 0.01, 0.5, 0.99 and 1 of √(Q / x') − 1 over elements with x' > 0;
            NaN for signed states.
    """

    stalled: jax.Array
    zero: jax.Array
    radial_bias: jax.Array
    relative_error: jax.Array
    preconditioner_error: jax.Array


_QUANTILES = (0.0, 0.01, 0.5, 0.99, 1.0)


def diagnose(
    tx: optax.GradientTransformation,
    state: QuantizedState,
    updates: Any,
    params: Any,
    *,
    seed: int = 0,
    **extra: Any,
) -> dict[str, Diagnosis]:
    """Returns what rounding would do to each coded leaf in the next step; can be jitted.

    All state is decoded at once, so call it occasionally and not at every step.

    Args:
        tx: the wrapped transformation.
        state: the state of `quantize_state(tx, …)`.
        updates: the updates, as given to `update`.
        params: the parameters.
        seed: the seed of `quantize_state`, or any other.
        extra: further arguments of the update, by name.

    Returns:
        A `Diagnosis` by ``slot/path`` of the leaf.

    >>> from jaxquant.optim import fixed, quantize_state
    >>> params = {"w": jnp.ones((64, 64))}
    >>> state = quantize_state(optax.trace(0.9), fixed(8)).init(params)
    >>> gradients = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    >>> found = diagnose(optax.trace(0.9), state, gradients, params)
    >>> bool(found["trace/w"].relative_error < 0.02)
    True
    """
    look = functools.partial(_diagnosed, tx, seed)
    return call_with_auto_axes(look, (state, updates, params, extra), PartitionSpec)


def _diagnosed(
    tx: Any, seed: int, state: QuantizedState, updates: Any, params: Any, extra: dict[str, Any]
) -> dict[str, Diagnosis]:
    traced = trace_update(tx, state, updates, params, extra)
    places = [
        (number, slot, place, leaf)
        for number, layout in enumerate(state.plan.groups)
        for slot, leaves in enumerate(layout.leaves)
        for place, leaf in enumerate(leaves)
    ]
    before = {leaf.index: decoded(state, *where) for *where, leaf in places}
    known = traced.known | {traced.state(i): x for i, x in before.items()}
    env = traced.program.evaluate([traced.leaves[i] for i in before], known)
    found = {}
    for number, slot, place, leaf in places:
        after = env[traced.leaves[leaf.index]]
        stored = decoded(with_leaf(state, number, slot, place, after, seed), number, slot, place)
        found[f"{leaf.slot}/{leaf.path}"] = _diagnosis(
            before[leaf.index], after, stored, leaf.is_signed
        )
    return found


def _diagnosis(
    before: jax.Array, after: jax.Array, stored: jax.Array, is_signed: bool
) -> Diagnosis:
    before, after, stored = (x.astype(jnp.float32).ravel() for x in (before, after, stored))
    moved, lives = after != before, after != 0
    sign = jnp.sign(after - before)
    stalled = moved & ((stored - before) * sign < 0.1 * jnp.abs(after - before))
    # Divide by the maximum first: squares of small values underflow in float32.
    scale = 1 / jnp.maximum(jnp.max(jnp.abs(after)), jnp.finfo(jnp.float32).tiny)
    error, x = (stored - after) * scale, after * scale
    square = jnp.maximum(jnp.sum(x * x), jnp.finfo(jnp.float32).tiny)
    if is_signed:
        quantiles = jnp.full(len(_QUANTILES), jnp.nan)
    else:
        ratio = jnp.sqrt(stored / jnp.where(after > 0, after, 1.0)) - 1
        ratio = jnp.where(after > 0, ratio, jnp.nan)
        quantiles = jnp.nanquantile(ratio, jnp.array(_QUANTILES))
    return Diagnosis(
        _share(stalled, moved),
        _share(lives & (stored == 0), lives),
        jnp.sum(error * x) / square,
        jnp.sqrt(jnp.sum(error * error) / square),
        quantiles,
    )


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    count = jnp.sum(whole, dtype=jnp.int32).astype(jnp.float32)
    return jnp.sum(part, dtype=jnp.int32).astype(jnp.float32) / jnp.maximum(count, 1.0)
