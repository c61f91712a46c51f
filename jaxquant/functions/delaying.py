"""Delayed scaling in a function of parameters: its products' ranges are state, from step to step."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxquant.engine.rules import Rules, parse_rules
from jaxquant.engine.walking import Call, as_returned, called
from jaxquant.functions.monitoring import check_loss
from jaxquant.functions.quantizing import Decision, check, decide, evaluate, stored_among
from jaxquant.functions.states import State
from jaxquant.operations.delaying import Scales, first_scales, is_delayed, next_scales

__all__ = ["DelayedScaling", "delayed", "delayed_products"]

Ranges = dict[str, Scales]


class DelayedScaling(NamedTuple):
    """Pure functions of a loss whose products have delayed ranges.

    Attributes:
        init: from the loss's arguments to the ranges before the first step, by the path of each weight.
        update: from (ranges, *arguments) to (value, gradient by the first argument, next ranges).
        evaluate: from (ranges, *arguments) to the value.
    """

    init: Callable[..., Ranges]
    update: Callable[..., tuple[jax.Array, Any, Ranges]]
    evaluate: Callable[..., jax.Array]


def delayed(function: Callable[..., jax.Array], rules: Rules) -> DelayedScaling:
    """Returns a loss with products by `fp8_delayed_train`, or others with delayed ranges, as (init, update).

    A step quantizes by the ranges of the steps before, and its own largest magnitudes, of operands and of
    incoming gradients, go into those of the next: one forward and one backward pass in all.  Ranges are
    arrays whose shapes never change, so that a jitted step is traced once, and a checkpoint of them resumes
    with the same bits.

    Args:
        function: a loss: of a pytree of parameters, its first positional argument, and anything else, to a
            scalar; as of `jaxquant.functions.quantize`.
        rules: likewise; products of other recipes are quantized as there.

    Raises:
        ValueError: what `quantize` refuses; at the call, no product with delayed ranges; a convolution, a
            lookup, a product of activations, or one that is computed several times with one weight, where a
            rule gives it such a recipe; a result that is no scalar.

    Source: Micikevicius et al. 2022, arXiv 2209.05433, and TransformerEngine's DelayedScaling.

    >>> import jax.numpy as jnp
    >>> loss = lambda w, x: ((x @ w["up"]) ** 2).mean()
    >>> w, x = {"up": jnp.eye(4)}, jnp.ones((2, 4))
    >>> init, update, evaluate = delayed(loss, {"up": "fp8_delayed_train"})
    >>> ranges = init(w, x)
    >>> value, gradient, ranges = jax.jit(update)(ranges, w, x)
    >>> float(value), float(ranges["up"].ranges.lhs.value), float(ranges["up"].ranges.dlhs.value)
    (1.0, 1.0, 0.25)
    """
    parse_rules(rules)
    if not callable(function):
        raise ValueError(f"a function of parameters is wanted; got {type(function).__name__}")

    def decided(call: Call, arrays: list[Any], states: dict[str, State], is_start: bool) -> Any:
        trace = call.trace(function, arrays)
        stored = stored_among(call.origins, arrays)
        options: Any = {"states": states, "stored": stored, "is_start": is_start}
        return trace, decide(trace.products, rules, **options, is_tried=False)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def run(call: Call, arrays: list[Any], ranges: Ranges) -> Any:
        states = {path: State(delayed=own) for path, own in ranges.items()}
        trace, decisions = decided(call, arrays, states, False)
        return evaluate(trace, decisions, arrays, call.origins)

    def init(*args: Any, **kwargs: Any) -> Ranges:
        call, arrays = called(args, kwargs)
        _, decisions = decided(call, arrays, {}, True)
        found = delayed_products(decisions)
        if not found:
            raise ValueError(
                "no product has delayed ranges; a rule such as {'.*': 'fp8_delayed_train'} gives them"
            )
        return {path: start(decision) for path, decision in found.items()}

    def value(ranges: Ranges, *args: Any, **kwargs: Any) -> jax.Array:
        call, arrays = called(args, kwargs)
        return check_loss(as_returned(run(call, arrays, ranges)))

    def update(ranges: Ranges, *args: Any, **kwargs: Any) -> tuple[jax.Array, Any, Ranges]:
        found, (seen, gradient) = jax.value_and_grad(value, (0, 1))(ranges, *args, **kwargs)
        return found, gradient, next_scales(ranges, seen)

    return DelayedScaling(init, update, value)


def delayed_products(decisions: Sequence[Decision]) -> dict[str, Decision]:
    """Returns the decisions whose products have delayed ranges, by the path of their weight.

    Raises:
        ValueError: products that cannot have them; several of one weight.
    """
    wanted = [d for d in decisions if d.rule is not None and is_delayed(d.rule.value)]
    check(wanted)
    paths = [d.product.parameters[0] for d in wanted]
    if several := [path for path, count in Counter(paths).items() if count > 1]:
        raise ValueError(
            f"{', '.join(several)} is multiplied several times in a step, and delayed ranges are of one "
            f"product; a rule ({several[0]!r}, None) before the others leaves it in float"
        )
    return dict(zip(paths, wanted, strict=True))


def start(decision: Decision) -> Scales:
    """Returns the ranges of a product before the first step."""
    assert decision.rule is not None
    assert decision.operation is not None
    recipe: Any = decision.rule.value
    made = decision.operation.stored
    assert made is not None
    turns = tuple(length for _, length in made.turns)
    left = decision.product.operands[1 - decision.operation.right].shape
    each = tuple(left[a] for a in decision.operation.each)
    return first_scales(recipe, (*turns, *each))
