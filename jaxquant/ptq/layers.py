"""The weights that post-training quantization rounds, found in the trace of a model's call."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxquant.engine.rules import Subject, choose
from jaxquant.functions import quantizing
from jaxquant.functions.freezing import to_store
from jaxquant.functions.operations import Operation
from jaxquant.functions.quantizing import Decision
from jaxquant.functions.states import is_learned
from jaxquant.nnx.calls import at
from jaxquant.nnx.doors import aliases_of, first_places, rules_of, weights
from jaxquant.nnx.planning import Plan, planned, planned_call
from jaxquant.numerics.quantizer import Quantizer
from jaxquant.numerics.stacking import Stacking
from jaxquant.numerics.stored import Stored


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight that rules quantize, or several that are made of one parameter.

    Attributes:
        path: of the parameter.
        name: of the module that holds it, where that has no other weight; otherwise the path.
        decisions: of a product of each weight, by how that is made of the parameter.
        holders: the modules that hold the parameter, by path.
        is_table: whether rows are taken of it.
        is_called: whether the model's call multiplies by it.
        values: arrays that weights are made of, by path.
    """

    path: str
    name: str
    decisions: Mapping[str, Decision]
    holders: Mapping[str, Any]
    is_table: bool
    is_called: bool
    values: Mapping[str, Any] = dataclasses.field(repr=False)

    @property
    def matrices(self) -> dict[str, "Matrices"]:
        """Its weights as matrices, by how each is made of the parameter."""
        return {key: Matrices.of(decision) for key, decision in self.decisions.items()}

    @property
    def is_dot(self) -> bool:
        """Whether it is multiplied as a matrix alone, so that its inputs can be scaled and rotated."""
        return not self.is_table and all(d.product.kind == "dot" for d in self.decisions.values())

    @property
    def label(self) -> str:
        """The name in errors."""
        return self.name if "/" in self.path else "the model"


@dataclasses.dataclass(frozen=True)
class Matrices:
    """The conversion of a weight to matrices, inputs by outputs, and back.

    Attributes:
        own: shape of one matrix's part of the weight.
        stacking: where several are; as matrices they are stacked along leading axes.
        axes: what the product sums over, in one matrix's part.
        turns: how many of all this are taken by the turns of scans.
        batch: how activations have the axes of several matrices: an order of those of the weight.
    """

    own: tuple[int, ...]
    stacking: Stacking
    axes: tuple[int, ...]
    turns: int
    batch: tuple[int, ...]

    @classmethod
    def of(cls, decision: Decision) -> "Matrices":
        """Returns the matrices of a product's weight."""
        product, one = decision.product, operation_of(decision)
        assert one.stored is not None
        order = one.order or tuple(range(product.operands[one.right].ndim))
        shape = tuple(product.operands[one.right].shape[a] for a in np.argsort(order))
        stacking = one.stacking or Stacking.along((0,) if product.kind == "ragged" else (), shape)
        batch = range(len(stacking.axes))
        if one.stacking is not None:
            places = [order[a] for a in product.settings["dimension_numbers"][1][one.right]]
            batch = [stacking.axes.index(a) for a in places]
        axes = tuple(a - sum(b < a for b in stacking.axes) for a in one.axes)
        turns = math.prod(length for _, length in one.stored.turns)
        return cls(stacking.own(shape), stacking, axes, turns, tuple(batch))

    @property
    def inputs(self) -> int:
        """The number of terms of each sum."""
        return math.prod(self.own[a] for a in self.axes)

    @property
    def count(self) -> int:
        """The number of matrices, over all turns of scans."""
        return self.turns * math.prod(self.stacking.sizes)

    @property
    def order(self) -> list[int]:
        """Axes of one matrix's part: those that are summed over first."""
        rest = [a for a in range(len(self.own)) if a not in self.axes]
        return [*self.axes, *rest]

    def flat(self, weight: Any) -> Any:
        """Returns a turn's weight as matrices [..., inputs, outputs]."""
        count = len(self.stacking.sizes)
        places = (*range(count), *(count + a for a in self.order))
        moved = jnp.transpose(self.stacking.front(weight), places)
        return moved.reshape(*self.stacking.sizes, self.inputs, -1)


