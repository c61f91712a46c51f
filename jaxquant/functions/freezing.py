"""Freezing: parameters become the integers that products multiply."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxquant.engine.derivations import Derivation
from jaxquant.engine.rules import Rules
from jaxquant.engine.walking import called
from jaxquant.functions.operations import Operation
from jaxquant.functions.quantizing import Decision, check, decide, is_read, together
from jaxquant.numerics.calibration import Range, Step
from jaxquant.numerics.opaque import Owner
from jaxquant.numerics.qarray import QArray, quantize
from jaxquant.numerics.stacking import Stacking
from jaxquant.numerics.stored import Stored
from jaxquant.operations.dot import DotGeneral

__all__ = ["freeze", "freeze_parameters"]


def freeze(
    function: Callable[..., Any], rules: Rules, parameters: Any, *args: Any, **kwargs: Any
) -> Any:
    """Returns parameters for serving: those that rules quantize are packed integers with scales.

    ``quantize(function, rules)`` with them gives the same results bit for bit.  What is stored is each
    product's weight as it multiplies it: transposed, cast and masked as the function does.

    Args:
        function: as of `quantize`.
        rules: as of `quantize`.
        parameters: its first argument; not changed.
        args, kwargs: the others, arrays or `jax.ShapeDtypeStruct`s: the function is traced, not run.

    Returns:
        The same tree with a `jaxquant.numerics.stored.Stored` in the place of each parameter that is stored.

    Raises:
        ValueError: nothing that rules quantize; parameters that are stored already, or hold a NaN or an Inf;
            one that is read by more than products, or that two products would store in two ways; a
            precision that is traced; all at once.

    >>> import jax
    >>> model = lambda w, x: x @ w["up"]
    >>> frozen = freeze(model, {"up": "w4a16"}, {"up": jnp.ones((64, 8))}, jnp.ones((1, 64)))
    >>> frozen["up"].bits_per_element
    4.5
    """
    call, arrays = called((parameters, *args), kwargs)
    trace = call.trace(function, arrays)
    decisions = decide(trace.products, rules)
    check(decisions)
    pairs = zip(call.origins, arrays, strict=True)
    values = {path: x for origin, x in pairs if origin.is_weight for path in origin.nearest}
    stored = freeze_parameters(trace.reads, decisions, values)
    paths, structure = jax.tree_util.tree_flatten_with_path(parameters)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    leaves = [stored.get(name, x) for name, (_, x) in zip(names, paths, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def freeze_parameters(
    reads: Mapping[str, str],
    decisions: Sequence[Decision],
    values: Mapping[str, Any],
    donate: bool = False,
) -> dict[str, Stored]:
    """Returns the stored value of each parameter.

    Args:
        reads: the parameters that a function reads by something else than a product, each with the line.
        decisions: for each of its products.
        values: its parameters and other arrays that weights are made of, by path.
        donate: free each parameter's array once its integers are there.

    Raises:
        ValueError: as `freeze`.
    """
    plans = to_store(reads, decisions, values)
    stored = {}
    for path, chosen in plans.items():
        check_weight(path, values[path])
        operands = {key: stored_operand(d, values) for key, d in chosen.items()}
        shape, dtype = values[path].shape, values[path].dtype
        stored[path] = Stored(operands, shape, dtype, Owner(path))
        if donate:
            values[path].delete()
    for path in _parts(reads, decisions, set(plans), values):
        stored[path] = Stored({}, values[path].shape, values[path].dtype, Owner(path))
        if donate:
            values[path].delete()
    return stored


def _parts(
    reads: Mapping[str, str],
    decisions: Sequence[Decision],
    held: set[str],
    values: Mapping[str, Any],
) -> set[str]:
    """Returns parameters that are only parts of other operands, as gates that a layer concatenates are."""
    of_held: set[str] = set()
    others = set(reads)
    for decision in decisions:
        parameters, operation = set(decision.product.parameters), decision.operation
        is_stored = operation is not None and operation.quantizer is not None and parameters & held
        (of_held if is_stored else others).update(parameters)
    # A weakly typed scalar stays: what stands in its place would have a type of its own.
    weak = {path for path in of_held if getattr(values[path], "weak_type", False)}
    return of_held - others - held - weak


def stored_operand(decision: Decision, values: Mapping[str, Any]) -> QArray:
    """Returns a product's weight as it is stored.

    Args:
        decision: with an operation that quantizes its weight, which parameters alone make.
        values: these, by path.
    """
    operation = decision.operation
    assert operation is not None
    assert operation.stored is not None
    needed = {path: values[path] for path in operation.stored.paths}
    given = _given(decision)
    if operation.stored.key in needed:  # a parameter as it is: one program for all that are alike
        weight = needed[operation.stored.key]
        return _quantized(operation.axes, operation.stacking, weight, operation.recipe, given)
    how = operation.stored, operation.axes, operation.stacking
    return _derived(*how, needed, operation.recipe, given)


def _given(decision: Decision) -> Any:
    """Returns the calibration that a state has for a weight, with all turns in front; None where it has none.

    Its values lie along the weight's own axes, as the scales will.
    """
    state, operation = decision.state, decision.operation
    assert operation is not None
    if state is None:
        return None
    if state.step is not None:
        return Step(jnp.abs(state.step))
    ranges = None if state.delayed is None else state.delayed.ranges.rhs
    if ranges is None:
        return None
    shape = [1] * decision.product.operands[operation.right].ndim
    if operation.stacking is not None:
        for axis, size in zip(operation.stacking.axes, operation.stacking.sizes, strict=True):
            shape[axis] = size
    turns = ranges.value.shape[: ranges.value.ndim - len(operation.each)]
    return Range(ranges.value.reshape(*turns, *shape))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantized(
    axes: tuple[int, ...],
    stacking: Stacking | None,
    weight: jax.Array,
    recipe: DotGeneral,
    given: Any,
) -> QArray:
    if stacking is not None:
        own = tuple(a - sum(b < a for b in stacking.axes) for a in axes)
        one = stacking.each(lambda weight, given: _quantized(own, None, weight, recipe, given))
        return stacking.with_layer_axes(one(weight, given))
    quantizer = recipe.forward.rhs
    assert quantizer is not None
    if given is not None:
        quantizer = dataclasses.replace(quantizer, calibration=given)
    return packed(quantize(weight, quantizer, axes))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _derived(
    derivation: Derivation,
    axes: tuple[int, ...],
    stacking: Stacking | None,
    values: Mapping[str, Any],
    recipe: DotGeneral,
    given: Any,
) -> QArray:
    return derivation.of(values, lambda w, g: _quantized(axes, stacking, w, recipe, g), given)


def packed(x: QArray) -> QArray:
    """Returns x in as few bytes as its format's codes need."""
    element = x.element
    is_whole = jnp.dtype(element.dtype).itemsize * 8 == element.bits and element.dtype != jnp.int4
    return x if is_whole else x.pack()


