"""Ranges of activations and starts of learned steps, recorded where products are computed."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.engine.walking import Trace
from jaxquant.functions import quantizing
from jaxquant.functions.operations import Operation
from jaxquant.functions.quantizing import Decision
from jaxquant.functions.states import first_step, is_learned
from jaxquant.numerics import calibration as calibrations
from jaxquant.numerics.qarray import calibrate as range_of
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.reductions import largest

# Of a weight's activations: what was found, and how often.
Seen = tuple[Any, jax.Array]


def record_inputs(
    trace: Trace,
    decisions: Sequence[Decision],
    arrays: Sequence[Any],
    origins: Sequence[Any],
    on_unsupported: str,
    decay: float | None,
) -> tuple[Any, dict[str, dict[str, list[Seen]]]]:
    """Returns a function's result, and what each weight's activations are like in it.

    Args:
        trace, decisions, arrays, origins, on_unsupported: as of `jaxquant.functions.quantizing.evaluate`.
        decay: as of `jaxquant.nnx.calibrate`.

    Returns:
        The result; and by part of a `State` and by weight a list over its products.
    """
    how = origins, on_unsupported, _record
    result, records = quantizing.evaluate_recording(trace, decisions, arrays, *how)
    found: dict[str, dict[str, list[Seen]]] = {}
    for index in sorted(records):
        decision = decisions[index]
        wanted = wanted_of(decision)
        assert wanted is not None
        assert decision.operation is not None
        turns = () if decision.operation.stored is None else decision.operation.stored.turns
        part = "input_step" if is_learned(wanted) else "input_range"
        path = decision.product.parameters[0]
        each = len(decision.operation.each)
        whole = _over_turns(records[index], [scan for scan, _ in turns], each, part, decay)
        found.setdefault(part, {}).setdefault(path, []).append(whole)
    return result, found


def wanted_of(decision: Decision) -> Quantizer | None:
    """Returns the activations' quantizer if its range or step must still be initialized, else None."""
    rule, state = decision.rule, decision.state
    forward = None if rule is None else getattr(rule.value, "forward", None)
    is_one = len(decision.product.parameters) == 1 and decision.product.kind != "lookup"
    if forward is None or forward.lhs is None or decision.operation is None or not is_one:
        return None
    if is_learned(forward.lhs):
        return None if state is not None and state.input_step is not None else forward.lhs
    is_found = isinstance(forward.lhs.calibration, calibrations.Range | calibrations.Step)
    if is_found or forward.lhs.granularity != "tensor":
        return None
    return None if state is not None and state.input_range is not None else forward.lhs


def _record(decision: Decision, operation: Operation, *operands: jax.Array) -> Any:
    wanted = wanted_of(decision)
    if wanted is None:
        return None

    def find(left: jax.Array) -> Any:
        if is_learned(wanted):
            return first_step(left, wanted)
        found = range_of(left, wanted, tuple(range(left.ndim)))
        return jax.tree.map(lambda r: r.reshape(()), found)

    left, batch = operation.flatten_left(*operands), operation.each
    for _ in batch:
        find = jax.vmap(find)
    found = find(jnp.moveaxis(left, batch, range(len(batch))))
    return found, jnp.ones(jax.tree.leaves(found)[0].shape)


def _over_turns(record: Any, scans: Sequence[int], each: int, part: str, decay: Any) -> Seen:
    """Reduces a record over the turns of all scans except those in which the weight differs.

    Args:
        record: what was found and its weight, by turns of all scans, and of as many matrices as `each` axes.
        scans: in which the weight differs.
    """
    found, weight = record
    others = tuple(a for a in range(weight.ndim - each) if a not in scans)
    if part == "input_step" or decay is not None:
        total = jax.tree.map(lambda x: jnp.sum(x * weight, others), found)
        count = jnp.maximum(jnp.sum(weight, others), 1)
        return jax.tree.map(lambda x: x / count, total), jnp.sum(weight, others) > 0
    most = lambda x: jnp.squeeze(largest(x, others), others)  # noqa: E731
    found = (-most(-found[0]), most(found[1])) if isinstance(found, tuple) else most(found)
    return found, most(weight) > 0


def accumulate(before: Any, use: Seen, part: str, decay: float | None) -> Any:
    """Adds one use of a weight's activations to their statistics."""
    new, is_used = use
    weight = is_used.astype(jnp.float32)
    if before is None:
        before = jax.tree.map(jnp.zeros_like, new), jnp.zeros_like(weight)
    total, count = before
    if part == "input_step" or decay is not None:  # a start is a mean, whatever ranges do
        kept = 1.0 if part == "input_step" or decay is None else decay
        keep = jnp.where(is_used, kept, 1.0)
        add = lambda a, b: keep * a + weight * b  # noqa: E731
        return jax.tree.map(add, total, new), keep * count + weight
    if isinstance(new, tuple):
        total = jnp.minimum(total[0], new[0]), jnp.maximum(total[1], new[1])
    else:
        total = jnp.maximum(total, new)
    return total, jnp.maximum(count, weight)
