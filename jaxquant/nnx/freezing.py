"""Weights of Linen's layers as the integers that they were multiplied as."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxquant.functions.freezing import packed
from jaxquant.qarray import QArray, quantize
from jaxquant.stacking import Stacking


def check_weight(path: str, weight: Any) -> None:
    """Raises a ValueError for a weight with a NaN or an Inf, where its numbers are known."""
    if isinstance(weight, Tracer | jax.ShapeDtypeStruct | QArray):
        return
    if not bool(_all_finite(weight)):
        raise ValueError(f"the weights of {path or 'the model'} hold a NaN or an Inf")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def quantize_stacked(
    axes: tuple[int, ...], stacking: Stacking, dtype: Any, weight: Any, mask: Any, quantizer: Any
) -> QArray:
    """The weight of one or several layers, quantized each by itself and packed.

    Args:
        axes: what the product sums over, in one layer's weight.
        stacking: where the layers are.
        dtype: the type that the weight is multiplied in; None for its own.
        weight: of all layers.
        mask: what it is multiplied by before, of one layer or of all; None for nothing.
        quantizer: whose own arrays, as learned steps are, are stacked as the weights are.
    """

    weight = stacking.masked(weight if dtype is None else weight.astype(dtype), mask)
    one = stacking.each(lambda weight, quantizer: packed(quantize(weight, quantizer, axes)))
    return stacking.marked(one(weight, quantizer))