def check_weight(path: str, weight: Any) -> None:
    """Raises a ValueError for a weight with a NaN or an Inf, where its numbers are known."""
    if isinstance(weight, Tracer | jax.ShapeDtypeStruct):
        return
    if not bool(jnp.isfinite(weight).all()):
        raise ValueError(f"{path or 'the weight'} holds a NaN or an Inf")


def to_store(
    reads: Mapping[str, str], decisions: Sequence[Decision], values: Mapping[str, Any]
) -> dict[str, dict[str, Decision]]:
    """Returns, by parameter and storage key, a decision that stores the weight.

    Args:
        reads, decisions, values: as of `freeze_parameters`.

    Raises:
        ValueError: as `freeze`.
    """
    plans: dict[str, dict[str, Decision]] = {}
    refused = []
    for decision in decisions:
        path, operation = _holder(decision, values), decision.operation
        if path is None or operation is None or operation.quantizer is None:
            continue
        reason = _reason(decision, reads, values)
        if reason:
            refused.append(reason)
            continue
        assert operation.stored is not None
        earlier = plans.setdefault(path, {}).setdefault(operation.stored.key, decision)
        if not _is_alike(earlier.operation, operation):
            refused.append(_two_ways(decision))
    for decision in decisions:  # left in float, whose weight would be gone
        is_float = decision.operation is None or decision.operation.quantizer is None
        if is_float and any(path in plans for path in decision.product.parameters):
            refused.append(_two_ways(decision))
    if refused:
        raise ValueError("\n".join(together(refused)))
    if not plans:
        raise ValueError(
            "there is nothing to freeze: no product's weight is quantized by the rules"
        )
    return plans


