"""Operations put into the slots of Flax's layers, as `jaxquant.ptq` works on them."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from jaxquant.coverage import Tagged, find_products
from jaxquant.dot import DotGeneral
from jaxquant.formats import INT8
from jaxquant.nnx.freezing import (
    quantize_weight,
    shared_copy,
    weight_quantizer,
)
from jaxquant.nnx.overriding import check_reached
from jaxquant.nnx.sites import Site, as_kind, install, put, sites
from jaxquant.rules import ATTENTION, Rule, Rules, assign

Model = TypeVar("Model", bound=nnx.Module)


def quantize(model: Model, rules: Rules) -> Model:
    """The same model with quantized matrix products; parameters are shared, not copied.

    A rule's recipe goes to every `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum`, `nnx.Conv` and
    `nnx.Embed` that it matches first; an `Attention` to every module with an ``attention_fn``, as
    `nnx.MultiHeadAttention` and models of one's own have.  An Embed becomes one whose table is quantized and
    whose `attend` is a quantized product.  Subclasses of these keep methods of their own, whose `super()` is
    quantized.  Layers under `nnx.vmap` and `nnx.scan`, stacked along any axis, are quantized each by itself.
    The given model is not changed; one that is quantized already gets the new recipes in place of
    the old.  Formats may be traced when this is called within the jitted function that uses the model.

    Args:
        model: an NNX model.
        rules: as in `jaxquant.rules`: from regular expressions on module paths to recipes; the first
            that matches counts, and None leaves a module as it is.

    Returns:
        A new module tree with variables of its own over the same arrays.

    Raises:
        ValueError: a rule that nothing takes; a module that cannot take its recipe, has an operation of the
            user's own, or is of a subclass that multiplies by itself; a model without a matrix product.

    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> quantize(model, {".*": "w8a8"})(jax.numpy.ones((2, 64))).shape
    (2, 8)
    """
    model = shared_copy(model)
    found = sites(model)
    assigned = assign({path: site.kind for path, site in found.items()}, rules)
    for path, rule in assigned.items():
        if rule.value is not None:
            check_reached(found[path])
        install(found[path], rule)
        _check_weight(found[path], rule)
    return model


def _check_weight(site: Site, rule: Rule) -> None:
    """Raises a ValueError where blocks or rotations do not divide a module's weight."""
    quantizer = weight_quantizer(site) if isinstance(rule.value, DotGeneral) else None
    if quantizer is None or (isinstance(quantizer.granularity, str) and not quantizer.hadamard):
        return
    try:
        check = dataclasses.replace(quantizer, format=INT8) if _is_traced(site) else quantizer
        jax.eval_shape(lambda: quantize_weight(site, check))
    except ValueError as error:
        raise ValueError(
            f"{site.path} cannot take {rule.label}: {error}; a rule ('{site.path}', None) before the others "
            "leaves it in float"
        ) from None


def find_uses(
    model: nnx.Module, *inputs: Any, call: Callable[..., Any] | None = None
) -> tuple[dict[str, int], tuple]:
    """MACs by module in the order of their calls, and the products in none, of a call that is not run.

    Args:
        model: an NNX model.
        inputs: arrays or `jax.ShapeDtypeStruct`s.
        call: from (model, *inputs); the model's own call where not given.
    """
    model = shared_copy(model)
    for path, site in sites(model).items():
        if site.kind == ATTENTION:
            put(site, Tagged(path, site.operation))
        elif site.kind != "conv_transpose":
            put(site, Tagged(path, as_kind(site.kind, DotGeneral())))
    graphdef, state = nnx.split(model)
    # The state is an argument, or nnx would take its variables for those of another trace.
    run = (lambda model, *inputs: model(*inputs)) if call is None else call
    return find_products(lambda s, *inputs: run(nnx.merge(graphdef, s), *inputs), state, *inputs)


def _is_traced(site: Site) -> bool:
    quantizer = weight_quantizer(site)
    return quantizer is not None and bool(jax.tree.leaves(quantizer.format))
