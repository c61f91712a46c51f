"""A recipe as what takes a product's place."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.attention import Attention
from jaxquant.conv import ConvGeneralDilated
from jaxquant.dot import DotGeneral
from jaxquant.engine.products import Product
from jaxquant.ragged import RaggedDot

_CONV = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
    "precision",
    "preferred_element_type",
)


def replacement(
    product: Product, recipe: DotGeneral | Attention
) -> Callable[..., jax.Array] | None:
    """What takes a product's place, of its operands; None where the recipe leaves it in float.

    The weight, or the values that probabilities are multiplied with, is a recipe's right operand, on
    whichever side the product has it.

    Raises:
        ValueError: a product that cannot be reached, or that cannot take the recipe.
    """
    if product.unreached:
        raise ValueError(f"it cannot be replaced: {product.unreached}")
    if isinstance(recipe, Attention):
        return _of_activations(product, recipe)
    makers = {"dot": _dot, "conv": _conv, "ragged": _ragged}
    found = makers[product.kind](product, recipe, product.weight == 0)
    jax.eval_shape(found, *product.operands)  # refuses what the recipe cannot take
    return found


def _of_activations(product: Product, recipe: Attention) -> Callable[..., jax.Array] | None:
    if recipe.kv is not None:
        raise ValueError(
            "which operand a cache would hold cannot be told of a product by itself; a{bits} quantizes both"
        )
    dot = recipe.qk if product.probabilities is None else recipe.pv
    if dot is None:
        return None
    if product.kind != "dot":
        raise ValueError(f"{product.kind} of two activations takes no recipe for attention")
    found = _dot(product, dot, product.probabilities == 1)
    jax.eval_shape(found, *product.operands)
    return found


def _dot(product: Product, dot: DotGeneral, is_swapped: bool) -> Callable[..., jax.Array]:
    settings = product.settings
    names = ("precision", "preferred_element_type", "out_sharding")
    options = {name: settings[name] for name in names if settings.get(name) is not None}
    dims = settings["dimension_numbers"]
    if not is_swapped:
        return functools.partial(dot, dimension_numbers=dims, **options)
    if "out_sharding" in options:
        raise ValueError(
            "its weight is on the left and its result's sharding is set, which is not reached"
        )
    (left, right), (left_batch, right_batch) = dims
    batch = len(left_batch)
    free = [x.ndim - len(c) - batch for x, c in zip(product.operands, (left, right), strict=True)]
    order = [
        *range(batch),
        *range(batch + free[1], batch + free[1] + free[0]),
        *range(batch, batch + free[1]),
    ]

    def swapped(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        numbers = ((right, left), (right_batch, left_batch))
        return jnp.transpose(dot(rhs, lhs, numbers, **options), order)

    return swapped


def _conv(product: Product, dot: DotGeneral, is_swapped: bool) -> Callable[..., jax.Array]:
    if is_swapped:
        raise ValueError(
            "its weight is the convolution's left operand, and a recipe's is the right one"
        )
    settings: Any = {name: product.settings[name] for name in _CONV}
    return functools.partial(ConvGeneralDilated(dot.forward, dot.dlhs, dot.drhs), **settings)


def _ragged(product: Product, dot: DotGeneral, is_swapped: bool) -> Callable[..., jax.Array]:
    settings = product.settings
    numbers = settings.get("ragged_dot_dimension_numbers")
    if is_swapped or settings.get("group_offset") is not None:
        raise ValueError("only rows by groups of a weight are reached, without a group_offset")
    if numbers is not None and not _is_plain(numbers):
        raise ValueError(f"a ragged product along {numbers} takes no recipe")
    names = ("precision", "preferred_element_type")
    options = {name: settings[name] for name in names if settings.get(name) is not None}
    return functools.partial(RaggedDot(dot.forward, dot.dlhs, dot.drhs), **options)


def _is_plain(numbers: Any) -> bool:
    """Whether a ragged product is `jax.lax.ragged_dot`'s: rows [m, k] by groups' matrices [g, k, n]."""
    (contracting, batch) = numbers.dot_dimension_numbers
    return (
        [tuple(x) for x in contracting] == [(1,), (1,)]
        and not any(map(len, batch))
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
    )