def _is_alike(one: Operation | None, other: Operation) -> bool:
    """Returns whether two products would store a weight alike."""
    assert one is not None
    (leaves, static), (others, other_static) = map(
        jax.tree.flatten, (one.quantizer, other.quantizer)
    )
    if (static, one.axes) != (other_static, other.axes):
        return False
    return all(a is b or np.array_equal(a, b) for a, b in zip(leaves, others, strict=True))


def _holder(decision: Decision, values: Mapping[str, Any]) -> str | None:
    """Returns the parameter that a product's weight is stored for: the largest that it is made of."""
    parameters = decision.product.parameters
    return max(parameters, key=lambda path: math.prod(values[path].shape), default=None)


def _reason(decision: Decision, reads: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """Returns why a product's weight cannot be stored."""
    product, operation = decision.product, decision.operation
    assert operation is not None
    where = f" ({product.source})" if product.source else ""
    if operation.stored is None:
        return (
            f"{product.path}{where} cannot be frozen: its weight is the result of another product, is chosen "
            f"within a loop, or lies within a shard_map; a rule ({product.path!r}, None) before the others "
            "leaves it in float"
        )
    for path in product.parameters:
        if isinstance(values[path], Stored):
            return f"{path} is frozen already"
        if path in reads:
            return is_read(path, reads[path])
    if jax.tree.leaves(getattr(operation.quantizer, "format", None)):
        return (
            f"{product.path}{where} cannot be frozen: its precision is traced, and stored numbers need "
            "static widths"
        )
    return ""


def _two_ways(decision: Decision) -> str:
    product = decision.product
    where = f" ({product.source})" if product.source else ""
    label = "float" if decision.rule is None else decision.rule.label
    return (
        f"{product.path}{where} shares its weight with a product that would store it in another way than "
        f"{label}, by its recipe or along other axes; a rule ({product.path!r}, None) before the others "
        "leaves both in float"
    )


# ---------------------------------------------------------------------------------------------------
# What is stored, as a model's variables hold it


def wrap_stored(path: str, held: Stored | QArray) -> Stored:
    """Wraps a stored weight; a `QArray` is multiplied directly, or layer by layer."""
    if isinstance(held, Stored):
        return held
    operands = dict.fromkeys(_plain_keys(path, held.ndim), held)
    return Stored(operands, tuple(held.shape), held.dtype, held.owner)


def unwrap_stored(path: str, stored: Stored) -> Stored | QArray:
    """Returns a stored weight as a variable holds it: a `QArray` if multiplied directly, or by turns."""
    if not stored.operands:
        return stored
    (key, *others), operand = stored.operands, next(iter(stored.operands.values()))
    is_plain = not others and key in _plain_keys(path, operand.ndim)
    if not is_plain or (operand.shape, operand.dtype) != (stored.shape, stored.dtype):
        return stored
    return dataclasses.replace(operand, owner=stored.owner)


def _plain_keys(path: str, ndim: int) -> list[str]:
    """Returns the keys of a parameter, and of its parts along leading axes in the turns of scans."""
    return [f"{'turn(' * count}{path}{')' * count}" for count in range(max(1, ndim - 1))]
