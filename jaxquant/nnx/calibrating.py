"""Ranges of a quantized model's activations, and where learned steps start."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.checks import check_number
from jaxquant.engine.batches import check_each, check_range, fitting
from jaxquant.functions import quantizing
from jaxquant.functions.calibrating import accumulate, record_inputs
from jaxquant.functions.operations import Operation
from jaxquant.functions.operations import operation as make_operation
from jaxquant.functions.quantizing import Decision
from jaxquant.functions.states import first_step, is_learned
from jaxquant.nnx.calls import DOOR, Call, called
from jaxquant.nnx.doors import Door, copied, door_of
from jaxquant.nnx.modules import InputRange, StepSize
from jaxquant.nnx.planning import planned
from jaxquant.nnx.storing import holder_of
from jaxquant.numerics import calibration as calibrations
from jaxquant.numerics.groups import scale_shape
from jaxquant.numerics.quantizer import Quantizer

Model = TypeVar("Model", bound=nnx.Module)


def add_learned(
    model: nnx.Module, inputs: tuple[Any, ...], options: Any, call: Callable[..., Any] | None
) -> None:
    """Adds learned weight steps to a quantized model, at LSQ's initial values.

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
    """Returns a product's operation with other calibrations in the place of learned steps."""
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
    sizes = [n // count for n, count in zip(weight.shape, groups, strict=True)]
    # An axis of groups, then one of a group's elements, for each of the weight's.
    view = weight.reshape([n for pair in zip(groups, sizes, strict=True) for n in pair])
    return first_step(view, quantizer, tuple(range(1, view.ndim, 2))).reshape(groups)


def held(model: nnx.Module, path: str) -> tuple[Any, str]:
    """Returns the module of which a parameter is an attribute, and its name.

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
    """Fixes activation ranges, which are otherwise computed at each call; initializes learned steps.

    An activation's range is its quantizer's own calibration, over all batches: the largest that was seen,
    or with `decay` an exponential average.  Products of one weight share a range.  Quantizers whose scales
    belong to single rows or blocks of activations stay as they are, since a fixed range would not fit other
    rows; so do products of two activations, and of weights that are made of several parameters.

    Args:
        model: as `quantize` made it; changed in place, and returned.
        batches: inputs like those that it will serve, each an array or a tuple of arguments; for keyword
            arguments, dicts with ``call=lambda model, batch: model(**batch)``.
        decay: from 0, the last batch alone, to 1, the mean of all; None for the largest.
        call: from (model, *batch); the model's own call where not given.

    Raises:
        ValueError: nothing to calibrate; no batches, or one that is empty, does not fit or has a NaN or an
            Inf; a layer that was given zeros alone; a product within a while loop.
    """
    if decay is not None:
        check_number("decay", decay, 0, 1)
    door = door_of(model)
    if door is None:
        raise ValueError(
            f"a quantized model is wanted; got {type(model).__name__}: call jaxquant.nnx.quantize first"
        )
    working, found = copied(model), dict[tuple[str, str], Any]()
    for index, arguments in check_each(batches):
        with fitting(index, arguments):
            how = call or "__call__"
            made, given, nodes = called(working, door.path, how, arguments, {}, door.first)
            found_here, changed = _seen(door, made, decay, getattr(working, DOOR[1], ()), given)
            changed.write(nodes)
        for part, weights in found_here.items():
            for path, use in ((path, use) for path, uses in weights.items() for use in uses):
                found[path, part] = accumulate(found.get((path, part)), use, part, decay)
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
    """Returns statistics of each weight's activations in a call, and what the call changed.

    Returns:
        By part of a `State` and by weight a list over its products; and the module's variables that changed.
    """
    trace = call.trace(arrays)
    rules, states = door.parsed(rule_arrays), call.states(arrays)
    stored = quantizing.stored_among(call.origins, arrays)
    decisions = quantizing.decide(
        trace.products, rules, True, states, stored, True, door.aliases, is_tried=False
    )
    how = call.origins, door.on_unsupported, decay
    (_, state), found = record_inputs(trace, decisions, arrays, *how)
    return found, call.changed(trace, state)