def operation_of(decision: Decision) -> Operation:
    """Returns the operation that replaces a product whose weight is quantized."""
    assert decision.operation is not None
    return decision.operation


def quantizer_of(decision: Decision) -> Quantizer:
    """Returns the quantizer of a product's weight."""
    quantizer = operation_of(decision).quantizer
    assert quantizer is not None
    return quantizer


def layers_of(
    model: nnx.Module, arguments: tuple[Any, ...], call: Callable[..., Any] | None
) -> tuple[list[Layer], list[Decision]]:
    """Returns the weights that are quantized, in the order of their products; those that are not called last.

    Args:
        model: as `jaxquant.nnx.quantize` made it.
        arguments, call: as of `jaxquant.nnx.planning.planned`; what the call raises is raised.

    Returns:
        The weights, and what becomes of all products.

    Raises:
        ValueError: as `jaxquant.nnx.freeze`; learned steps; no weights that are quantized.
    """
    plan = planned_call(model, arguments, {}, call, True)
    whole = _with_uncalled(model, plan)
    decisions = [d for d in whole.decisions if not _is_stored(d, whole)]
    for decision in decisions:
        _check_learned(decision)
    quantizing.check(decisions)
    if not any(d.operation is not None and d.operation.quantizer for d in decisions):
        raise ValueError("the rules quantize no weights")
    found = to_store(whole.reads, decisions, whole.values)
    holders = [path.rpartition("/")[0] for path in found]
    aliases, layers = aliases_of(first_places(model)), []
    for path, own in found.items():
        holder = path.rpartition("/")[0]
        name = holder if holder and holders.count(holder) == 1 else path
        uses = [d for d in decisions if path in d.product.parameters]
        held = {
            h: at(model, h.split("/") if h else ()) for h in (holder, *aliases.get(path, ())[1::2])
        }
        is_table = any(d.product.kind == "lookup" for d in uses) or all(
            isinstance(module, nnx.Embed) for module in held.values()
        )
        is_called = any(path in d.product.parameters for d in plan.decisions)
        layers.append(Layer(path, name, own, held, is_table, is_called, whole.values))
    # Tables that rows are taken of alone are last: nothing else is to see them rounded.
    summed = [p for d in plan.decisions if d.product.kind != "lookup" for p in d.product.parameters]
    return sorted(layers, key=lambda x: [*summed, x.path].index(x.path)), decisions


def _with_uncalled(model: nnx.Module, plan: Plan) -> Plan:
    """Returns a call's plan with the Flax layers that the call omits; other omitted weights are named."""
    names = [(p, p.rpartition("/")[0]) if "/" in p else (p,) for p, _ in weights(model)]
    chosen = choose([Subject(n, "weight") for n in names], rules_of(model), is_part=True)
    known = {path for d in plan.decisions for path in d.product.parameters} | set(plan.reads)
    pairs = [(n[0], rule) for n, rule in zip(names, chosen, strict=True)]
    left = {path for path, rule in pairs if rule is not None and rule.value and path not in known}
    if not left:
        return plan
    others = planned(model, (), {})
    if lost := sorted(left - set(others.parameters)):
        warnings.warn(
            f"{', '.join(lost)} are left as they are: the calibration data's call neither multiplies nor "
            "reads them",
            stacklevel=4,
        )
    added = [d for d in others.decisions if left & set(d.product.parameters)]
    return dataclasses.replace(
        plan,
        decisions=[*plan.decisions, *added],
        reads={**plan.reads, **{p: line for p, line in others.reads.items() if p in left}},
        values={**others.values, **plan.values},
    )


def _is_stored(decision: Decision, plan: Plan) -> bool:
    return any(isinstance(plan.values[p], Stored) for p in decision.product.parameters)


def _check_learned(decision: Decision) -> None:
    forward = None if decision.rule is None else getattr(decision.rule.value, "forward", None)
    if forward is not None and (is_learned(forward.lhs) or is_learned(forward.rhs)):
        raise ValueError(
            f"{decision.product.path} has a recipe with learned steps, which only training finds"
        )
    if forward is not None and jax.tree.leaves(getattr(forward.rhs, "format", None)):
        raise ValueError(f"{decision.product.path} has a traced width, which cannot be stored")
