"""Statistics of a function's products, as the derivative by their taps."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.engine.rules import Rules, parse_rules
from jaxquant.engine.walking import Call, called
from jaxquant.functions.quantizing import Decision, decide, evaluate_recording, stored_among
from jaxquant.operations.monitoring import Monitored, of_sums
from jaxquant.operations.tapped import Four, blank

__all__ = ["Place", "check_loss", "differentiated", "monitor", "places"]

_NOTHING = (
    "no product is quantized, so that there is nothing to monitor; rules that take products, as "
    "{'.*': 'w8a8'}, say which are"
)


@dataclasses.dataclass(frozen=True)
class Place:
    """The location of a product's statistics.

    Attributes:
        name: of the product, like no other's.
        turns: lengths of the scans around it.
        each: how many matrices there are along each further axis, which are taken together.
    """

    name: str
    turns: tuple[int, ...]
    each: tuple[int, ...]


def monitor(function: Callable[..., jax.Array], rules: Rules) -> Callable[..., Monitored]:
    """Transforms a loss into a function of the same arguments that returns statistics of its quantizers.

    For the operands of each quantized product and its incoming gradient, as the products of both gradients
    quantize it, there are SQNR, saturation, underflow, largest value and a histogram
    (`jaxquant.monitoring.Statistics`).  They come out of the quantized function as a gradient does, by one
    forward and one backward pass: the result is data, and may be jitted, vmapped and scanned.  Parts of the
    model under scan have an axis of turns.

    No other step is touched.  Jit this once and call it every so many steps.

    Args:
        function: a loss: of a pytree of parameters, its first positional argument, and anything else, to a
            scalar; as of `jaxquant.functions.quantize`.
        rules: likewise.

    Returns:
        From the function's arguments to a dict by product: the path of its parameter, for those of attention
        with ``:qk`` and ``:pv``, and with ``#2`` and so on where several have one path.

    Raises:
        ValueError: what `quantize` refuses; no product that is quantized; a result that is no scalar.

    >>> loss = lambda w, x: ((x @ w["up"]) ** 2).mean()
    >>> w, x = {"up": jnp.eye(4)}, jnp.ones((2, 4)).at[0, 0].set(127.0)
    >>> found = jax.jit(monitor(loss, {"up": "w8a8"}))(w, x)["up"]
    >>> float(found.lhs.amax), float(found.lhs.saturated), float(found.dlhs.amax)
    (127.0, 0.0, 31.75)
    """
    parse_rules(rules)
    if not callable(function):
        raise ValueError(f"a function of parameters is wanted; got {type(function).__name__}")

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def run(call: Call, arrays: list[Any]) -> Monitored:
        trace = call.trace(function, arrays)
        stored = stored_among(call.origins, arrays)
        decisions = decide(trace.products, rules, stored=stored, is_tried=False)
        found = places(decisions)

        def loss(taps: Mapping[str, Four]) -> jax.Array:
            given = {index: taps[place.name] for index, place in found.items()}
            how = call.origins, "error", lambda *_: None
            return check_loss(evaluate_recording(trace, decisions, arrays, *how, taps=given)[0])

        return differentiated(loss, list(found.values()))

    @functools.wraps(function)
    def monitored(*args: Any, **kwargs: Any) -> Monitored:
        return run(*called(args, kwargs))

    return monitored


def places(decisions: Sequence[Decision]) -> dict[int, Place]:
    """Returns the location of each quantized product's statistics, by number; warns of loops without any."""
    found, names = {}, dict[str, int]()
    for index, decision in enumerate(decisions):
        product, operation = decision.product, decision.operation
        if operation is None or decision.reason:
            continue
        if product.enclosed:
            name = product.path or f"a product at {product.source or 'an unknown line'}"
            warnings.warn(f"{name} is within {product.enclosed} and not monitored", stacklevel=2)
            continue
        name = _name(decision)
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}#{names[name]}"
        left = product.operands[1 - operation.right].shape
        found[index] = Place(name, product.turns, tuple(left[a] for a in operation.each))
    return found


def _name(decision: Decision) -> str:
    product = decision.product
    path = product.path or "activations"
    if product.weight is not None:
        return path
    return f"{path}:pv" if product.probabilities is not None else f"{path}:qk"


def differentiated(
    loss: Callable[[Mapping[str, Four]], jax.Array], found: Sequence[Place]
) -> Monitored:
    """Statistics: the derivative of a loss by its taps.

    Args:
        loss: of a tap for each place, by name.
        found: all places.

    Raises:
        ValueError: no places.
    """
    if not found:
        raise ValueError(_NOTHING)
    sums = jax.grad(loss)({place.name: blank((*place.turns, *place.each)) for place in found})
    return {
        place.name: Four(*(of_sums(own, len(place.each)) for own in sums[place.name]))
        for place in found
    }


def check_loss(result: Any) -> jax.Array:
    """Returns the result of a loss.

    Raises:
        ValueError: it is no scalar of a floating-point type.
    """
    shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", type(None))
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        got = type(result).__name__ if shape is None else f"{dtype}{list(shape)}"
        raise ValueError(
            f"what is monitored is a loss, a scalar of a floating-point type; got {got}"
        )
    return result
