"""Models with operations in slots of their layers, as `jaxquant.ptq` works on them, made ones by rules."""

import dataclasses
import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxquant.attention import Attention
from jaxquant.calibration import Range, Step, absmax
from jaxquant.conv import ConvGeneralDilated
from jaxquant.dot import DotGeneral
from jaxquant.functions.freezing import as_held
from jaxquant.nnx.doors import copied, install
from jaxquant.nnx.modules import (
    ChannelScale,
    Einsum,
    InputRange,
    Learned,
    StepSize,
    operation_of,
    read,
)
from jaxquant.nnx.modules import Stored as StoredWeight
from jaxquant.nnx.planning import planned
from jaxquant.nnx.sites import Site, sites
from jaxquant.nnx.storing import replaced
from jaxquant.opaque import Owner
from jaxquant.qarray import QArray
from jaxquant.rules import ATTENTION, Rule
from jaxquant.smoothed import Smoothed
from jaxquant.stacking import Stacking
from jaxquant.stored import Stored

Model = TypeVar("Model", bound=nnx.Module)


def from_slots(model: Model, slotted: nnx.Module) -> Model:
    """A model quantized by rules that computes what one with operations in slots does.

    Args:
        model: the architecture in floating point; not changed.
        slotted: the same with operations in the slots of Flax's layers, frozen or not.
    """
    found = {path: site for path, site in sites(slotted).items() if _is_quantized(site)}
    model, rules = _with_values(model, slotted), []
    floats = sites(model)
    for path, site in found.items():
        name = path if site.kind == ATTENTION else f"{path}/{site.weight}".strip("/")
        recipe, parts = _taken_apart(site)
        rules.append(
            Rule(re.compile(re.escape(name)), recipe, path or "the model", is_earlier=True)
        )
        for part, (kind, held) in parts.items():
            setattr(floats[path].module, f"{site.weight}_{part}", kind(held))
    install(model, rules)
    return _with_stored(model, found)


def _is_quantized(site: Site) -> bool:
    operation = site.operation
    return (
        isinstance(operation, Attention | Einsum | Smoothed) or operation_of(operation) is not None
    )


def _with_values(model: Model, slotted: nnx.Module) -> Model:
    """The architecture with all of the other's variables that are no stored weights."""
    values = {
        path: leaf
        for path, leaf in nnx.to_flat_state(nnx.split(slotted)[1])
        if not isinstance(leaf, StoredWeight)
    }
    graphdef, state = nnx.split(copied(model))
    pairs = [(path, values.get(path, leaf)) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(pairs))


def _taken_apart(site: Site) -> tuple[DotGeneral | Attention, dict[str, Any]]:
    """A site's recipe, and what is found or learned beside it, as parts of a `State`."""
    operation, parts = site.operation, {}
    if isinstance(operation, Attention):
        return operation, parts
    if isinstance(operation, Einsum):
        operation = operation.dot_general
    if isinstance(operation, Smoothed):
        scale = (
            site.stacking.gathered(operation.scale, (-1,))
            if site.stacking.axes
            else operation.scale
        )
        parts["scale"] = ChannelScale, scale
        operation = operation.dot_general
    if isinstance(operation, Learned):
        operation = operation.resolved()
    inner = operation_of(operation)
    forward = inner.forward
    changes = {}
    for side, quantizer in (("lhs", forward.lhs), ("rhs", forward.rhs)):
        if quantizer is None:
            continue
        held = quantizer.calibration
        if isinstance(held, Range | Step) and jax.tree.leaves(held):
            part = {"lhs": "input_", "rhs": ""}[side] + (
                "step" if isinstance(held, Step) else "range"
            )
            if part == "range":
                continue
            kind = StepSize if isinstance(held, Step) else InputRange
            parts[part] = kind, _gathered(site.stacking, held.value, side)
            changes[side] = dataclasses.replace(quantizer, calibration=absmax)
    if isinstance(inner, ConvGeneralDilated):
        inner = DotGeneral(inner.forward, inner.dlhs, inner.drhs)
    return dataclasses.replace(inner, forward=dataclasses.replace(forward, **changes)), parts


def _gathered(stacking: Stacking, held: Any, side: str) -> Any:
    """What is held of layers, those of all along leading axes."""
    if not stacking.axes:
        return held
    if side == "rhs":
        return stacking.front(held)
    return jax.tree.map(lambda x: stacking.gathered(x, ()), held)


def _with_stored(model: Model, found: dict[str, Site]) -> Model:
    """The model with the stored weights of sites, in the form in which its products take them."""
    weights = {
        f"{path}/{site.weight}".strip("/"): (site, read(site.variable))
        for path, site in found.items()
        if site.kind != ATTENTION and isinstance(read(site.variable), QArray)
    }
    if not weights:
        return model
    keys: dict[str, dict[str, None]] = {}
    for decision in planned(model, (), {}).decisions:
        operation = decision.operation
        for path in decision.product.parameters:
            if operation is not None and operation.stored is not None:
                keys.setdefault(path, {})[operation.stored.key] = None
    leaves = {}
    for path, leaf in nnx.to_flat_state(nnx.split(model)[1]):
        name = "/".join(map(str, path))
        if name in weights:
            site, stored = weights[name]
            stored = _in_front(site.stacking, stored)
            operands = dict.fromkeys(keys.get(name, {name: None}), stored)
            plain = read(leaf)
            whole = Stored(operands, plain.shape, plain.dtype, Owner(name))
            leaves[path] = StoredWeight(as_held(name, whole))
    return replaced(model, leaves)


def _in_front(stacking: Stacking, stored: QArray) -> QArray:
    """A stored weight of several layers with these along leading axes."""
    if not stacking.axes or stacking.is_leading:
        return stored
    part = lambda x, i, axis: jax.tree.map(lambda leaf: jnp.take(leaf, i, axis), x)  # noqa: E731

    def stacked(x: QArray, axes: tuple[int, ...]) -> QArray:
        if not axes:
            return x
        count = stacking.sizes[len(stacking.axes) - len(axes)]
        rest = tuple(a - 1 for a in axes[1:])
        parts = [stacked(part(x, i, axes[0]), rest) for i in range(count)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    return stacked(stored, stacking.axes)
