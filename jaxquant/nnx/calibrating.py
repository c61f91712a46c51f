"""Ranges of a quantized model's activations, and where learned steps start."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant import calibration as calibrations
from jaxquant.functions import quantizing
from jaxquant.functions.operations import Operation
from jaxquant.functions.operations import operation as make_operation
from jaxquant.functions.quantizing import Decision
from jaxquant.functions.states import first_step, is_learned
from jaxquant.groups import scale_shape
from jaxquant.nnx.calls import DOOR, Call, called
from jaxquant.nnx.doors import Door, copied, door_of
from jaxquant.nnx.modules import InputRange, StepSize
from jaxquant.nnx.observing import check_range, checked, fitting
from jaxquant.nnx.planning import planned
from jaxquant.nnx.storing import holder_of
from jaxquant.qarray import calibrate as range_of
from jaxquant.quantizer import Quantizer
from jaxquant.reductions import largest

Model = TypeVar("Model", bound=nnx.Module)
# Of a weight's activations: what was found, and how often.
Seen = tuple[Any, jax.Array]


def add_learned(
    model: nnx.Module, inputs: tuple[Any, ...], options: Any, call: Callable[..., Any] | None
) -> None:
    """Gives a quantized model the learned steps of its weights, each at LSQ's start.

    Raises:
        ValueError: a weight with learned steps whose products are not known without example inputs, that
            is made of several parameters, or that no module's attribute holds.
    """
    plan = planned(model, inputs, options, call)
    for decision in plan.decisions:
        wanted = decision.rule.value if decision.rule is not None else None
        forward = getattr(wanted, "forward", None)
        if forward is None or not is_learned(forward.rhs):
            continue
        operation = _unlearned(decision)
        if operation is None or operation.stored is None or len(decision.product.parameters) != 1:
            continue
        (path,) = decision.product.parameters
        module, name = held(model, path)
        if not hasattr(module, f"{name}_step"):
            start = functools.partial(_first, quantizer=forward.rhs, operation=operation)
            values = {p: plan.values[p] for p in operation.stored.paths}
            steps = operation.stored.of(values, lambda w, _, start=start: start(w))
            setattr(module, f"{name}_step", StepSize(steps))


def _unlearned(decision: Decision) -> Operation | None:
    """A product's operation with other calibrations in the place of learned steps."""
    assert decision.rule is not None
    recipe: Any = decision.rule.value
    forward = recipe.forward

    def plain(quantizer: Quantizer | None) -> Quantizer | None:
        if not is_learned(quantizer):
            return quantizer
        assert quantizer is not None
        return dataclasses.replace(quantizer, calibration=calibrations.absmax)

    changed = dataclasses.replace(forward, lhs=plain(forward.lhs), rhs=plain(forward.rhs))
    try:
        return make_operation(decision.product, dataclasses.replace(recipe, forward=changed))
    except ValueError:  # which is said when the model is called
        return None


def _first(weight: jax.Array, quantizer: Quantizer, operation: Operation) -> jax.Array:
    axes, stacking = operation.axes, operation.stacking
    if stacking is not None:
        own = tuple(a - sum(b < a for b in stacking.axes) for a in axes)
        one = dataclasses.replace(operation, axes=own, stacking=None)
        return stacking.each(lambda w: _first(w, quantizer, one))(weight)
    groups = scale_shape(weight.shape, quantizer.granularity, axes)  # pyright: ignore
    return first_step(weight, quantizer, tuple(a for a in range(weight.ndim) if groups[a] == 1))


def held(model: nnx.Module, path: str) -> tuple[Any, str]:
    """The module of which a parameter is an attribute, and its name.

    Raises:
        ValueError: one that a list or dict holds.
    """
    found = holder_of(model, path)
    if found is None:
        raise ValueError(
            f"{path} takes no ranges and learned steps: no module's attribute holds it, but a list or dict; "
            "a rule (path, ...) before the others gives it a recipe without"
        )
    return found


# ---------------------------------------------------------------------------------------------------
# Activations


