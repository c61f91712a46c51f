"""Delayed scaling in NNX models: ranges beside each weight, which a training step carries on."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxquant.functions.delaying import delayed_products, start
from jaxquant.nnx.calibrating import held
from jaxquant.nnx.doors import on_unsupported_of
from jaxquant.nnx.modules import DelayedScales
from jaxquant.nnx.planning import planned
from jaxquant.operations.delaying import next_scales

__all__ = ["add_delayed", "value_and_grad"]


def add_delayed(
    model: nnx.Module, inputs: tuple[Any, ...], options: Any, call: Callable[..., Any] | None
) -> None:
    """Adds ranges of no steps yet beside the weights whose recipes have delayed ones.

    Raises:
        ValueError: products that cannot have them; without example inputs, none that is known of; a weight
            that no module's attribute holds.
    """
    decisions = planned(model, inputs, options, call, is_shown=True).decisions
    if on_unsupported_of(model) == "float":
        decisions = [decision for decision in decisions if not decision.reason]
    found = delayed_products(decisions)
    if not found:
        raise ValueError(
            "no product is known that a rule gives delayed ranges; example inputs, quantize(model, rules, "
            "*inputs), say what other code than Flax's own layers multiplies"
        )
    for path, decision in found.items():
        module, name = held(model, path)
        if not hasattr(module, f"{name}_delayed"):
            setattr(module, f"{name}_delayed", DelayedScales(start(decision)))


def value_and_grad(
    loss: Callable[..., Any], *, wrt: Any = nnx.Param, has_aux: bool = False
) -> Callable[..., Any]:
    """Returns `nnx.value_and_grad` of a loss, which also carries a model's delayed ranges to the next step.

    The step computes by the ranges of the steps before.  What was largest in it, of operands and of incoming
    gradients, comes out of the same backward pass and goes into the model's `DelayedScales` variables.  Jit
    it (`nnx.jit`): it is traced once.  A checkpoint of the model's variables resumes with the same bits.

    A step that is to be skipped, as after a loss that is not finite, leaves these variables to be restored
    with the others.  Code that splits the model itself differentiates its loss by the state of
    `DelayedScales` too, and `jaxquant.operations.delaying.next_scales` makes the next of it.

    Args:
        loss: from (model, *args, **kwargs) to a scalar, or to (scalar, aux) with `has_aux`.
        wrt: a filter of what the gradient is by.
        has_aux: as of `nnx.value_and_grad`.

    Returns:
        From the same arguments to (value, gradient), as `nnx.value_and_grad`.

    Raises:
        ValueError: at the call, a model without delayed ranges.

    Source: Micikevicius et al. 2022, arXiv 2209.05433, and TransformerEngine's DelayedScaling.

    >>> import jax.numpy as jnp
    >>> from jaxquant.nnx import quantize, read
    >>> model = quantize(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), {".*": "fp8_delayed_train"})
    >>> step = nnx.jit(value_and_grad(lambda model, x: (model(x) ** 2).sum()))
    >>> value, gradient = step(model, jnp.array([[1.0, -3.0, 2.0, 0.0]]))
    >>> float(read(model.kernel_delayed).ranges.lhs.value), gradient.kernel.shape
    (3.0, (4, 8))
    """
    if not callable(loss):
        raise ValueError(f"a loss of a model is wanted; got {type(loss).__name__}")
    differentiated = nnx.value_and_grad(
        loss, argnums=nnx.DiffState(0, (wrt, DelayedScales)), has_aux=has_aux
    )

    @functools.wraps(loss)
    def step(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        scales = nnx.state(model, DelayedScales)
        if not scales:
            raise ValueError(
                f"a model with delayed ranges is wanted; this {type(model).__name__} has none: "
                "jaxquant.nnx.quantize(model, {'.*': 'fp8_delayed_train'}) adds them"
            )
        found, gradients = differentiated(model, *args, **kwargs)
        seen, own = nnx.split_state(gradients, DelayedScales, ...)
        nnx.update(model, next_scales(scales, seen))
        return found, own

    return step
