"""Plans of a quantized model's products: of one call, or of its layers separately."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jaxquant.engine.walking import Trace
from jaxquant.functions import quantizing
from jaxquant.functions.quantizing import Decision
from jaxquant.nnx.calls import Call, called
from jaxquant.nnx.doors import door_of, rules_of
from jaxquant.nnx.layers import layer_calls


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model's products are computed.

    Attributes:
        decisions: one for each product.
        reads: the parameters that something else than a product reads, each with the line.
        values: arrays of the model that weights are made of, by path.
        parameters: paths of those that were among a call's arguments.
    """

    decisions: list[Decision]
    reads: Mapping[str, str]
    values: Mapping[str, Any]
    parameters: tuple[str, ...]

    def check(self) -> None:
        """Raises a ValueError that names all products that cannot take their recipes."""
        quantizing.check(self.decisions)


def planned(
    model: nnx.Module,
    inputs: tuple[Any, ...],
    options: Mapping[str, Any],
    call: Callable[..., Any] | None = None,
    is_shown: bool = False,
) -> Plan:
    """Plans a quantized model's products.

    Args:
        model: as `jaxquant.nnx.quantize` made it.
        inputs, options: what it is called with; where there are none, Flax's own layers in it are looked at.
        call: from (model, *inputs); the model's own call where not given.
        is_shown: whether it is to be shown alone, so that learned steps need not be there.

    Raises:
        ValueError: a model that is not quantized.
    """
    door = door_of(model)
    if door is None:
        raise ValueError(
            f"a quantized model is wanted; got {type(model).__name__}: call jaxquant.nnx.quantize first"
        )
    if not inputs and not options:
        found = layer_calls(model, door.path, door.first)
        return _joined(
            [_plan(model, *each, True, is_shown or _is_head(each[0]), is_shown) for each in found]
        )
    try:
        return planned_call(model, inputs, options, call, call is not None, is_shown)
    except (TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"the inputs do not fit the model: {reason}") from error


def planned_call(
    model: nnx.Module,
    inputs: tuple[Any, ...],
    options: Mapping[str, Any],
    call: Callable[..., Any] | None,
    is_part: bool,
    is_shown: bool = False,
) -> Plan:
    """Plans the products of a quantized model's call; errors of the call propagate.

    Args:
        model, inputs, options, call, is_shown: as of `planned`.
        is_part: whether rules may take none of these products.
    """
    door = door_of(model)
    assert door is not None
    made, arrays, _ = called(model, door.path, call or "__call__", inputs, options, door.first)
    return _plan(model, made, arrays, made.trace(arrays), is_part, is_shown, is_shown)


def _is_head(call: Call) -> bool:
    """Returns whether a model may never call this layer's method, so that nothing initializes its steps."""
    return getattr(call.method, "method", call.method) == "attend"


def _plan(
    model: nnx.Module,
    call: Call,
    arrays: list[Any],
    trace: Trace,
    is_part: bool,
    is_start: bool,
    is_shown: bool,
) -> Plan:
    door = door_of(model)
    assert door is not None
    states = call.states(arrays)
    rules = rules_of(model)
    stored: Any = quantizing.stored_among(call.origins, arrays)
    if is_shown:  # as if the weights were stored, whose steps are not looked for
        stored = {path for product in trace.products for path in product.parameters}
    decisions = quantizing.decide(
        trace.products, rules, is_part or not rules, states, stored, is_start, door.aliases
    )
    pairs = list(zip(call.origins, arrays, strict=True))
    values = {p: x for origin, x in pairs if origin.derivation for p in origin.derivation.paths}
    parameters = tuple(p for origin, _ in pairs if origin.is_weight for p in origin.nearest)
    return Plan(decisions, trace.reads, values, parameters)


def _joined(plans: list[Plan]) -> Plan:
    decisions = [d for plan in plans for d in plan.decisions]
    reads = {path: line for plan in plans for path, line in plan.reads.items()}
    values = {path: x for plan in plans for path, x in plan.values.items()}
    parameters = tuple(dict.fromkeys(p for plan in plans for p in plan.parameters))
    return Plan(decisions, reads, values, parameters)
