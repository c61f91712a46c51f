"""Rules applied to a model, and the table of what they did."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from jaxquant.attention import Attention
from jaxquant.coverage import Coverage, Row, Tagged, find_products
from jaxquant.dot import DotGeneral
from jaxquant.formats import INT8
from jaxquant.nnx.freezing import (
    frozen_nbytes,
    quantize_weight,
    shared_copy,
    tied,
    weight_quantizer,
)
from jaxquant.nnx.modules import operation_of, read
from jaxquant.nnx.overriding import check_reached
from jaxquant.nnx.sites import Site, as_kind, install, put, sites
from jaxquant.qarray import QArray
from jaxquant.recipes import describe
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


def coverage(model: nnx.Module, rules: Rules | None = None, *inputs: Any) -> Coverage:
    """What each module of a model gets, or has: a row for every module with matrix products.

    Args:
        model: an NNX model, float, quantized or frozen.
        rules: what it would be quantized by; None for what it is quantized by already.
        inputs: example inputs, arrays or `jax.ShapeDtypeStruct`s.  With them the model is traced, so that
            MACs are counted, and products in no module that rules know are listed.

    Raises:
        ValueError: as `quantize`.

    >>> model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    >>> print(coverage(model, {".*": "w4a16"}, jax.ShapeDtypeStruct((2, 64), "float32")))
    path         kind    shape  rule  recipe  bytes before  after   MACs
    (the model)  linear  64×8   .*    w4a16          2,048    288  1,024
    total                                            2,048    288
    """
    macs, others = _uses(model, inputs) if inputs else ({}, None)
    assigned: dict[str, Rule] = {}
    if rules is not None:
        kinds = {path: site.kind for path, site in sites(model).items()}
        assigned = assign(kinds, rules)
        model = quantize(model, rules)
    later = {site.path for group in tied(model) for site in group[1:]}
    rows = [
        _row(site, assigned.get(path), macs.get(path, 0) if inputs else None, path in later)
        for path, site in sites(model).items()
    ]
    return Coverage(tuple(rows), others)


def _uses(model: nnx.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, int], tuple]:
    try:
        return find_uses(model, *inputs)
    except (TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"the inputs do not fit the model: {reason}") from error


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


def _row(site: Site, rule: Rule | None, macs: int | None, is_counted: bool) -> Row:
    operation = site.operation
    if site.kind == ATTENTION:
        recipe = describe(operation) if isinstance(operation, Attention) else "float"
        shape, before, after = None, 0, 0
    else:
        inner = operation_of(operation)
        recipe = "float" if inner is None else describe(inner)
        weight = read(site.variable)
        shape, before = tuple(weight.shape), _nbytes(weight)
        after = before
        if not isinstance(weight, QArray) and weight_quantizer(site) is not None:
            after = before if _is_traced(site) else frozen_nbytes(site)
        if is_counted:  # where another module holds the same weight
            before = after = 0
    if rule is not None:
        recipe = rule.label
    return Row(
        site.path,
        site.kind,
        shape,
        None if rule is None else rule.pattern.pattern,
        recipe,
        before,
        after,
        macs,
    )


def _is_traced(site: Site) -> bool:
    quantizer = weight_quantizer(site)
    return quantizer is not None and bool(jax.tree.leaves(quantizer.format))


def _nbytes(weight: Any) -> int:
    if isinstance(weight, QArray):
        return weight.nbytes
    return math.prod(weight.shape) * np.dtype(weight.dtype).itemsize