def calibrate(
    model: Model,
    batches: Iterable[Any],
    *,
    decay: float | None = None,
    call: Callable[..., Any] | None = None,
) -> Model:
    """Gives activations fixed ranges in place of those found anew at each call; starts learned steps.

    An activation's range is its quantizer's own calibration, over all batches: the largest that was seen,
    or with `decay` an exponential average.  Products of one weight share a range.  Quantizers whose scales
    belong to single rows or blocks of activations stay as they are, since a fixed range would not fit other
    rows; so do products of two activations, and of weights that are made of several parameters.

    Args:
        model: as `quantize` made it; changed in place, and returned.
        batches: inputs like those that it will serve, each an array or a tuple of arguments; a dict is one of
            keyword arguments.
        decay: from 0, the last batch alone, to 1, the mean of all; None for the largest.
        call: from (model, *batch); the model's own call where not given.

    Raises:
        ValueError: nothing to calibrate; no batches, or one that is empty, does not fit or has a NaN or an
            Inf; a layer that was given zeros alone; a product within a while loop.
    """
    is_number = isinstance(decay, int | float) and not isinstance(decay, bool)
    if decay is not None and not (is_number and 0 <= decay <= 1):
        raise ValueError(f"decay is from 0 to 1; got {decay!r}")
    door = door_of(model)
    if door is None:
        raise ValueError(
            f"a quantized model is wanted; got {type(model).__name__}: call jaxquant.nnx.quantize first"
        )
    working, found = copied(model), dict[tuple[str, str], Any]()
    for index, arguments in checked(batches):
        with fitting(index, arguments):
            how = call or "__call__"
            made, given, nodes = called(working, door.path, how, arguments, {}, door.first)
            seen, changed = _seen(door, made, decay, getattr(working, DOOR[1], ()), given)
            nnx.update(nodes, changed)
        for part, weights in seen.items():
            for path, use in ((path, use) for path, uses in weights.items() for use in uses):
                found[path, part] = _added(found.get((path, part)), use, part, decay)
    if not found:
        raise ValueError(
            "no activations have a range to calibrate: none is quantized per tensor (as by "
            'quantize(model, {".*": "w8a8"})), or all are calibrated'
        )
    for (path, _), (total, weight) in found.items():
        check_range(path.rpartition("/")[0] or path, total, weight)
    prefix = f"{door.path}/" if door.path else ""
    for (path, part), (total, weight) in found.items():
        if not bool(jnp.all(weight > 0)):
            continue  # never multiplied, so that there is nothing to fix
        module, name = held(model, path.removeprefix(prefix))
        value = jax.tree.map(lambda x, w=weight: x / w, total)
        kind = StepSize if part == "input_step" else InputRange
        setattr(module, f"{name}_{part}", kind(value))
    return model


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _seen(door: Door, call: Call, decay: Any, rule_arrays: Any, arrays: Any) -> Any:
    """What each weight's activations are like in a call, and what it changed.

    Returns:
        By part of a `State` and by weight a list over its products; and the module's variables that changed.
    """
    trace = call.traced(arrays)
    rules, states = door.parsed(rule_arrays), call.states(arrays)
    stored = quantizing.stored_among(call.origins, arrays)
    decisions = quantizing.decided(
        trace.products, rules, True, states, stored, True, door.aliases, is_tried=False
    )
    how = call.origins, door.on_unsupported, _record
    (_, state), records = quantizing.recorded(trace, decisions, arrays, *how)
    seen: dict[str, dict[str, list[Seen]]] = {}
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
        seen.setdefault(part, {}).setdefault(path, []).append(whole)
    return seen, call.changed(trace, state)


def wanted_of(decision: Decision) -> Quantizer | None:
    """A product's quantizer of activations that is still to get a range or a start; None where it has one."""
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

    left, batch = operation.left(*operands), operation.each
    for _ in batch:
        find = jax.vmap(find)
    found = find(jnp.moveaxis(left, batch, range(len(batch))))
    return found, jnp.ones(jax.tree.leaves(found)[0].shape)


def _over_turns(record: Any, scans: Sequence[int], each: int, part: str, decay: Any) -> Seen:
    """Over the turns of all scans but those in which the weight differs.

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


def _added(before: Any, use: Seen, part: str, decay: float | None) -> Any:
    """What was seen of a weight's activations, with one use of it more."""
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
